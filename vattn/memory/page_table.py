"""Which pages stand behind which rows of a slot: growing, sharing, copying on write, giving back."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

from ..driver import Driver
from ..layout import Lane
from .pages import Page, PhysicalPagePool
from .parking import Parking
from .planner import Copy, Growth, OverRead, Plan, Planner, Sharing
from .reservation import LanePages, Reservation
from .undo import Undo


class PageTable(Planner):
    """The pages of every slot, by lane. Knows rows and pages, not sequences: what is live, how long it is, and who may
    touch it when, is the business of ``slots``.

    Args:
        driver: copies and zeros.
        pool: where pages come from and go.
        lanes: each with the reservation that it lies in.
        max_slots: slots of the cache.
        over_read: rows past the end of a sequence that have pages too.
    """

    def __init__(
        self,
        driver: Driver,
        pool: PhysicalPagePool,
        lanes: list[tuple[Reservation, Lane]],
        max_slots: int,
        over_read: OverRead,
    ) -> None:
        tops = np.zeros((len(lanes), max_slots), np.int64)
        with_pages = [LanePages(*pair, over_read.tokens, tops[number]) for number, pair in enumerate(lanes)]
        super().__init__(with_pages, pool.page_bytes, over_read)
        self.driver = driver
        self.pool = pool
        self.parking = Parking(pool, self.lanes, tops)

    # -- growing -------------------------------------------------------------------------------------------------
    def grow(self, growth: Growth, undo: Undo) -> bool:
        """Carry ``growth`` out. Returns whether work was submitted to the current stream."""
        # All pages before the first mapping, so that running out of them leaves little to undo.
        growth.new_pages = self.pool.take(growth.num_pages, undo)
        pages = iter(growth.new_pages)
        submitted = bool(growth.adopted)
        self._unpark(growth, undo)
        for reservation, indexes in growth.missing.items():
            new = list(islice(pages, len(indexes)))
            reservation.map(indexes, new, undo)
            for index, page in zip(indexes, new, strict=True):
                if page.dirty:
                    submitted |= self._scrub(page, reservation.address_of(index), self.page_bytes, undo)
                page.dirty = True  # its owner may write from now on
        for copy in growth.copies:
            self._copy_on_write(copy, next(pages), growth, undo)
            submitted = True
        self._scrub_adopted(growth, undo)
        return submitted

    def note_growth(self, growth: Growth) -> None:
        """The growth succeeded: its pages are the slots' now."""
        for (lane, slot), num_pages in growth.ends.items():
            lane.ends[slot] = max(lane.ends[slot], num_pages)
        self.pool.gain(growth.new_pages)
        for run in growth.adopted:
            self.pool.gain([run.reservation.pages[index] for index in range(run.first, run.stop)])
        for page, leaving in growth.leaving.items():
            self.pool.lose([page] * len(leaving))
        self._note_plan(growth)

    def _note_plan(self, plan: Plan) -> None:
        self.parking.num_adopted += plan.num_adopted
        self.parking.num_unparked += len(plan.unparked_pages)
        for page in dict.fromkeys(plan.unparked_pages):  # one may have been parked in two slots
            self.pool.put_back(page)
        for slot in plan.slots_adopting:
            self.parking.forget_empty(slot)

    def _unpark(self, plan: Plan, undo: Undo) -> None:
        """Unmap the parked pages that are in the way. The caller has waited for their fences."""
        for run in plan.unparked:
            plan.unparked_pages += run.reservation.unmap(run.first, run.stop, undo)

    def _scrub_adopted(self, plan: Plan, undo: Undo) -> None:
        """Zero the parked pages that get a new owner, a stretch of them in one call.

        The caller has put the current stream behind their fences.
        """
        for run in plan.adopted:
            undo.push(self._wait_for_stream)
            self.driver.zero(run.reservation.address_of(run.first), (run.stop - run.first) * self.page_bytes)

    def _scrub(self, page: Page, address: int, size_bytes: int, undo: Undo) -> bool:
        """Zero ``size_bytes`` of a page if an earlier owner wrote to it; from here on its new owner may."""
        was_dirty, page.dirty = page.dirty, True
        if not was_dirty or not size_bytes:
            return False
        undo.push(self._wait_for_stream)  # before the page is unmapped again
        self.driver.zero(address, size_bytes)
        return True

    def _copy_on_write(self, copy: Copy, page: Page, growth: Growth, undo: Undo) -> None:
        """Replace a shared page by a private copy of its first bytes, zeros after them.

        The old page is still mapped elsewhere, so the copy is made from there once the new page is in its place: from
        an address that it is not about to leave too, because the copy runs later and unmapping does not wait for it.
        The caller has waited for work that may be using this slot's rows.
        """
        reservation, index, keep_bytes = copy.reservation, copy.index, copy.size_bytes
        (shared,) = reservation.unmap(index, index + 1, undo)
        reservation.map([index], [page], undo)
        address = reservation.address_of(index)
        self._scrub(page, address + keep_bytes, self.page_bytes - keep_bytes, undo)
        if keep_bytes:
            undo.push(self._wait_for_stream)
            leaving = growth.leaving[shared]
            source = next(other for other in shared.maps if other not in leaving and self._is_owned(other))
            self.driver.copy(address, source, keep_bytes)

    def _wait_for_stream(self) -> None:
        if fence := self.driver.fence():
            fence.wait()

    # -- sharing -------------------------------------------------------------------------------------------------
    def share(self, plan: Sharing, undo: Undo) -> None:
        """Carry ``plan`` out."""
        plan.new_pages = self.pool.take(plan.num_pages, undo)
        pages = iter(plan.new_pages)
        self._unpark(plan, undo)
        for aliases in plan.aliases:
            aliases.reservation.map(aliases.indexes, aliases.pages, undo)
        kept = {(copy.reservation, copy.index): copy.size_bytes for copy in plan.copies}
        for new in plan.own:
            own = list(islice(pages, len(new.indexes)))
            new.reservation.map(new.indexes, own, undo)
            for index, page in zip(new.indexes, own, strict=True):
                size = kept.get((new.reservation, index), 0)
                self._scrub(page, new.reservation.address_of(index) + size, self.page_bytes - size, undo)
        self._scrub_adopted(plan, undo)
        for copy in plan.copies:
            undo.push(self._wait_for_stream)
            address_of = copy.reservation.address_of
            self.driver.copy(address_of(copy.index), address_of(copy.source), copy.size_bytes)

    def note_sharing(self, child: int, rows: int, plan: Sharing) -> None:
        """It succeeded: rows ``[0, rows)`` of the slot, which had none, have pages now."""
        for lane in self.lanes:
            lane.ends[child] = lane.num_pages(rows)
        self.pool.gain(self.owned([child]))
        self._note_plan(plan)

    def wipe(self, slot: int, start: int, end: int, undo: Undo) -> bool:
        """Zero what the slot's own pages hold in rows ``[start, end)``; True if that was all of them.

        Pages shared with another sequence are passed over: growing makes them private.
        """
        complete = True
        for lane in self.lanes:
            base = lane.first(slot)
            origin = base * self.page_bytes
            low, high = origin + start * lane.row_bytes, origin + end * lane.row_bytes
            for index in range(low // self.page_bytes, min(-(-high // self.page_bytes), base + lane.ends[slot])):
                page = lane.pages.get(index)
                if page is not None and page.shared:
                    complete = False
                elif page is not None:
                    page_start = index * self.page_bytes
                    first, last = max(low, page_start), min(high, page_start + self.page_bytes)
                    undo.push(self._wait_for_stream)
                    self.driver.zero(lane.reservation.address + first, last - first)
        return complete

    # -- giving back ---------------------------------------------------------------------------------------------
    def has_pages_past(self, slot: int, rows: int) -> bool:
        """Whether the slot has pages that rows ``[0, rows)`` do not need."""
        return any(lane.ends[slot] > lane.num_pages(rows) for lane in self.lanes)

    def shrink(self, slot: int, rows: int, undo: Undo) -> list[Page]:
        """Unmap the slot's pages that rows ``[0, rows)`` do not need; returns them for ``finish_shrink``."""
        taken: list[Page] = []
        for lane in self.lanes:
            base = lane.first(slot)
            taken += lane.reservation.unmap(base + lane.num_pages(rows), base + lane.ends[slot], undo)
        return taken

    def finish_shrink(self, slot: int, rows: int, taken: list[Page]) -> None:
        """The unmapping succeeded: free what nobody else has."""
        self.pool.lose(taken)
        for page in taken:
            self.pool.put_back(page)
        for lane in self.lanes:
            old = lane.ends[slot]
            lane.ends[slot] = min(old, lane.num_pages(rows))
            if lane.tops[slot] <= old:  # nothing is parked past what was taken, so nothing is there
                lane.tops[slot] = min(int(lane.tops[slot]), lane.ends[slot])

    def disown(self, slot: int) -> None:
        """The slot's sequence has ended: its pages are not in use any more, though they stay where they are."""
        self.pool.lose(self.owned([slot]))

    # -- looking -------------------------------------------------------------------------------------------------
    def rows_of_whole_pages(self, rows: int, limit: int) -> int:
        """How many rows there are to the end of the pages that so many need, ``limit`` at most."""
        page_bytes = self.page_bytes
        for row_bytes in self._row_bytes:
            limit = min(limit, -(-rows * row_bytes // page_bytes) * page_bytes // row_bytes)
        return limit

    def private_rows(self, slot: int, rows: int) -> int:
        """Up to which row the slot could grow from ``rows`` without a driver call; at least ``rows``."""
        reach = []
        for lane in self.lanes:
            base, index, end = lane.first(slot), rows * lane.row_bytes // self.page_bytes, lane.ends[slot]
            while index < end and (page := lane.pages.get(base + index)) and len(page.maps) == 1:
                index += 1
            reach.append(index * self.page_bytes // lane.row_bytes)
        return max(rows, min(reach))

    def backed_rows(self, slot: int) -> int:
        """Rows from 0 on that every lane has pages for, found by looking."""
        backed = []
        for lane in self.lanes:
            base, index = lane.first(slot), 0
            while index < lane.ends[slot] and base + index in lane.pages:
                index += 1
            backed.append(index * self.page_bytes // lane.row_bytes)
        return min(backed)

    def owned(self, slots: Iterable[int]) -> list[Page]:
        """Every page that these slots' sequences have, once for each of its addresses."""
        return [page for slot in slots for lane in self.lanes for page in lane.owned(slot)]
