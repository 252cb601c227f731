"""Which pages stand behind which rows of a slot: growing, sharing, copying on write, giving back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ..driver import Driver
from ..layout import Lane
from .pages import Page, PhysicalPagePool
from .parking import Parking
from .planner import Planner
from .plans import Growth, OverRead, Plan, Sharing
from .reservation import Reservation
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
        super().__init__(lanes, max_slots, pool.page_bytes, over_read)
        self.driver = driver
        self.pool = pool
        self.parking = Parking(pool, lanes, self._ends, max_slots)

    # -- growing -------------------------------------------------------------------------------------------------
    def grow(self, growth: Growth, undo: Undo) -> bool:
        """Carry ``growth`` out. Returns whether work was submitted to the current stream."""
        pages = iter(self.pool.take(growth.num_pages, undo))
        submitted = bool(growth.adopted)
        self._unpark(growth, undo)
        for reservation, indexes in growth.missing.items():
            new = list(islice(pages, len(indexes)))
            reservation.map(indexes, new, undo)
            for index, page in zip(indexes, new, strict=True):
                if page.dirty:
                    submitted |= self._scrub(page, reservation.address_of(index), self.page_bytes, undo)
                page.dirty = True
        for reservation, index, keep_bytes in growth.shared:
            leaving = growth.leaving[reservation.pages[index]]
            self._copy_on_write(reservation, index, next(pages), keep_bytes, leaving, undo)
            submitted = True
        self._scrub_adopted(growth, undo)
        return submitted

    def note_growth(self, growth: Growth) -> None:
        """The growth succeeded: its pages are the slots' now."""
        for ends, slot, num_pages in growth.ends:
            if num_pages > ends[slot]:
                ends[slot] = num_pages
        self._note_plan(growth)

    def _note_plan(self, plan: Plan) -> None:
        self.parking.num_adopted += len(plan.adopted)
        self.parking.num_unparked += len(plan.unparked_pages)
        for page in dict.fromkeys(plan.unparked_pages):  # one may have been parked in two slots
            self.pool.put_back(page)
        for slot in plan.slots_adopting:
            self.parking.forget_empty(slot)

    def _unpark(self, plan: Plan, undo: Undo) -> None:
        """Unmap the parked pages that are in the way. The caller has waited for their epochs."""
        for reservation, index in plan.unparked:
            plan.unparked_pages += reservation.unmap(index, index + 1, undo)

    def _scrub_adopted(self, plan: Plan, undo: Undo) -> None:
        """Zero the parked pages that get a new owner, in as few calls as there are stretches of them.

        The caller has put the current stream behind their epochs.
        """
        start = 0
        adopted = plan.adopted
        for stop in range(1, len(adopted) + 1):
            reservation, first = adopted[start]
            if stop == len(adopted) or adopted[stop] != (reservation, first + stop - start):
                undo.push(self._wait_for_stream)
                self.driver.zero(reservation.address_of(first), (stop - start) * self.page_bytes)
                start = stop

    def _scrub(self, page: Page, address: int, size_bytes: int, undo: Undo) -> bool:
        """Zero ``size_bytes`` of a page if an earlier owner wrote to it; from here on its new owner may."""
        was_dirty, page.dirty = page.dirty, True
        if not was_dirty or not size_bytes:
            return False
        undo.push(self._wait_for_stream)  # before the page is unmapped again
        self.driver.zero(address, size_bytes)
        return True

    def _copy_on_write(
        self, reservation: Reservation, index: int, page: Page, keep_bytes: int, leaving: set[int], undo: Undo
    ) -> None:
        """Replace a shared page by a private copy of its first ``keep_bytes``, zeros after them.

        The old page is still mapped elsewhere, so the copy is made from there once the new page is in its place: from
        an address that it is not about to leave too, because the copy runs later and unmapping does not wait for it.
        The caller has waited for work that may be using this slot's rows.
        """
        (shared,) = reservation.unmap(index, index + 1, undo)
        reservation.map([index], [page], undo)
        address = reservation.address_of(index)
        self._scrub(page, address + keep_bytes, self.page_bytes - keep_bytes, undo)
        if keep_bytes:
            undo.push(self._wait_for_stream)
            source = next(other for other in shared.maps if other not in leaving and self._is_owned(other))
            self.driver.copy(address, source, keep_bytes)

    def _wait_for_stream(self) -> None:
        if fence := self.driver.fence():
            fence.wait()

    # -- sharing -------------------------------------------------------------------------------------------------
    def share(self, plan: Sharing, undo: Undo) -> None:
        """Carry ``plan`` out."""
        # All pages before the first mapping, so that running out of them leaves nothing to undo.
        pages = iter(self.pool.take(plan.num_pages, undo))
        self._unpark(plan, undo)
        for reservation, indexes, shared in plan.aliases:
            reservation.map(indexes, shared, undo)
        kept = {(reservation, target): size for reservation, _, target, size in plan.copies}
        for reservation, indexes in plan.own:
            own = list(islice(pages, len(indexes)))
            reservation.map(indexes, own, undo)
            for index, page in zip(indexes, own, strict=True):
                size = kept.get((reservation, index), 0)
                self._scrub(page, reservation.address_of(index) + size, self.page_bytes - size, undo)
        self._scrub_adopted(plan, undo)
        for reservation, source, target, size in plan.copies:
            undo.push(self._wait_for_stream)
            self.driver.copy(reservation.address_of(target), reservation.address_of(source), size)

    def note_sharing(self, child: int, rows: int, plan: Sharing) -> None:
        """It succeeded: rows ``[0, rows)`` of the slot have pages now."""
        for (_, lane), ends in zip(self.lanes, self._ends, strict=True):
            ends[child] = max(ends[child], self._num_pages(lane, rows))
        self._note_plan(plan)

    def wipe(self, slot: int, start: int, end: int, undo: Undo) -> bool:
        """Zero what the slot's own pages hold in rows ``[start, end)``; True if that was all of them.

        Pages shared with another sequence are passed over: growing makes them private.
        """
        complete = True
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            origin = lane.slot_offset(slot)
            low, high = origin + start * lane.row_bytes, origin + end * lane.row_bytes
            own_end = origin // self.page_bytes + ends[slot]
            for index in range(low // self.page_bytes, min(-(-high // self.page_bytes), own_end)):
                page = reservation.pages.get(index)
                if page is not None and page.shared:
                    complete = False
                elif page is not None:
                    page_start = index * self.page_bytes
                    first, last = max(low, page_start), min(high, page_start + self.page_bytes)
                    undo.push(self._wait_for_stream)
                    self.driver.zero(reservation.address + first, last - first)
        return complete

    # -- giving back ---------------------------------------------------------------------------------------------
    def has_pages_past(self, slot: int, rows: int) -> bool:
        """Whether the slot has pages that rows ``[0, rows)`` do not need."""
        lanes = zip(self.lanes, self._ends, strict=True)
        return any(ends[slot] > self._num_pages(lane, rows) for (_, lane), ends in lanes)

    def shrink(self, slot: int, rows: int, undo: Undo) -> list[Page]:
        """Unmap the slot's pages that rows ``[0, rows)`` do not need; returns them for ``finish_shrink``."""
        taken: list[Page] = []
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            base = lane.slot_offset(slot) // self.page_bytes
            taken += reservation.unmap(base + self._num_pages(lane, rows), base + ends[slot], undo)
        return taken

    def finish_shrink(self, slot: int, rows: int, taken: list[Page]) -> None:
        """The unmapping succeeded: free what nobody else has."""
        for page in taken:
            self.pool.put_back(page)
        for number, ((_, lane), ends) in enumerate(zip(self.lanes, self._ends, strict=True)):
            end = min(ends[slot], self._num_pages(lane, rows))
            self.parking.note_cut(number, slot, ends[slot], end)
            ends[slot] = end

    # -- looking -------------------------------------------------------------------------------------------------
    def rows_of_whole_pages(self, rows: int, limit: int) -> int:
        """How many rows there are to the end of the pages that so many need, ``limit`` at most."""
        page_bytes = self.page_bytes
        for row_bytes in self._row_bytes:
            limit = min(limit, -(-rows * row_bytes // page_bytes) * page_bytes // row_bytes)
        return limit

    def private_rows(self, slot: int, rows: int) -> int:
        """Up to which row the slot could grow from ``rows`` without a driver call; at least ``rows``."""
        reach = None
        page_bytes = self.page_bytes
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            base, row_bytes, pages = lane.slot_offset(slot) // page_bytes, lane.row_bytes, reservation.pages
            index, end = rows * row_bytes // page_bytes, ends[slot]
            while index < end and (page := pages.get(base + index)) and len(page.maps) == 1:
                index += 1
            lane_rows = index * page_bytes // row_bytes
            if reach is None or lane_rows < reach:
                reach = lane_rows
        return max(rows, reach or 0)

    def backed_rows(self, slot: int) -> int:
        """Rows from 0 on that every lane has pages for, found by looking."""
        lowest = None
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            base, index = lane.slot_offset(slot) // self.page_bytes, 0
            while index < ends[slot] and base + index in reservation.pages:
                index += 1
            lane_rows = index * self.page_bytes // lane.row_bytes
            lowest = lane_rows if lowest is None else min(lowest, lane_rows)
        return lowest or 0

    def pages_of(self, slot: int) -> Iterator[tuple[int, Page]]:
        """(address, page) of every page that is a sequence's own."""
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            base = lane.slot_offset(slot) // self.page_bytes
            for index in range(base, base + ends[slot]):
                if index in reservation.pages:
                    yield reservation.address_of(index), reservation.pages[index]
