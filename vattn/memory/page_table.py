"""Which pages stand behind which rows of a slot: growing, sharing, copying on write, giving back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from ..driver import Driver
from ..layout import Lane
from .guard import Guard
from .page_sizes import PageSizes
from .pages import Page, PhysicalPagePool
from .parking import Parking
from .planner import OverRead, Planner
from .plans import Copy, Growth, Placed, Plan, Sharing, Split
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
        sizes: of pages.
        over_read: rows past the end of a sequence that have pages too.
        guard: keeps shared pages read-only; None: every page is writable.

    Attributes:
        aside: addresses for one page, where ``split`` keeps the old one for a moment; reserved when first needed.
    """

    def __init__(
        self,
        driver: Driver,
        pool: PhysicalPagePool,
        lanes: list[tuple[Reservation, Lane]],
        max_slots: int,
        sizes: PageSizes,
        over_read: OverRead,
        guard: Guard | None = None,
    ) -> None:
        tops = np.zeros((len(lanes), max_slots), np.int64)
        with_pages = [
            LanePages(*pair, over_read.tokens, tops[number], sizes.largest) for number, pair in enumerate(lanes)
        ]
        super().__init__(with_pages, pool.page_bytes, sizes, over_read)
        self.driver = driver
        self.pool = pool
        self.guard = guard
        self.aside: Reservation | None = None
        self.parking = Parking(pool, self.lanes, tops)

    # -- growing -------------------------------------------------------------------------------------------------
    def grow(self, growth: Growth, undo: Undo) -> bool:
        """Carry ``growth`` out. Returns whether work was submitted to the current stream."""
        # All pages before the first mapping, so that running out of them leaves little to undo.
        growth.new_pages = self.pool.take(growth.sizes, undo)
        pages = iter(growth.new_pages)
        submitted = bool(growth.adopted)
        self._unpark(growth, undo)
        for new in growth.missing.values():
            submitted |= self._map_new(new, pages, undo)
        for copy in growth.copies:
            self._copy_on_write_now(copy, pages, growth, undo)
            submitted = True
        self._scrub_adopted(growth, undo)
        return submitted

    def _map_new(self, new: Placed, pages: Iterator[Page], undo: Undo, copied_to: int = 0) -> bool:
        """Map the next of the pages and zero what an earlier owner may have written there, but for what lies before
        byte ``copied_to`` of the reservation, which a copy will fill. Returns whether work was submitted."""
        if not new.indexes:
            return False
        own = list(islice(pages, len(new.indexes)))
        new.reservation.map(new.indexes, own, undo)
        submitted = False
        for index, page in zip(new.indexes, own, strict=True):
            if page.dirty:
                size_bytes = page.size * self.page_bytes
                kept = max(0, min(copied_to - index * self.page_bytes, size_bytes))
                if kept < size_bytes:
                    undo.push(self._wait_for_stream)  # before the page is unmapped again
                    self.driver.zero(new.reservation.address_of(index) + kept, size_bytes - kept)
                    submitted = True
            page.dirty = True  # its owner may write from now on
        return submitted

    def note_growth(self, growth: Growth) -> None:
        """The growth succeeded: its pages are the slots' now."""
        for (lane, slot), num_pages in growth.ends.items():
            if num_pages < lane.ends[slot]:
                lane.cut(slot, num_pages)
            lane.ends[slot] = num_pages
        self.pool.gain(growth.new_pages)
        for run in growth.adopted:
            self.pool.gain(run.reservation.pages_of(run.first, run.stop))
        for page, leaving in growth.leaving.items():
            self.pool.lose([page] * len(leaving))
        self._note_plan(growth)

    def _note_plan(self, plan: Plan) -> None:
        self.parking.num_adopted += plan.num_adopted
        if plan.unparked_pages:
            self.parking.num_unparked += sum(page.size for page in plan.unparked_pages)
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

    def _copy_on_write_now(self, copy: Copy, pages: Iterator[Page], growth: Growth, undo: Undo) -> None:
        """Replace a shared page by private copies of its first bytes, zeros after them.

        The old page is still mapped elsewhere, so the copy is made from there once the new ones are in its place: from
        an address that it is not about to leave too, because the copy runs later and unmapping does not wait for it.
        The caller has waited for work that may be using this slot's rows.
        """
        reservation, index, keep_bytes = copy.reservation, copy.index, copy.size_bytes
        (shared,) = reservation.unmap(index, index + 1, undo)
        new = Placed(reservation)
        new.cover(index, copy.sizes)
        self._map_new(new, pages, undo, index * self.page_bytes + keep_bytes)
        if keep_bytes:
            undo.push(self._wait_for_stream)
            leaving = growth.leaving[shared]
            source = next(other for other in shared.maps if other not in leaving and self._is_owned(other))
            self.driver.copy(reservation.address_of(index), source, keep_bytes)

    def _wait_for_stream(self) -> None:
        if fence := self.driver.fence():
            fence.wait()

    # -- sharing -------------------------------------------------------------------------------------------------
    def share(self, plan: Sharing, undo: Undo) -> None:
        """Carry ``plan`` out."""
        plan.new_pages = self.pool.take(plan.sizes, undo)
        pages = iter(plan.new_pages)
        self._unpark(plan, undo)
        for aliases in plan.aliases:
            aliases.reservation.map(aliases.indexes, aliases.pages, undo)
        for new in plan.own:
            self._map_new(new, pages, undo, new.copied_to)
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
            low, high, page_bytes = start * lane.row_bytes, end * lane.row_bytes, self.page_bytes
            address = lane.reservation.address_of(lane.first(slot))
            own_end = min(-(-high // page_bytes), lane.ends[slot])
            for number, stop, page in lane.walk(slot, low // page_bytes, own_end):
                if page is not None and page.shared:
                    complete = False
                elif page is not None:
                    first, last = max(low, number * page_bytes), min(high, stop * page_bytes)
                    undo.push(self._wait_for_stream)
                    self.driver.zero(address + first, last - first)
        return complete

    # -- giving back ---------------------------------------------------------------------------------------------
    def has_pages_past(self, slot: int, rows: int) -> bool:
        """Whether the slot has pages, or units of one, that rows ``[0, rows)`` do not need."""
        return any(lane.ends[slot] > lane.num_pages(rows) for lane in self.lanes)

    def can_shrink(self, slot: int, rows: int) -> bool:
        """Whether the slot has whole pages that rows ``[0, rows)`` do not need."""
        return any(
            lane.ends[slot] > (end := lane.num_pages(rows)) and lane.ends[slot] > lane.end_of(slot, end)
            for lane in self.lanes
        )

    def shrink(self, slot: int, rows: int, undo: Undo) -> list[Page]:
        """Unmap the slot's pages that rows ``[0, rows)`` do not need; returns them for ``finish_shrink``."""
        taken: list[Page] = []
        for lane in self.lanes:
            first, end = lane.first(slot), lane.num_pages(rows)
            if lane.ends[slot] > end:
                taken += lane.reservation.unmap(first + lane.end_of(slot, end), first + lane.ends[slot], undo)
        return taken

    def finish_shrink(self, slot: int, rows: int, taken: list[Page]) -> None:
        """The unmapping succeeded: free what nobody else has."""
        self.pool.lose(taken)
        for page in taken:
            self.pool.put_back(page)
        for lane in self.lanes:
            if lane.ends[slot] > (end := lane.num_pages(rows)):
                lane.cut(slot, lane.end_of(slot, end))

    def straddling(self, slot: int, rows: int) -> Iterator[Split]:
        """The pages of which rows ``[0, rows)`` need a part, and nobody else any. Whole pages past that are gone."""
        for lane in self.lanes:
            end = lane.num_pages(rows)
            if lane.ends[slot] > end > 0 and (found := lane.at(slot, end - 1)):
                start, page = found
                if page.owners == 1 and start + page.size == lane.ends[slot]:
                    kept = min(rows * lane.row_bytes - start * self.page_bytes, (end - start) * self.page_bytes)
                    yield Split(lane, slot, start, end, max(0, kept), page)

    def split(self, split: Split, undo: Undo) -> None:
        """Put smaller pages in the place of one, for the units that are needed, with their rows' copy.

        The old page is moved aside meanwhile. The caller has waited for the work on the slot.
        """
        lane, page = split.lane, split.page
        new = Placed(lane.reservation)
        index = lane.first(split.slot) + split.start
        new.cover(index, self.sizes.cover(split.start, split.end))
        split.new_pages = self.pool.take(new.sizes, undo)
        if self.aside is None:
            self.aside = Reservation(self.driver, self.pool, self.sizes.largest * self.page_bytes, self.guard)
        undo.push(self.pool.put_back_lost, page)
        self.aside.map([0], [page], undo)
        lane.reservation.unmap(index, index + 1, undo)
        self._map_new(new, iter(split.new_pages), undo, index * self.page_bytes + split.kept_bytes)
        if split.kept_bytes:
            undo.push(self._wait_for_stream)
            self.driver.copy(lane.reservation.address_of(index), self.aside.address, split.kept_bytes)
        self._wait_for_stream()
        self.aside.unmap(0, 1, undo)

    def note_split(self, split: Split) -> None:
        """It succeeded: the old page is nobody's now."""
        split.lane.cut(split.slot, split.end)
        self.pool.gain(split.new_pages)
        self.pool.lose([split.page])
        self.pool.put_back(split.page)

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
            end = rows * lane.row_bytes // self.page_bytes
            for start, stop, page in lane.walk(slot, end, lane.ends[slot]):
                if page is None or page.shared:
                    end = max(end, start)
                    break
                end = stop
            reach.append(end * self.page_bytes // lane.row_bytes)
        return max(rows, min(reach))

    def backed_rows(self, slot: int) -> int:
        """Rows from 0 on that every lane has pages for, found by looking."""
        backed = []
        for lane in self.lanes:
            end = next((start for start, _, page in lane.walk(slot, 0, lane.ends[slot]) if not page), lane.ends[slot])
            backed.append(end * self.page_bytes // lane.row_bytes)
        return min(backed)

    def owned(self, slots: Iterable[int]) -> list[Page]:
        """Every page that these slots' sequences have, once for each of its addresses."""
        return [page for slot in slots for lane in self.lanes for page in lane.owned(slot)]
