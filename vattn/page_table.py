"""Which pages stand behind which rows of a slot: growing, sharing, copying on write, giving back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from .driver import Driver
from .layout import Lane
from .pages import Page, PhysicalPagePool
from .reservation import Reservation
from .undo import Undo


@dataclass(slots=True)
class Growth:
    """What it takes to make rows backed, private and writable."""

    missing: dict[Reservation, list[int]] = field(default_factory=dict)
    shared: list[tuple[Reservation, int, int]] = field(default_factory=list)  # with the bytes to keep, from the start
    slots_with_shared: set[int] = field(default_factory=set)
    leaving: dict[Page, set[int]] = field(default_factory=dict)  # addresses at which a shared page will be replaced
    ends: list[tuple[list[int], int, int]] = field(default_factory=list)  # (ends of a lane, slot, pages it will have)

    @property
    def num_pages(self) -> int:
        return sum(map(len, self.missing.values())) + len(self.shared)


@dataclass(frozen=True, slots=True)
class OverRead:
    """How far kernels read past the end of a sequence; those rows stay mapped.

    Attributes:
        tokens: rows past the end that may be read.
        masked: whether what lies there can never reach an output. If it can, it is kept free of an earlier sequence's
            data, and of rows that this sequence had there before ``truncate``: a NaN among them would spread.
    """

    tokens: int = 0
    masked: bool = True


class PageTable:
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
        self.driver = driver
        self.pool = pool
        self.page_bytes = pool.page_bytes
        self.lanes = lanes
        self.over_read = over_read
        # Per lane and slot: one past the highest page mapped and not taken away, counted from the slot's first.
        self._ends = [[0] * max_slots for _ in lanes]

    # -- growing -------------------------------------------------------------------------------------------------
    def growth(self, slot: int, start: int, end: int, keep_rows: int, growth: Growth) -> None:
        """Add to ``growth`` what makes rows ``[start, end)`` of a slot backed and private, those past them readable.

        A copy of a shared page takes the bytes of rows below ``keep_rows``. Where every sharer of a page asks for
        a copy, the last one keeps the page, and the copies are made from there. With ``start == end`` it is only the
        rows past the end that are asked for.
        """
        page_bytes = self.page_bytes
        readable_rows = end + self.over_read.tokens
        # Where kernels do not mask it, what lies past the new end has to be this sequence's own to be wiped.
        private_rows = end if self.over_read.masked or end < keep_rows else readable_rows
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            row_bytes, pages = lane.row_bytes, reservation.pages
            missing = growth.missing.setdefault(reservation, [])
            origin = lane.offset_bytes + slot * lane.slot_stride_bytes
            base = origin // page_bytes
            num_pages = -(-readable_rows * row_bytes // page_bytes)
            growth.ends.append((ends, slot, num_pages))
            for index in range(base + start * row_bytes // page_bytes, base + num_pages):
                page = pages.get(index)
                if page is None:
                    missing.append(index)
                elif len(page.maps) > 1 and (index - base) * page_bytes < private_rows * row_bytes:
                    leaving = growth.leaving.setdefault(page, set())
                    if len(page.maps) - len(leaving) == 1:
                        continue
                    leaving.add(reservation.address_of(index))
                    kept = origin + keep_rows * row_bytes - index * page_bytes
                    growth.shared.append((reservation, index, max(0, min(kept, page_bytes))))
                    growth.slots_with_shared.add(slot)

    def grow(self, growth: Growth, undo: Undo) -> bool:
        """Carry ``growth`` out. Returns whether work was submitted to the current stream."""
        pages = iter(self.pool.take(growth.num_pages, undo))
        submitted = False
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
        return submitted

    def note_growth(self, growth: Growth) -> None:
        """The growth succeeded: its pages are the slots' now."""
        for ends, slot, num_pages in growth.ends:
            if num_pages > ends[slot]:
                ends[slot] = num_pages

    def note_end(self, slot: int, rows: int) -> None:
        """Rows ``[0, rows)`` of the slot have pages now."""
        for (_, lane), ends in zip(self.lanes, self._ends, strict=True):
            ends[slot] = max(ends[slot], self._num_pages(lane, rows))

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
            source = next(other for other in shared.maps if other not in leaving)
            self.driver.copy(address, source, keep_bytes)

    def _wait_for_stream(self) -> None:
        if fence := self.driver.fence():
            fence.wait()

    # -- sharing -------------------------------------------------------------------------------------------------
    def alias(self, parent: int, child: int, rows: int, undo: Undo) -> None:
        """Back rows ``[0, rows)`` of an empty slot by the parent's pages; the page that straddles the end is copied."""
        plan = []
        for reservation, lane in self.lanes:
            num_whole, rest = divmod(rows * lane.row_bytes, self.page_bytes)
            plan.append((reservation, lane, num_whole, rest, self._num_pages(lane, rows)))
        # All pages before the first mapping, so that running out of them leaves nothing to undo.
        pages = iter(self.pool.take(sum(num_pages - num_whole for *_, num_whole, _, num_pages in plan), undo))
        for reservation, lane, num_whole, rest, num_pages in plan:
            source = lane.slot_offset(parent) // self.page_bytes
            target = lane.slot_offset(child) // self.page_bytes
            shared = [reservation.pages[source + index] for index in range(num_whole)]
            own = list(islice(pages, num_pages - num_whole))
            reservation.map(range(target, target + num_pages), shared + own, undo)
            for index, page in enumerate(own, num_whole):
                address = reservation.address_of(target + index)
                kept = rest if index == num_whole else 0
                self._scrub(page, address + kept, self.page_bytes - kept, undo)
                if kept:
                    undo.push(self._wait_for_stream)
                    self.driver.copy(address, reservation.address_of(source + index), kept)

    def wipe(self, slot: int, start: int, end: int, undo: Undo) -> bool:
        """Zero what the slot's own pages hold in rows ``[start, end)``; True if that was all of them.

        Pages shared with another sequence are passed over: growing makes them private.
        """
        complete = True
        for reservation, lane in self.lanes:
            origin = lane.slot_offset(slot)
            low, high = origin + start * lane.row_bytes, origin + end * lane.row_bytes
            for index in range(low // self.page_bytes, -(-high // self.page_bytes)):
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
        for (_, lane), ends in zip(self.lanes, self._ends, strict=True):
            ends[slot] = min(ends[slot], self._num_pages(lane, rows))

    # -- looking -------------------------------------------------------------------------------------------------
    def rows_of_whole_pages(self, rows: np.ndarray) -> np.ndarray:
        """For each count of rows, how many there are to the end of the pages that they need."""
        page_bytes = self.page_bytes
        return np.minimum.reduce(
            [
                -(-rows * lane.row_bytes // page_bytes) * page_bytes // lane.row_bytes
                for lane in {lane.row_bytes: lane for _, lane in self.lanes}.values()
            ]
        )

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
        for reservation, lane in self.lanes:
            base, index = lane.slot_offset(slot) // self.page_bytes, 0
            while base + index in reservation.pages:
                index += 1
            lane_rows = index * self.page_bytes // lane.row_bytes
            lowest = lane_rows if lowest is None else min(lowest, lane_rows)
        return lowest or 0

    def pages_of(self, slot: int) -> Iterator[tuple[int, Page]]:
        """(address, page) of every page that a slot has."""
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            base = lane.slot_offset(slot) // self.page_bytes
            for index in range(base, base + ends[slot]):
                if index in reservation.pages:
                    yield reservation.address_of(index), reservation.pages[index]

    def _num_pages(self, lane: Lane, rows: int) -> int:
        """Pages that a sequence of so many rows has, those that kernels read past its end included."""
        return -(-(rows + self.over_read.tokens) * lane.row_bytes // self.page_bytes) if rows else 0
