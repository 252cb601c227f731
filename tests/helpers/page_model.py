"""An independent account of a cache's pages, by sets and counts; the fuzz compares ``stats()`` to it."""

from __future__ import annotations

from collections import Counter
from itertools import count


class DoesNotFit(Exception):
    """The operation takes more pages than the limit leaves."""


class PageModel:
    """Which page backs which (slot, lane, index), by the contract's rules alone; and which a slot's last sequence left.

    What is parked never decides whether an operation fits. Which parked pages are taken when memory is short is the
    cache's choice: ``unparked`` is told.

    Args:
        lane_row_bytes: bytes per token of every lane.
        page_bytes: size of a page.
        limit_pages: pages that may exist at once.
        over_read: rows past the end that stay mapped.
        masked: whether those may lie on shared pages.
    """

    def __init__(
        self, lane_row_bytes: list[int], page_bytes: int, limit_pages: int, over_read: int = 0, masked: bool = True
    ) -> None:
        self.over_read = over_read
        self.masked = masked
        self.lane_row_bytes = lane_row_bytes
        self.page_bytes = page_bytes
        self.limit_pages = limit_pages
        self.table: dict[tuple[int, int, int], int] = {}
        self.parked: dict[tuple[int, int, int], int] = {}
        self.rows: dict[int, int] = {}
        self.stale: dict[int, int] = {}  # up to which row an older, longer self left something, if that matters
        self._new_id = count(1).__next__

    def _owners(self) -> Counter[int]:
        return Counter(self.table.values())

    def save(self) -> tuple[dict, ...]:
        return dict(self.table), dict(self.parked), dict(self.rows), dict(self.stale)

    def restore(self, saved: tuple[dict, ...]) -> None:
        self.table, self.parked, self.rows, self.stale = map(dict, saved)

    def _replace(self, keys: list[tuple[int, int, int]]) -> None:
        """Put a page of its own behind every key, if the limit allows: the one parked there, or a new one."""
        if len(set(self.table.values())) + len(keys) > self.limit_pages:
            raise DoesNotFit
        owned = {0, *self.table.values()}
        taken = {page: key for key in reversed(keys) if (page := self.parked.get(key, 0)) not in owned}
        self._make_private(set(taken))
        for key in keys:
            self.parked.pop(key, None)
            self.table[key] = self._new_id()
        self.table |= {key: page for page, key in taken.items()}

    def unparked(self, keys: set[tuple[int, int, int]]) -> None:
        """These parked pages were unmapped to be used elsewhere: the ones furthest from the start of their slot."""
        for key in keys:
            del self.parked[key]
        for slot, lane, index in keys:
            left = [other[2] for other in self.parked if other[:2] == (slot, lane)]
            assert index > max(left, default=-1), f"slot {slot} lost page {index}, but not a later one"

    def _to_replace(
        self, slot: int, start: int, end: int, owners: Counter[int], sole: set[int], grows: bool = True
    ) -> list[tuple[int, int, int]]:
        """The pages to put in place of none or of a shared one; ``owners`` is counted down for the latter.

        Those that become private as they are, for want of other owners, are added to ``sole``.
        """
        keys = []
        for lane, row_bytes in enumerate(self.lane_row_bytes):
            last_private = -(-end * row_bytes // self.page_bytes) - 1
            for index in range(start * row_bytes // self.page_bytes, self._num_pages(lane, end)):
                page = self.table.get((slot, lane, index))
                private = index <= last_private or (grows and not self.masked)
                if page is None or (private and owners[page] > 1):
                    keys.append((slot, lane, index))
                    owners[page] -= 1
                elif private:
                    sole.add(page)
        return keys

    def _make_private(self, pages: set[int]) -> None:
        """These pages have one owner, and will be written to: nothing parked shows them any more."""
        self.parked = {key: page for key, page in self.parked.items() if page not in pages}

    def is_shared(self, slot: int, start: int, end: int) -> bool:
        """Whether a page under rows ``[start, end)`` has another owner too, or had one whose work may be under way."""
        owners = self._owners()
        owners.update(self.parked.values())
        return any(
            owners[self.table.get((slot, lane, index))] > 1
            for lane, row_bytes in enumerate(self.lane_row_bytes)
            for index in range(start * row_bytes // self.page_bytes, -(-end * row_bytes // self.page_bytes))
        )

    def _wipe(self, slot: int) -> None:
        """What an older, longer self left is gone from the slot's own pages."""
        if slot in self.stale and not self.is_shared(slot, self.rows[slot], self.stale[slot]):
            del self.stale[slot]

    def _num_pages(self, lane: int, rows: int) -> int:
        return -(-(rows + self.over_read) * self.lane_row_bytes[lane] // self.page_bytes) if rows else 0

    def ensure(self, requests: list[tuple[int, int]]) -> None:
        owners, sole = self._owners(), set[int]()
        longer = [(slot, rows) for slot, rows in requests if rows > self.rows[slot]]
        keys = [key for slot, rows in longer for key in self._to_replace(slot, self.rows[slot], rows, owners, sole)]
        self._replace(keys)
        self._make_private(sole)
        for slot, rows in longer:
            self._wipe(slot)
            self.rows[slot] = rows

    def make_writable(self, slot: int, start: int, end: int) -> None:
        if start < end:
            sole = set[int]()
            self._replace(self._to_replace(slot, start, end, self._owners(), sole, grows=end >= self.rows[slot]))
            self._make_private(sole)
            self._wipe(slot)

    def step(self, slot: int) -> None:
        """Before a kernel runs that does not mask what it reads past the end, nothing stale may lie there."""
        rows = self.rows[slot]
        if slot in self.stale and rows:
            sole = set[int]()
            self._replace(self._to_replace(slot, rows, rows, self._owners(), sole))
            self._make_private(sole)
            self._wipe(slot)

    def fork(self, parent: int, child: int, rows: int) -> None:
        keys = []
        for lane, row_bytes in enumerate(self.lane_row_bytes):
            whole = rows * row_bytes // self.page_bytes
            keys += [(child, lane, index) for index in range(whole, self._num_pages(lane, rows))]
        self._replace(keys)
        for lane, row_bytes in enumerate(self.lane_row_bytes):
            for index in range(rows * row_bytes // self.page_bytes):
                self.parked.pop((child, lane, index), None)
                self.table[child, lane, index] = self.table[parent, lane, index]
        self.rows[child] = rows

    def truncate(self, slot: int, rows: int, in_step: bool = False) -> None:
        if not self.masked and rows < self.rows[slot]:
            self.stale[slot] = max(self.stale.get(slot, 0), self.rows[slot])
        self.rows[slot] = rows
        for key in [key for key in self.table if key[0] == slot]:
            if key[2] >= self._num_pages(key[1], rows):
                del self.table[key]
        if not in_step:
            self._wipe(slot)

    def release(self, slot: int) -> None:
        for key in [key for key in self.table if key[0] == slot]:
            self.parked[key] = self.table.pop(key)
        del self.rows[slot]
        self.stale.pop(slot, None)

    def expected_stats(self, bytes_per_token: int) -> dict[str, int]:
        owners = self._owners()
        row_bytes = sum(self.rows.values()) * bytes_per_token
        return {
            "in_use_bytes": len(owners) * self.page_bytes,
            "mapped_bytes": (len(self.table) + len(self.parked)) * self.page_bytes,
            "parked_bytes": len(set(self.parked.values()) - owners.keys()) * self.page_bytes,
            "shared_bytes": sum(1 for maps in owners.values() if maps > 1) * self.page_bytes,
            "row_bytes": row_bytes,
            "waste_bytes": len(self.table) * self.page_bytes - row_bytes,
            "num_live_slots": len(self.rows),
        }
