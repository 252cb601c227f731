"""Which slot holds what, how long it is, and when its pages may go. Arguments are checked by ``kv_cache``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import numpy as np

from ..driver import Driver
from ..errors import ConfigError, DriverError, OutOfPages, VattnError
from .backing import Backing
from .lock import Turns
from .plans import Growth, Plan, Sharing
from .undo import Undo
from .work import WorkTracker

FREE, LIVE, RETIRED = 0, 1, 2  # retired: released while a step is open on it

_Plan = TypeVar("_Plan", bound=Plan)


class Slots:
    """The slots of one cache. Guarded by the cache's lock.

    Attributes:
        state: per slot, FREE, LIVE or RETIRED.
        seq_len: per slot, rows backed on request.
        reach: per slot, rows that it can grow to without a driver call: mapped, private, and no one else's data.
        to_shrink: live slots with pages past their rows, to be taken later.
        marks: per slot, scratch to find one that is named twice.
    """

    def __init__(self, backing: Backing, driver: Driver, max_slots: int, max_seq_len: int, turns: Turns) -> None:
        self.backing = backing
        self.table = backing.table
        self.parking = backing.table.parking
        self.driver = driver
        self.turns = turns
        self.work = WorkTracker(driver, max_slots, turns)
        self._num_started = np.zeros(max_slots, np.int64)
        self._num_cut = np.zeros(max_slots, np.int64)  # how often rows were taken from a sequence
        turns.snapshot = self._num_started.copy
        self.max_slots, self.max_seq_len = max_slots, max_seq_len
        self.marks = np.zeros(max_slots, np.int64)
        self.state = np.zeros(max_slots, np.int8)
        self.seq_len = np.zeros(max_slots, np.int64)
        self.reach = np.zeros(max_slots, np.int64)
        # Where kernels do not mask what they read past the end: up to which row an older, longer self of a slot's
        # sequence may have left its data.
        self._stale_to: dict[int, int] = {}
        self.num_oom = 0
        self.to_shrink: set[int] = set()

    def changed_hands(self, slots: int | np.ndarray) -> bool | np.ndarray:
        """Whether other sequences are in the slots than when this call left its first turn to wait for the GPU."""
        before = None if self.turns.turn is None else self.turns.turn.before
        return False if before is None else before[slots] != self._num_started[slots]

    def version_of(self, slots: np.ndarray) -> np.ndarray:
        """Per slot, a number that never comes again once its sequence has ended or lost rows; -1 where none is."""
        return np.where(self.state[slots] == LIVE, self._num_started[slots] + self._num_cut[slots], -1)

    def with_state(self, state: int) -> list[int]:
        return np.flatnonzero(self.state == state).tolist()

    # -- taking and ending ---------------------------------------------------------------------------------------
    def find_free(self, expect_len: int | None = None, to_share: bool = False) -> int | None:
        """The free slot that fits best: with the most parked pages that so many rows (None: any number) can use, then
        with the fewest others, then the lowest; for shared pages, which are mapped anew, that with the fewest."""
        self._park_retired()
        free = np.flatnonzero(self.state == FREE)
        if not free.size:
            return None
        if to_share:
            return self.parking.emptiest(free)
        return self.parking.best_fit(free, self.table.num_pages(expect_len or self.max_seq_len))

    def is_free(self, slot: int) -> bool:
        self._park_retired()
        return bool(self.state[slot] == FREE)

    def start(self, slot: int) -> None:
        self.state[slot] = LIVE
        self._num_started[slot] += 1
        self.seq_len[slot] = self.reach[slot] = 0
        self._stale_to.pop(slot, None)

    def end(self, slot: int) -> None:
        """End a sequence; its pages stay mapped, for the next one in the slot or until they are needed elsewhere."""
        self.refuse_capture("release")
        self.work.submitted([slot])
        self.to_shrink.discard(slot)
        self.seq_len[slot] = self.reach[slot] = 0
        self.state[slot] = RETIRED
        self._park_retired()

    def _park_retired(self) -> None:
        for slot in self.with_state(RETIRED):
            if not self.work.is_open(slot):
                self.parking.park(slot, self.work.epoch(slot))
                self.state[slot] = FREE

    # -- growing -------------------------------------------------------------------------------------------------
    def grow(self, requests: list[tuple[int, int]], wait: bool = True) -> None:
        """Back the rows of (slot, seq_len) pairs, all or nothing; new rows private, old rows as they are.

        Args:
            wait: whether the host may wait for the GPU to be done with pages.
        """
        old = self.seq_len
        targets = [(slot, start := int(old[slot]), end, start) for slot, end in requests]
        self._with_room(partial(self._plan_growth, targets), partial(self._grow, targets), wait)
        look = self._stale_to or self.table.over_read.tokens
        for slot, end in requests:
            self.seq_len[slot] = end
            if look:
                self.reach[slot] = self._reach_of(slot, end)
            else:  # every page under these rows is private now, to its end
                self.reach[slot] = self.table.rows_of_whole_pages(end, self.max_seq_len)

    def make_writable(self, slot: int, start: int, end: int) -> None:
        """Copy the shared pages under rows ``[start, end)``, whole as far as the sequence goes."""
        targets = [(slot, start, end, int(self.seq_len[slot]))]
        self._with_room(partial(self._plan_growth, targets), partial(self._grow, targets))

    def _plan_growth(self, targets: list[tuple[int, int, int, int]]) -> Growth | None:
        """What backs rows ``[start, end)`` of (slot, start, end, rows to keep); None if that is nothing."""
        growth = Growth()
        for slot, start, end, keep_rows in targets:
            self.table.growth(slot, start, end, keep_rows, growth)
        stale = any(slot in self._stale_to for slot, *_ in targets)
        if not (growth.num_pages or growth.adopted or growth.unparked or stale):
            return None
        self.refuse_capture("mapping a page")
        for slot in growth.slots_with_shared:
            if self.work.is_open(slot):
                raise ConfigError(
                    f"rows of slot {slot} share a page with another sequence and need a private copy, which cannot be "
                    "made while a step is open on the slot: call ensure or make_writable before step"
                )
        return growth

    def _grow(self, targets: list[tuple[int, int, int, int]], growth: Growth) -> None:
        if growth.slots_with_shared:
            self.work.wait(list(growth.slots_with_shared), current_stream=True)
        self._await_epochs(growth)
        stale = [slot for slot, *_ in targets if slot in self._stale_to]
        with self._transaction([slot for slot, *_ in targets]) as undo:
            submitted = self.table.grow(growth, undo)
            if stale:
                self.work.order_current_stream(stale)
                self._wipe(stale, undo)
                submitted = True
        self.table.note_growth(growth)
        if submitted:
            self.work.submitted([*(slot for slot, *_ in targets), *growth.slots_read])

    def fork(self, parent: int, child: int, rows: int) -> None:
        """Begin a sequence in a free slot that shares the parent's first rows."""
        self.work.order_current_stream([parent])
        self._with_room(partial(self.table.sharing, parent, child, rows), partial(self._share, parent, child, rows))
        self.start(child)
        self.seq_len[child] = rows
        self._measure_reach(child)

    def _share(self, parent: int, child: int, rows: int, plan: Sharing) -> None:
        self._await_epochs(plan)
        with self._transaction([]) as undo:
            self.table.share(plan, undo)
        self.table.note_sharing(child, rows, plan)
        # Whatever wrote the shared rows lies before this point of the current stream: the child's work on other streams
        # has to come after it, a copy or not.
        self.work.submitted([parent, child, *plan.slots_read])

    def _await_epochs(self, plan: Plan) -> None:
        """Parked pages are unmapped when the work that used them has ended, and scrubbed behind it."""
        self.turns.wait_for(self.parking.epoch(plan.slots_unparked))
        self.work.order_behind(self.parking.epochs[slot] for slot in plan.slots_adopting)

    # -- giving back ---------------------------------------------------------------------------------------------
    def truncate(self, slot: int, rows: int) -> None:
        self.refuse_capture("truncate")
        if not self.table.over_read.masked and rows < self.seq_len[slot]:
            self._stale_to[slot] = max(self._stale_to.get(slot, 0), int(self.seq_len[slot]))
        if self.work.is_open(slot):
            self.work.submitted([slot])
            self._cut_to(slot, rows)
            self.to_shrink.add(slot)
        else:
            self._shrink_now(slot, rows)
            self._cut_to(slot, rows)  # reach is measured below, once all is done
            with suppress(DriverError):  # tried again before the next kernel reads there
                self.wipe_stale([slot])
        self._measure_reach(slot)

    def _cut_to(self, slot: int, rows: int) -> None:
        self._num_cut[slot] += rows < self.seq_len[slot]
        self.seq_len[slot] = self.reach[slot] = rows

    def wipe_stale(self, slots: Iterable[int]) -> None:
        """Wipe what older, longer selves of sequences left where kernels read past the end and do not mask it."""
        stale = [slot for slot in slots if slot in self._stale_to]
        if stale:
            self.work.order_current_stream(stale)
            with self._transaction([]) as undo:
                self._wipe(stale, undo)
            self.work.submitted(stale)

    def clean_over_read(self, slots: np.ndarray) -> None:
        """Before kernels run that do not mask what they read past the end: nothing of a longer self may lie there.

        Pages that others share are copied, but for slots on which another step is open already.
        """
        if not self._stale_to:
            return
        stale = [slot for slot in slots.tolist() if slot in self._stale_to and not self.work.is_open(slot)]
        if stale:
            rows = self.seq_len[stale].tolist()
            targets = [(slot, n, n, n) for slot, n in zip(stale, rows, strict=True) if n]
            self._with_room(partial(self._plan_growth, targets), partial(self._grow, targets))

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
            self.work.wait([slot], current_stream=not deferred)  # then a fence was set when the caller asked for it
            with self._transaction([slot]) as undo:
                taken = self.table.shrink(slot, rows, undo)
            self.table.finish_shrink(slot, rows, taken)
        self.to_shrink.discard(slot)

    def finish_deferred(self, wait: bool) -> bool:
        """Do what had to be left while steps were open: park slots that were released, and take the pages of sequences
        that were cut short, where the work on them has ended.

        Args:
            wait: block for work that was submitted (never for a step that is still open), and raise what fails; else
                leave for later whatever cannot be done at once.

        Returns:
            Whether a sequence that was cut short is done with, so that there may be pages.
        """
        self._park_retired()
        found = False
        if not wait and self.driver.is_capturing():
            return found
        for slot in tuple(self.to_shrink):
            if self.work.is_open(slot) or not (wait or self.work.done(slot)):
                continue
            try:
                self._shrink_now(slot, int(self.seq_len[slot]), deferred=True)
            except DriverError:
                if wait:
                    raise
                continue
            self._measure_reach(slot)
            found = True
        return found

    def unpark(self, count: int, sparing: Iterable[int] = (), wait: bool = True) -> bool:
        """Unmap parked pages until ``count`` more are free or none is left. Returns whether any was unmapped.

        From the end of a slot's pages to its start, and one slot after another: first those where the host need not
        wait for work to end, then (if it may ``wait``) the others, last those of ``sparing``; among equals the one
        released least recently.
        """
        free, sparing = self.backing.pool.free, set(sparing)
        target = len(free) + count
        found = False
        for busy, spared in ((False, False), (True, False), (True, True)) if wait else ((False, False), (False, True)):
            for slot, epoch in tuple(self.parking.epochs.items()):
                if len(free) >= target:
                    return found
                if (slot in sparing) != spared or not (busy or epoch.done()):
                    continue
                self.turns.wait_for(epoch, progress=found)
                while len(free) < target and slot in self.parking.epochs:
                    with Undo() as undo:
                        taken, tops = self.parking.unpark(slot, target - len(free), undo)
                    self.parking.finish_unpark(slot, taken, tops)
                    found |= bool(taken)
        return found

    # -- all or nothing ------------------------------------------------------------------------------------------
    def _with_room(
        self, plan: Callable[[], _Plan | None], carry_out: Callable[[_Plan], None], wait: bool = True
    ) -> None:
        """Carry out what ``plan`` says, which touches nothing; where pages are short, make room and plan again."""
        pool = self.backing.pool
        try:
            self.backing.clear_strays()
            while (work := plan()) is not None:
                if not (wait or all(self.parking.epochs[slot].done() for slot in work.slots_unparked)):
                    raise pool.out_of_pages(work.num_pages, "of which some are still in use by the GPU")
                if work.num_pages > pool.num_available:
                    self._make_room(work, wait)
                    continue
                try:
                    return carry_out(work)
                except OutOfPages as error:  # not the limit: the device has less
                    missing = work.num_pages - len(pool.free)
                    if _is_half_undone(error) or not (
                        self.finish_deferred(wait) or self.unpark(missing, work.slots_adopting, wait)
                    ):
                        raise
                except DriverError as error:  # the tables that the system keeps of mappings, parked ones too
                    if _is_half_undone(error) or not error.out_of_memory or not self.unpark(len(pool.pages), (), wait):
                        raise
        except OutOfPages as error:
            if _is_half_undone(error):  # callers go on after a shortage: this is none any more
                fault = DriverError("undo", "INCOMPLETE", f"rows are lost, for this could not be undone: {error}")
                fault.undo_incomplete = True  # type: ignore[attr-defined]
                raise _with_notes(fault, error) from error
            self.num_oom += wait
            raise
        except DriverError as error:
            if not error.out_of_memory or _is_half_undone(error):
                raise
            self.num_oom += wait
            out = OutOfPages(
                f"the system ran out of what mapping pages takes: {error}; {pool.physical_bytes} bytes are taken, "
                f"memory_limit is {pool.limit_bytes} bytes",
                free_bytes=pool.num_available * pool.page_bytes,
                limit_bytes=pool.limit_bytes,
            )
            raise _with_notes(out, error) from error

    def _make_room(self, work: Plan, wait: bool) -> None:
        """More pages for ``work`` than the limit allows now. What would not suffice is left as it is: OutOfPages."""
        pool = self.backing.pool
        if self.finish_deferred(wait):
            return
        asked = work.num_pages + len(work.adopted)
        if not self.parking.has_pages(asked - pool.num_available):
            raise pool.out_of_pages(asked, "which memory_limit does not allow", self.parking.num_pages())
        if not self.unpark(work.num_pages - pool.num_available, work.slots_adopting, wait) and not wait:
            raise pool.out_of_pages(asked, "of which some are still in use by the GPU")

    def _transaction(self, slots: Iterable[int]) -> Undo:
        return Undo(lambda: self._resync(slots))

    def _resync(self, slots: Iterable[int]) -> None:
        """After an undo that failed itself: cut the sequences to the rows that are still backed."""
        for slot in slots:
            over_read = self.table.over_read
            if not over_read.masked:
                self._stale_to[slot] = int(self.seq_len[slot]) + over_read.tokens
            readable = self.table.backed_rows(slot) - over_read.tokens
            self._cut_to(slot, max(0, min(int(self.seq_len[slot]), readable)))
            if self.state[slot] == LIVE:
                self.to_shrink.add(slot)

    def refuse_capture(self, what: str) -> None:
        if self.driver.is_capturing():
            raise ConfigError(
                f"{what} cannot be part of a graph: call ensure, fork, truncate and release before capture"
            )


def _with_notes(error: VattnError, cause: VattnError) -> VattnError:
    for note in getattr(cause, "__notes__", ()):
        error.add_note(note)
    return error


def _is_half_undone(error: BaseException) -> bool:
    """Whether rows may be gone that the operation was planned with: it must not be tried again."""
    return getattr(error, "undo_incomplete", False)
