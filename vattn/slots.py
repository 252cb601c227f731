"""Which slot holds what, how long it is, and when its pages may go. Arguments are checked by ``kv_cache``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict

import numpy as np

from .backing import Backing
from .driver import Driver
from .errors import ConfigError, DriverError, OutOfPages
from .ordering import WorkTracker
from .page_table import Growth
from .stats import CacheStats
from .undo import Undo

FREE, LIVE, RETIRED = 0, 1, 2  # retired: released while a step is open on it, or its pages could not go yet


class Slots:
    """The slots of one cache. Guarded by the cache's lock.

    Attributes:
        state: per slot, FREE, LIVE or RETIRED.
        seq_len: per slot, rows backed on request.
        reach: per slot, rows that it can grow to without a driver call: mapped, private, and no one else's data.
    """

    def __init__(self, backing: Backing, driver: Driver, max_slots: int, max_seq_len: int) -> None:
        self.backing = backing
        self.table = backing.table
        self.driver = driver
        self.work = WorkTracker(driver)
        self.max_seq_len = max_seq_len
        self.state = np.zeros(max_slots, np.int8)
        self.seq_len = np.zeros(max_slots, np.int64)
        self.reach = np.zeros(max_slots, np.int64)
        # Where kernels do not mask what they read past the end: up to which row an older, longer self of a slot's
        # sequence may have left its data.
        self._stale_to: dict[int, int] = {}
        self.num_oom = 0
        self._to_shrink: set[int] = set()  # live slots with pages past their rows, to be taken later

    def with_state(self, state: int) -> list[int]:
        return np.flatnonzero(self.state == state).tolist()

    # -- taking and ending ---------------------------------------------------------------------------------------
    def find_free(self) -> int | None:
        """The lowest free slot; waits for retired ones only if there is no other."""
        free = np.flatnonzero(self.state == FREE)
        if not free.size and self.finish_deferred(wait=True):
            free = np.flatnonzero(self.state == FREE)
        return int(free[0]) if free.size else None

    def is_free(self, slot: int) -> bool:
        if self.state[slot] == RETIRED:
            self.finish_deferred(wait=True, slots=[slot])
        return bool(self.state[slot] == FREE)

    def start(self, slot: int) -> None:
        self.state[slot] = LIVE
        self.seq_len[slot] = self.reach[slot] = 0
        self._stale_to.pop(slot, None)

    def end(self, slot: int) -> None:
        self.refuse_capture("release")
        if self.work.is_open(slot):
            self.work.submitted([slot])
            self.state[slot] = RETIRED
            self._to_shrink.discard(slot)
        else:
            self._shrink_now(slot, 0)
            self.state[slot] = FREE
        self.seq_len[slot] = self.reach[slot] = 0

    # -- growing -------------------------------------------------------------------------------------------------
    def grow(self, requests: list[tuple[int, int]]) -> None:
        """Back the rows of (slot, seq_len) pairs, all or nothing; new rows private, old rows as they are."""
        slots = [slot for slot, _ in requests]
        old = self.seq_len[slots].tolist()
        targets = [(slot, start, end, start) for (slot, end), start in zip(requests, old, strict=True)]
        self._with_reclaim(self._try_grow, targets)
        ends = np.fromiter((end for _, end in requests), np.int64, len(requests))
        self.seq_len[slots] = ends
        if self._stale_to or self.table.over_read.tokens:
            self.reach[slots] = [self._reach_of(slot, end) for slot, end in requests]
        else:  # every page under these rows is private now, to its end
            self.reach[slots] = np.minimum(self.table.rows_of_whole_pages(ends), self.max_seq_len)

    def make_writable(self, slot: int, start: int, end: int) -> None:
        """Copy the shared pages under rows ``[start, end)``, whole as far as the sequence goes."""
        self._with_reclaim(self._try_grow, [(slot, start, end, int(self.seq_len[slot]))])

    def _try_grow(self, targets: list[tuple[int, int, int, int]]) -> None:
        growth = Growth()
        for slot, start, end, keep_rows in targets:
            self.table.growth(slot, start, end, keep_rows, growth)
        stale = [slot for slot, *_ in targets if slot in self._stale_to]
        if not growth.num_pages and not stale:
            return
        self.refuse_capture("mapping a page")
        for slot in growth.slots_with_shared:
            if self.work.is_open(slot):
                raise ConfigError(
                    f"rows of slot {slot} share a page with another sequence and need a private copy, which cannot be "
                    "made while a step is open on the slot: call ensure or make_writable before step"
                )
        if growth.slots_with_shared:
            for slot in growth.slots_with_shared:
                self.work.wait(slot)
            self.work.wait_for_current_stream()
        with self._transaction([slot for slot, *_ in targets]) as undo:
            submitted = self.table.grow(growth, undo)
            if stale:
                self.work.order_current_stream(stale)
                self._wipe(stale, undo)
                submitted = True
        self.table.note_growth(growth)
        if growth.shared:
            self.work.copied([slot for slot, *_ in targets])
        elif submitted:
            self.work.submitted([slot for slot, *_ in targets])

    def fork(self, parent: int, child: int, rows: int) -> None:
        """Make an empty live slot share the parent's first rows."""
        self.work.order_current_stream([parent])
        self._with_reclaim(self._try_alias, parent, child, rows)
        self.seq_len[child] = rows
        self._measure_reach(child)

    def _try_alias(self, parent: int, child: int, rows: int) -> None:
        with self._transaction([]) as undo:
            self.table.alias(parent, child, rows, undo)
        self.table.note_end(child, rows)
        # Whatever wrote the shared rows lies before this point of the current stream: the child's work on other streams
        # has to come after it, a copy or not.
        self.work.copied([parent, child])

    # -- giving back ---------------------------------------------------------------------------------------------
    def truncate(self, slot: int, rows: int) -> None:
        self.refuse_capture("truncate")
        if not self.table.over_read.masked and rows < self.seq_len[slot]:
            self._stale_to[slot] = max(self._stale_to.get(slot, 0), int(self.seq_len[slot]))
        if self.work.is_open(slot):
            self.work.submitted([slot])
            self.seq_len[slot] = self.reach[slot] = rows
            self._to_shrink.add(slot)
        else:
            self._shrink_now(slot, rows)
            self.seq_len[slot] = self.reach[slot] = rows  # measured below, once all is done
            with suppress(DriverError):  # tried again before the next kernel reads there
                self.wipe_stale([slot])
        self._measure_reach(slot)

    def wipe_stale(self, slots: Iterable[int]) -> None:
        """Wipe what older, longer selves of sequences left where kernels read past the end and do not mask it."""
        stale = [slot for slot in slots if slot in self._stale_to]
        if stale:
            self.work.order_current_stream(stale)
            with self._transaction([]) as undo:
                self._wipe(stale, undo)
            self.work.submitted(stale)

    def clean_over_read(self, slots: Iterable[int]) -> None:
        """Before kernels run that do not mask what they read past the end: nothing of a longer self may lie there.

        Pages that others share are copied, but for slots on which another step is open already.
        """
        stale = [slot for slot in slots if slot in self._stale_to and not self.work.is_open(slot)]
        if stale:
            rows = self.seq_len[stale].tolist()
            self._with_reclaim(self._try_grow, [(slot, n, n, n) for slot, n in zip(stale, rows, strict=True) if n])

    def _wipe(self, stale: list[int], undo: Undo) -> None:
        for slot in stale:
            rows, longest = int(self.seq_len[slot]), self._stale_to[slot]
            if longest <= rows or self.table.wipe(slot, rows, longest, undo):
                del self._stale_to[slot]

    def _measure_reach(self, slot: int) -> None:
        self.reach[slot] = self._reach_of(slot, int(self.seq_len[slot]))

    def _reach_of(self, slot: int, rows: int) -> int:
        if slot in self._stale_to:
            return rows  # growing has to wipe first
        reach = self.table.private_rows(slot, rows) - self.table.over_read.tokens
        return max(rows, min(reach, self.max_seq_len))

    def _shrink_now(self, slot: int, rows: int, deferred: bool = False) -> None:
        if self.table.has_pages_past(slot, rows):
            self.refuse_capture("unmapping a page")
            self.work.wait(slot)
            if not deferred:  # else a fence was set when the caller asked for it
                self.work.wait_for_current_stream()
            with self._transaction([slot]) as undo:
                taken = self.table.shrink(slot, rows, undo)
            self.table.finish_shrink(slot, rows, taken)
        self._to_shrink.discard(slot)

    def finish_deferred(self, wait: bool, slots: Iterable[int] | None = None) -> bool:
        """Take the pages of slots that were released or cut short inside a step, where that step's work has ended.

        Args:
            wait: block for work that was submitted (never for a step that is still open), and raise what fails; else
                leave for later whatever cannot be done at once.
            slots: only these, which are retired or wait to be shrunk.

        Returns:
            Whether anything was taken.
        """
        found = False
        if not wait and self.driver.is_capturing():
            return found
        for slot in (*self.with_state(RETIRED), *tuple(self._to_shrink)) if slots is None else slots:
            if self.work.is_open(slot) or not (wait or self.work.done(slot)):
                continue
            try:
                self._shrink_now(slot, int(self.seq_len[slot]), deferred=True)
            except DriverError:
                if wait:
                    raise
                continue
            if self.state[slot] == RETIRED:
                self.state[slot] = FREE
            else:
                self._measure_reach(slot)
            found = True
        return found

    # -- all or nothing ------------------------------------------------------------------------------------------
    def _with_reclaim(self, attempt: Callable[..., None], *arguments: object) -> None:
        """Run ``attempt``; out of pages, run it once more if pages could be had from released or truncated slots."""
        try:
            self.backing.clear_strays()
            try:
                attempt(*arguments)
            except OutOfPages:
                if not self.finish_deferred(wait=True):
                    raise
                attempt(*arguments)
        except OutOfPages:
            self.num_oom += 1
            raise
        except DriverError as error:
            if not error.out_of_memory:
                raise
            self.num_oom += 1
            pool = self.backing.pool
            raise OutOfPages(
                f"the system ran out of what mapping pages takes: {error}; {pool.physical_bytes} bytes are taken, "
                f"memory_limit is {pool.limit_bytes} bytes",
                free_bytes=pool.num_available * pool.page_bytes,
                limit_bytes=pool.limit_bytes,
            ) from error

    def _transaction(self, slots: Iterable[int]) -> Undo:
        return Undo(lambda: self._resync(slots))

    def _resync(self, slots: Iterable[int]) -> None:
        """After an undo that failed itself: cut the sequences to the rows that are still backed."""
        for slot in slots:
            over_read = self.table.over_read
            if not over_read.masked:
                self._stale_to[slot] = int(self.seq_len[slot]) + over_read.tokens
            readable = self.table.backed_rows(slot) - over_read.tokens
            self.seq_len[slot] = self.reach[slot] = max(0, min(int(self.seq_len[slot]), readable))
            if self.state[slot] == LIVE:
                self._to_shrink.add(slot)

    def refuse_capture(self, what: str) -> None:
        if self.driver.is_capturing():
            raise ConfigError(
                f"{what} cannot be part of a graph: call ensure, fork, truncate and release before capture"
            )

    # -- looking -------------------------------------------------------------------------------------------------
    def stats(self, bytes_per_token: int) -> CacheStats:
        """Counts and bytes, as ``CacheStats`` defines them."""
        backing, pool, counts = self.backing, self.backing.pool, self.driver.counts
        page_bytes = pool.page_bytes
        # Mappings that no live sequence stands behind: retired slots', and what failed undos left.
        ownerless = Counter(page for _, page in backing.stray_pages())
        for slot in self.with_state(RETIRED):
            ownerless.update(page for _, page in self.table.pages_of(slot))
        num_parked = sum(1 for page, maps in ownerless.items() if maps == len(page.maps))
        num_shared = pool.num_shared - sum(
            1 for page, maps in ownerless.items() if len(page.maps) - maps < 2 and page.shared
        )
        live = self.state == LIVE
        row_bytes = int(self.seq_len[live].sum()) * bytes_per_token
        return CacheStats(
            reserved_bytes=backing.reserved_bytes,
            physical_bytes=pool.physical_bytes,
            mapped_bytes=backing.num_mapped * page_bytes,
            in_use_bytes=(len(pool.pages) - len(pool.free) - num_parked) * page_bytes,
            parked_bytes=num_parked * page_bytes,
            free_bytes=len(pool.free) * page_bytes,
            index_bytes=0,
            shared_bytes=num_shared * page_bytes,
            row_bytes=row_bytes,
            waste_bytes=(backing.num_mapped - ownerless.total()) * page_bytes - row_bytes,
            peak_physical_bytes=pool.peak_pages * page_bytes,
            memory_limit_bytes=pool.limit_bytes,
            page_bytes=page_bytes,
            num_live_slots=int(live.sum()),
            **asdict(counts),
            num_oom=self.num_oom,
        )

    def check_integrity(self) -> None:
        """Every slot has the pages that its rows need, and a free one has none."""
        backing = self.backing
        backing.check_integrity()
        assert all(self.state[slot] == LIVE for slot in self._to_shrink), "a slot that is not live waits to be shrunk"
        for slot, state in enumerate(self.state.tolist()):
            rows, reach = int(self.seq_len[slot]), int(self.reach[slot])
            assert 0 <= rows <= reach <= self.max_seq_len, f"slot {slot}: {rows} rows, reach {reach}"
            if state == LIVE:
                readable = reach + self.table.over_read.tokens if reach else 0
                assert self.table.backed_rows(slot) >= readable, f"slot {slot} lacks pages for its rows"
                assert self.table.private_rows(slot, rows) >= reach, f"slot {slot} would write into a shared page"
                waits = slot in self._to_shrink
                assert waits or not self.table.has_pages_past(slot, reach), f"slot {slot} keeps pages past its rows"
            else:
                assert rows == 0, f"slot {slot} is not live, yet has rows"
                assert state == RETIRED or not self.table.has_pages_past(slot, 0), f"free slot {slot} has pages"
