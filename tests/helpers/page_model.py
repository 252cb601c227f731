"""An independent account of a cache's pages, by sets and counts; the fuzz compares ``stats()`` to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

Unit = tuple[int, int, int]  # slot, lane, which unit of the slot there


class DoesNotFit(Exception):
    """The operation takes more pages than the limit leaves."""


@dataclass(frozen=True)
class Stretch:
    """Units ``[first, end)`` of a slot, which get new pages; on write, in place of a page that goes up to ``old``."""

    slot: int
    lane: int
    first: int
    end: int
    old: int = 0


@dataclass(frozen=True)
class Kept:
    """The page in which a sequence ends, of which it needs the units ``[first, end)`` and keeps those to ``old``."""

    slot: int
    lane: int
    first: int
    end: int
    old: int


class PageModel:
    """Which page backs which (slot, lane, unit), by the contract's rules alone; and which a slot's last sequence left.

    What is parked never decides whether an operation fits. Which parked pages are taken when memory is short is the
    cache's choice: ``unparked`` is told.

    Args:
        lane_row_bytes: bytes per token of every lane.
        page_bytes: size of a unit.
        limit_pages: units that may exist at once.
        over_read: rows past the end that stay mapped.
        masked: whether those may lie on shared pages.
        largest: units of a page, at most.
    """

    def __init__(
        self,
        lane_row_bytes: list[int],
        page_bytes: int,
        limit_pages: int,
        over_read: int = 0,
        masked: bool = True,
        largest: int = 1,
    ) -> None:
        self.over_read = over_read
        self.masked = masked
        self.lane_row_bytes = lane_row_bytes
        self.page_bytes = page_bytes
        self.limit_pages = limit_pages
        self.largest = largest
        self.table: dict[Unit, int] = {}
        self.parked: dict[Unit, int] = {}
        self.sizes: dict[int, int] = {}
        self.rows: dict[int, int] = {}
        self.stale: dict[int, int] = {}  # up to which row an older, longer self left something, if that matters
        self._new_id = count(1).__next__

    # -- looking -------------------------------------------------------------------------------------------------
    def _num_maps(self, table: dict[Unit, int]) -> Counter[int]:
        """How often each page is there; it begins at a multiple of its size."""
        return Counter(page for (_, _, unit), page in table.items() if unit % self.sizes[page] == 0)

    def _owners(self) -> Counter[int]:
        return self._num_maps(self.table)

    def _num_units(self, pages: set[int]) -> int:
        return sum(self.sizes[page] for page in pages)

    def _num_left(self) -> int:
        """What the limit leaves, were nothing parked."""
        return self.limit_pages - self._num_units(set(self.table.values()))

    def _num_pages(self, lane: int, rows: int) -> int:
        return -(-(rows + self.over_read) * self.lane_row_bytes[lane] // self.page_bytes) if rows else 0

    def _cover(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(first unit, size) of each new page: a power of two, a quarter of what lies before it at most, at a multiple
        of its size, and with as much behind it in the stretch."""
        while first < end:
            size = 1
            while (
                2 * size <= self.largest and first % (2 * size) == 0 and 8 * size <= first and first + 4 * size <= end
            ):
                size *= 2
            yield first, size
            first += size

    def save(self) -> tuple[dict, ...]:
        return dict(self.table), dict(self.parked), dict(self.sizes), dict(self.rows), dict(self.stale)

    def restore(self, saved: tuple[dict, ...]) -> None:
        self.table, self.parked, self.sizes, self.rows, self.stale = map(dict, saved)

    # -- new pages -----------------------------------------------------------------------------------------------
    def _put(self, slot: int, lane: int, first: int, end: int) -> None:
        for start, size in self._cover(first, end):
            page = self._new_id()
            self.sizes[page] = size
            self.table |= {(slot, lane, unit): page for unit in range(start, start + size)}

    def _replace(self, stretches: list[Stretch]) -> None:
        """Put pages of its own behind every unit: those parked there which have no others, or new ones."""
        owned = set(self.table.values())
        taken: dict[int, tuple[Stretch, int]] = {}
        gone: set[tuple[int, int, int]] = set()  # where a parked page has to go: slot, lane, page
        for stretch in stretches:
            unit = stretch.first
            while unit < stretch.end:
                page = self.parked.get((stretch.slot, stretch.lane, unit))
                stop = unit + (1 if page is None else self.sizes[page])
                if page is not None and page not in owned and page not in taken and stop <= stretch.end:
                    taken[page] = stretch, unit
                elif page is not None:
                    gone.add((stretch.slot, stretch.lane, page))
                unit = stop
        self._make_private(set(taken))
        self.parked = {key: page for key, page in self.parked.items() if (*key[:2], page) not in gone}
        for stretch in stretches:
            for unit in range(stretch.first, stretch.old):
                del self.table[stretch.slot, stretch.lane, unit]
            first = stretch.first
            for page, unit in [(page, unit) for page, (there, unit) in taken.items() if there == stretch]:
                self._put(stretch.slot, stretch.lane, first, unit)
                first = unit + self.sizes[page]
                self.table |= {(stretch.slot, stretch.lane, each): page for each in range(unit, first)}
            self._put(stretch.slot, stretch.lane, first, stretch.end)

    def unparked(self, keys: set[Unit]) -> None:
        """These parked pages were unmapped to be used elsewhere: the ones furthest from the start of their slot."""
        for key in keys:
            del self.parked[key]
        for slot, lane, index in keys:
            left = [other[2] for other in self.parked if other[:2] == (slot, lane)]
            assert index > max(left, default=-1), f"slot {slot} lost page {index}, but not a later one"

    def _to_replace(
        self, slot: int, start: int, end: int, owners: Counter[int], sole: set[int], grows: bool = True
    ) -> list[Stretch]:
        """Where pages go in place of none or of a shared one; ``owners`` is counted down for the latter.

        Those that become private as they are, for want of other owners, are added to ``sole``.
        """
        found = []
        for lane, row_bytes in enumerate(self.lane_row_bytes):
            num_private = -(-end * row_bytes // self.page_bytes)
            unit, stop = start * row_bytes // self.page_bytes, self._num_pages(lane, end)
            while unit < stop:
                page = self.table.get((slot, lane, unit))
                if page is None:  # and so it goes on
                    found.append(Stretch(slot, lane, unit, stop))
                    break
                first = unit - unit % self.sizes[page]
                unit = first + self.sizes[page]
                private = first < num_private or (grows and not self.masked)
                if private and owners[page] > 1:
                    owners[page] -= 1
                    needed = min(unit, self._num_pages(lane, max(end, self.rows[slot])))
                    found.append(Stretch(slot, lane, first, needed, unit))
                elif private:
                    sole.add(page)
        return found

    def _make_private(self, pages: set[int]) -> None:
        """These pages have one owner, and will be written to: nothing parked shows them any more."""
        self.parked = {key: page for key, page in self.parked.items() if page not in pages}

    def _take(self, targets: list[tuple[int, int, int]], grows: bool = True) -> None:
        """Make rows ``[start, end)`` of each (slot, start, end) backed and private, where the limit allows it."""
        while True:
            owners, sole = self._owners(), set[int]()
            stretches = [each for target in targets for each in self._to_replace(*target, owners, sole, grows)]
            if self._make_room(stretches):
                break
        self._replace(stretches)
        self._make_private(sole)

    def is_shared(self, slot: int, start: int, end: int) -> bool:
        """Whether a page under rows ``[start, end)`` has another owner too, or had one whose work may be under way."""
        owners = self._owners()
        owners.update(self._num_maps(self.parked))
        return any(
            owners[self.table.get((slot, lane, index))] > 1
            for lane, row_bytes in enumerate(self.lane_row_bytes)
            for index in range(start * row_bytes // self.page_bytes, -(-end * row_bytes // self.page_bytes))
        )

    def _wipe(self, slot: int) -> None:
        """What an older, longer self left is gone from the slot's own pages."""
        if slot in self.stale and not self.is_shared(slot, self.rows[slot], self.stale[slot]):
            del self.stale[slot]

    # -- pages that were cut -------------------------------------------------------------------------------------
    def kept(self) -> list[Kept]:
        """Pages that are nobody else's, of which sequences need the first units."""
        owners, found = self._owners(), []
        for slot, rows in sorted(self.rows.items()):
            for lane in range(len(self.lane_row_bytes)):
                end = self._num_pages(lane, rows)
                page = self.table.get((slot, lane, end))
                if page is not None and end % self.sizes[page] and owners[page] == 1:
                    first = end - end % self.sizes[page]
                    found.append(Kept(slot, lane, first, end, first + self.sizes[page]))
        return found

    def size_at(self, kept: Kept) -> int:
        return self.sizes[self.table[kept.slot, kept.lane, kept.first]]

    def split(self, kept: Kept) -> int:
        """Returns the page that was there."""
        for unit in range(kept.first, kept.old):
            page = self.table.pop((kept.slot, kept.lane, unit))
        self._put(kept.slot, kept.lane, kept.first, kept.end)
        return page

    def unsplit(self, kept: Kept, page: int) -> None:
        self.table |= {(kept.slot, kept.lane, unit): page for unit in range(kept.first, kept.old)}

    def _make_room(self, stretches: list[Stretch]) -> bool:
        """Whether there is room for these. If that might leave none to split a page that was kept, one has been."""
        asked, left, all_kept = sum(each.end - each.first for each in stretches), self._num_left(), self.kept()
        if asked and asked + max((kept.end - kept.first for kept in all_kept), default=0) > left:
            for kept in all_kept:
                if kept.end - kept.first <= left:
                    self.split(kept)
                    return False
        if asked > left:
            raise DoesNotFit
        return True

    def _split_where_cut(self, slot: int) -> list[tuple[Kept, int]]:
        done = []
        for kept in self.kept():
            left = self._num_left() - self._num_units(set(self.parked.values()) - set(self.table.values()))
            if kept.slot == slot and kept.end - kept.first <= left:
                done.append((kept, self.split(kept)))
        return done

    # -- operations ----------------------------------------------------------------------------------------------
    def ensure(self, requests: list[tuple[int, int]]) -> None:
        longer = [(slot, self.rows[slot], rows) for slot, rows in requests if rows > self.rows[slot]]
        # A page that was kept is no longer one for those who grow within it: they come before room is made for others.
        kept = {each.slot for each in self.kept()}
        within = [each for each in longer if each[0] in kept and self._is_within_pages(*each)]
        self.rows |= {slot: rows for slot, _, rows in within}
        try:
            self._take([each for each in longer if each not in within])
        except DoesNotFit:
            self.rows |= {slot: old for slot, old, _ in within}
            raise
        for slot, _, rows in longer:
            self._wipe(slot)
            self.rows[slot] = rows

    def _is_within_pages(self, slot: int, old: int, rows: int) -> bool:
        """Whether a sequence of ``old`` rows grows within the pages of its rows, all of them mapped here alone."""
        if slot in self.stale:
            return False
        maps = self._num_maps(self.table) + self._num_maps(self.parked)
        return all(
            self._end_of(old * row_bytes) >= rows * row_bytes
            and all(
                maps[self.table.get((slot, lane, unit))] == 1
                for unit in range(old * row_bytes // self.page_bytes, self._num_pages(lane, rows))
            )
            for lane, row_bytes in enumerate(self.lane_row_bytes)
        )

    def _end_of(self, num_bytes: int) -> int:
        """Where the page ends that the last of so many bytes lies in."""
        return -(-num_bytes // self.page_bytes) * self.page_bytes

    def make_writable(self, slot: int, start: int, end: int) -> None:
        if start < end:
            self._take([(slot, start, end)], grows=end >= self.rows[slot])
            self._wipe(slot)

    def step(self, slot: int) -> None:
        """Before a kernel runs that does not mask what it reads past the end, nothing stale may lie there."""
        rows = self.rows[slot]
        if slot in self.stale and rows:
            self._take([(slot, rows, rows)])
            self._wipe(slot)

    def fork(self, parent: int, child: int, rows: int) -> None:
        while True:
            own, shared = [], {}
            for lane, row_bytes in enumerate(self.lane_row_bytes):
                whole, unit = rows * row_bytes // self.page_bytes, 0
                while unit < whole and unit + self.sizes[self.table[parent, lane, unit]] <= whole:
                    page = self.table[parent, lane, unit]
                    shared |= {(child, lane, each): page for each in range(unit, unit + self.sizes[page])}
                    unit += self.sizes[page]
                own.append(Stretch(child, lane, unit, self._num_pages(lane, rows)))
            if self._make_room(own):
                break
        hidden = {(*key[:2], self.parked[key]) for key in shared.keys() & self.parked.keys()}
        self.parked = {key: page for key, page in self.parked.items() if (*key[:2], page) not in hidden}
        self._replace(own)
        self.table |= shared
        self.rows[child] = rows

    def truncate(self, slot: int, rows: int, in_step: bool = False) -> list[tuple[Kept, int]]:
        """Returns where a page was split, and which."""
        if not self.masked and rows < self.rows[slot]:
            self.stale[slot] = max(self.stale.get(slot, 0), self.rows[slot])
        self.rows[slot] = rows
        for key in [key for key in self.table if key[0] == slot]:
            if key[2] - key[2] % self.sizes[self.table[key]] >= self._num_pages(key[1], rows):
                del self.table[key]
        split = [] if in_step else self._split_where_cut(slot)
        if not in_step:
            self._wipe(slot)
        return split

    def release(self, slot: int) -> None:
        for key in [key for key in self.table if key[0] == slot]:
            self.parked[key] = self.table.pop(key)
        del self.rows[slot]
        self.stale.pop(slot, None)

    def expected_stats(self, bytes_per_token: int) -> dict[str, int]:
        owners = self._owners()
        row_bytes = sum(self.rows.values()) * bytes_per_token
        return {
            "in_use_bytes": self._num_units(set(owners)) * self.page_bytes,
            "mapped_bytes": (len(self.table) + len(self.parked)) * self.page_bytes,
            "parked_bytes": self._num_units(set(self.parked.values()) - owners.keys()) * self.page_bytes,
            "shared_bytes": self._num_units({page for page, maps in owners.items() if maps > 1}) * self.page_bytes,
            "row_bytes": row_bytes,
            "waste_bytes": len(self.table) * self.page_bytes - row_bytes,
            "num_live_slots": len(self.rows),
        }
