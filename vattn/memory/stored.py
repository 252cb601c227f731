"""Slots between two sequences: how one ends, and is stored; how the next begins; and whose pages go in the meantime.

A stored sequence has ended and stays in its slot, until somebody needs the slot or the pages. It is nobody's. Its slot
counts as free, and its pages as memory that can be had. But its rows stay as they are meanwhile, so that a new sequence
can begin with them: as a fork, which shares the whole pages, or in the very slot (``resume``), which takes no driver
call.

Rows go from the end of the sequence that was used least recently. They are parked by that, so that unmapping them, the
waiting and the undoing included, is what it is for parked pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from heapq import merge

import numpy as np

from ..arguments import require_int
from ..driver import Driver
from ..errors import ConfigError, OutOfSlots
from .backing import Backing
from .lock import FairLock
from .pages import Page
from .reservation import LanePages
from .slot_states import FREE, LIVE, RETIRED, STORED, SlotStates
from .work import WorkTracker


class StoredSequences(SlotStates):
    """The part of ``Slots`` from where a sequence ends to where the next one in its slot begins.

    Attributes:
        backing: what the cache owns of the driver; and its pool, table and parking.
        work: which work may still touch a slot's pages.
        stale_to: where kernels do not mask what they read past the end: up to which row an older, longer self of a
            slot's sequence may have left its data.
        kept_rows: of sequences that have ended, rows to store.
        to_shrink: live slots with pages past their rows, to be taken later.
    """

    def __init__(self, backing: Backing, driver: Driver, max_slots: int, max_seq_len: int, lock: FairLock) -> None:
        super().__init__(driver, max_slots, max_seq_len, lock)
        self.backing, self.pool = backing, backing.pool
        self.table = backing.table
        self.parking = backing.table.parking
        self.work = WorkTracker(driver, max_slots, lock)
        if backing.guard is not None:
            backing.guard.hold = partial(self.work.hold, range(max_slots))
        self.stale_to: dict[int, int] = {}
        self.to_shrink: set[int] = set()
        self.kept_rows = np.zeros(max_slots, np.int64)
        self._used, self._num_uses = np.zeros(max_slots, np.int64), 0  # per slot, the number of its last use
        self._floor = (-1, 0)  # (slot, rows) that an operation is reading

    # -- ending ---------------------------------------------------------------------------------------------------
    def end(self, slot: int, keep: int = 0) -> None:
        """End a sequence, and store its first rows; its other pages stay mapped, for the next one in the slot or until
        they are needed elsewhere."""
        self.refuse_capture("release")
        self.work.submitted([slot])
        self.to_shrink.discard(slot)
        self.table.disown(slot)  # statistics do not count its pages as in use, even if a step keeps them for a while
        self.note_stale(slot)
        self.kept_rows[slot] = keep
        self.seq_len[slot] = self.reach[slot] = 0
        self.state[slot] = RETIRED
        self.park_retired()

    def park_retired(self) -> None:
        """Of sequences that have ended, where no step is open any more: store the rows to keep, and park the pages."""
        for slot in self.with_state(RETIRED):
            if self.work.is_open(slot):
                continue
            rows = int(self.kept_rows[slot])
            self.parking.park(slot, self.work.fences(slot), rows)
            if rows:
                self.seq_len[slot] = self.reach[slot] = rows
                self.pool.store(self.table.owned([slot]))
                self.use(slot)
            self.state[slot] = STORED if rows else FREE

    def use(self, slot: int) -> None:
        """It is the one that was used last."""
        self._num_uses += 1
        self._used[slot] = self._num_uses

    def note_stale(self, slot: int) -> None:
        """The slot's sequence ends or gets shorter: its rows may be read past the end of what comes after it."""
        if not self.table.over_read.masked:
            self.stale_to[slot] = max(self.stale_to.get(slot, 0), int(self.seq_len[slot]))

    def note_pages_past(self, slot: int, rows: int) -> None:
        """A live sequence has so many rows now, and may have pages past them."""
        if self.table.has_pages_past(slot, rows):
            self.to_shrink.add(slot)
        else:
            self.to_shrink.discard(slot)

    # -- looking --------------------------------------------------------------------------------------------------
    def stored_versions(self) -> np.ndarray:
        """Per slot, the version that its stored sequence had before it ended; -1 where none is."""
        self.park_retired()  # a step may have been left during the turn before, which did not come to it
        return np.where(self.state == STORED, self.generation + self.num_cut, -1)

    def stored_rows(self) -> np.ndarray:
        """Per slot, rows that its stored sequence has left; 0 where none is."""
        return np.where(self.state == STORED, self.seq_len, 0)

    def is_stored(self, slot: int, version: int) -> bool:
        """Whether the slot has a stored sequence, of this version."""
        return bool(self.stored_versions()[slot] == version and self.state[slot] == STORED)  # -1 is no version

    def require_stored(self, slot: int, version: int, rows: int) -> int:
        """The slot's number; ConfigError unless its stored sequence is of this version and has so many rows."""
        slot = self.number(slot)
        if not self.is_stored(slot, version):
            raise ConfigError(f"slot {slot} has no stored sequence of version {version}, or not any more")
        if not 0 < require_int("seq_len", rows, 0) <= self.seq_len[slot]:
            raise ConfigError(f"the stored sequence of slot {slot} has {self.seq_len[slot]} rows left, got {rows}")
        return slot

    def parent(self, slot: int, rows: int | None, version: int | None) -> tuple[int, int]:
        """What can be forked: (slot, rows) of a live sequence, or of a stored one whose version is given.

        Raises:
            ConfigError: there is no such sequence, or it has fewer rows.
        """
        slot = self.number(slot)
        self.park_retired()
        if version is not None and self.state[slot] == STORED:
            rows = int(self.seq_len[slot]) if rows is None else rows
            return self.require_stored(slot, version, rows), rows
        self.all_live([slot], None if version is None else [version])
        return slot, self.rows_of(slot, self.seq_len[slot] if rows is None else rows, "fork")

    def least_recent(self, besides: int = -1) -> int | None:
        """The slot of the stored sequence that was used least recently."""
        slots = self._by_use()
        return next((slot for slot in slots if slot != besides), None)

    def num_reclaimable(self, enough: int) -> int:
        """Pages that could be made free, as all their mappings are parked or stored; looks no further than for
        ``enough`` of them."""
        pool = self.pool
        if pool.num_pages - pool.num_free - pool.num_owned < enough:  # steps may even keep some of these
            stored: list[int] = []
        else:
            stored = self._by_use()
        return self.parking.num_pages(enough, (page for slot in stored for _, page in self._tail(slot)))

    @contextmanager
    def reading(self, slot: int, rows: int) -> Iterator[None]:
        """Inside, the slot's first rows stay stored, if they are."""
        self._floor = slot, rows
        try:
            yield
        finally:
            self._floor = -1, 0

    # -- the next sequence ----------------------------------------------------------------------------------------
    def find_free(self, slot: int | None, expect_len: int | None = None, parent: int = -1) -> int:
        """A free slot: the one named, or that which fits best. What is stored there is given up.

        That is the one with the most parked pages that ``expect_len`` rows (None: any number) can use, then with the
        fewest others, then the lowest; to fork a ``parent``, whose pages are mapped anew, that with the fewest parked
        ones. Where none is free, or pages are so short that stored ones have to go anyway: that of the sequence stored
        and not used for longest.

        Raises:
            OutOfSlots: it has a sequence, or all have.
        """
        self.park_retired()
        if slot is not None:
            slot = self.number(slot)
            if self.state[slot] not in (FREE, STORED) or slot == parent:
                raise OutOfSlots(f"slot {slot} belongs to a sequence; release it first, or take another")
        else:
            free = np.flatnonzero(self.state == FREE)
            is_short = parent < 0 and expect_len is not None and self._takes_stored_pages(expect_len)
            stored = None if free.size and not is_short else self.least_recent(besides=parent)
            if stored is not None:
                slot = stored
            elif not free.size:
                raise OutOfSlots(f"all {self.max_slots} slots belong to sequences; release one, or raise max_slots")
            elif parent >= 0:
                slot = self.parking.emptiest(free)
            else:
                slot = self.parking.best_fit(free, self.table.num_pages(expect_len or self.max_seq_len))
        if self.state[slot] == STORED:
            self.drop(slot)
        return slot

    def _takes_stored_pages(self, rows: int) -> bool:
        """Whether there are too few free and parked pages for a sequence of so many rows."""
        pool = self.pool
        return sum(self.table.num_pages(rows)) > pool.num_pages - pool.num_owned - pool.num_index + pool.num_creatable

    def start(self, slot: int) -> None:
        """Begin an empty sequence in a free slot."""
        self.generation[slot] += 1  # before a step can be entered
        self.state[slot] = LIVE
        self.seq_len[slot] = self.reach[slot] = 0
        self.stale_to.pop(slot, None)

    def resume(self, slot: int, rows: int) -> None:
        """Make a stored sequence, cut to its first rows, the slot's live one."""
        self._cut_stored(slot, rows)
        pages = self.table.owned([slot])
        self.pool.unstore(pages)
        self.pool.gain(pages)
        self.note_pages_past(slot, rows)
        self.generation[slot] += 1  # before a step can be entered
        self.state[slot] = LIVE

    # -- giving up ------------------------------------------------------------------------------------------------
    def drop(self, slot: int) -> None:
        """Give a stored sequence up: its slot is free, and its pages are parked there."""
        self._cut_stored(slot, 0)
        self.state[slot] = FREE

    def drop_all_stored(self, slots: Iterable[int]) -> bool:
        """Give up the stored ones of these sequences. Returns whether there were any."""
        found = [slot for slot in slots if self.state[slot] == STORED]
        for slot in found:
            self.drop(slot)
        return bool(found)

    def unpark(self, count: int, sparing: Iterable[int] = (), wait: bool = True) -> bool:
        """Unmap parked pages, then those of stored sequences, last those parked in the slots of ``sparing``, until
        ``count`` more are free or none is left. Returns whether any was unmapped."""
        pool, wait_for = self.pool, self.lock.wait_for if wait else None
        target, sparing = pool.num_free + count, set(sparing)
        found = self.parking.reclaim(count, wait_for, sparing)
        while pool.num_free < target and self.give_up(target - pool.num_free, wait):
            found |= self.parking.reclaim(target - pool.num_free, wait_for, sparing)
        if sparing:
            found |= self.parking.reclaim(target - pool.num_free, wait_for, ())
        return found

    def give_up(self, count: int, wait: bool) -> bool:
        """Park the last pages of the stored sequence that was used least recently, of those that have any which no
        live sequence has: about ``count`` of these. Returns whether there was one.

        Args:
            wait: False: only of sequences whose work has ended.
        """
        for slot in self._by_use():
            if not (wait or self.work.done(slot)):
                continue
            rows, found = -1, 0
            for fewer, page in self._tail(slot):
                if not page.owners:
                    rows, found = fewer, found + page.size
                    if found >= count:
                        break
            if found:
                self._cut_stored(slot, rows)
                if not self.seq_len[slot]:
                    self.state[slot] = FREE
                return True
        return False

    def _by_use(self) -> list[int]:
        slots = np.flatnonzero(self.state == STORED)
        return slots[self._used[slots].argsort()].tolist()

    def _tail(self, slot: int) -> Iterator[tuple[int, Page]]:
        """(rows that do without it, page) of a stored sequence's pages that could be given up, the last ones first."""
        first = self._floor[1] if slot == self._floor[0] else 0
        lanes = (self._tail_of(slot, lane, first) for lane in self.table.lanes)
        return merge(*lanes, key=lambda each: -each[0])

    def _tail_of(self, slot: int, lane: LanePages, rows: int) -> Iterator[tuple[int, Page]]:
        over_read, kept = self.table.over_read.tokens, lane.end_of(slot, lane.num_pages(rows))
        for number, _, page in reversed(list(lane.walk(slot, kept, lane.ends[slot]))):
            if page is not None:
                yield max(0, number * lane.page_bytes // lane.row_bytes - over_read), page

    def _cut_stored(self, slot: int, rows: int) -> None:
        """Park what lies behind a stored sequence's first rows."""
        if rows < self.seq_len[slot]:
            self.note_stale(slot)
        self.pool.unstore([page for lane in self.table.lanes for _, page in self._tail_of(slot, lane, rows)])
        self.parking.park(slot, self.work.fences(slot), rows)
        self.seq_len[slot] = self.reach[slot] = rows
