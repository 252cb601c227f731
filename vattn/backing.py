"""The pages behind a cache's slots: growing, sharing, copying on write, giving back.

Knows rows and pages, not sequences: what is live, how long it is and who may touch it when is ``kv_cache``'s business.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from .driver import Driver
from .errors import ConfigError, DriverError
from .layout import GroupPlan, KVLayout, Lane
from .pages import Page, PhysicalPagePool
from .reservation import Reservation
from .undo import Undo


@dataclass(slots=True)
class Growth:
    """What it takes to make rows backed, private and writable."""

    missing: list[tuple[Reservation, int]] = field(default_factory=list)
    shared: list[tuple[Reservation, int, int]] = field(default_factory=list)  # with the bytes to keep, from the start
    slots_with_shared: set[int] = field(default_factory=set)
    leaving: Counter[Page] = field(default_factory=Counter)  # how many mappings of a shared page will be replaced
    ends: list[tuple[list[int], int, int]] = field(default_factory=list)  # (ends of a lane, slot, pages it will have)

    @property
    def num_pages(self) -> int:
        return len(self.missing) + len(self.shared)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: what a growing batch allocates is here to stay, and every collection in the middle
    walks all of it (10,000 pages on the ledger driver: 22 µs a page with, 11 without)."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


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


class Backing:
    """Owns the driver, the page pool and one reservation per layer group.

    Tensors over the addresses hold a reference to it: pages are freed by ``close``, or when nobody refers to it any
    more; the addresses only then.
    """

    def __init__(
        self,
        driver: Driver,
        layout: KVLayout,
        max_slots: int,
        page_bytes: int,
        limit_bytes: int,
        over_read: OverRead,
    ) -> None:
        self.driver = driver
        self.page_bytes = page_bytes
        self.over_read = over_read
        self.pool = PhysicalPagePool(driver, page_bytes, limit_bytes)
        self.plans: list[GroupPlan] = [
            layout.plan(group, max_slots, page_bytes, over_read.tokens) for group in layout.groups
        ]
        self.reservations: list[Reservation] = []
        self.closed = False
        self._pid = os.getpid()
        try:
            for plan in self.plans:
                self.reservations.append(Reservation(driver, self.pool, plan.size_bytes))
        except DriverError as error:
            self._free_ranges()
            driver.close()
            if not error.out_of_memory:
                raise
            total = sum(plan.size_bytes for plan in self.plans)
            raise ConfigError(
                f"{max_slots} slots of {layout.max_seq_len} tokens need {total / (1 << 40):.3g} TiB of addresses, "
                f"more than the driver can reserve ({error}): lower max_slots or max_seq_len"
            ) from error
        self.lanes: list[tuple[Reservation, Lane]] = [
            (reservation, lane)
            for reservation, plan in zip(self.reservations, self.plans, strict=True)
            for lane in plan.lanes
        ]
        # Per lane and slot: one past the highest page mapped and not taken away, counted from the slot's first.
        self._ends = [[0] * max_slots for _ in self.lanes]

    @property
    def reserved_bytes(self) -> int:
        return sum(reservation.size_bytes for reservation in self.reservations)

    @property
    def num_mapped(self) -> int:
        """Mappings, each counted."""
        return sum(len(reservation.pages) + len(reservation.strays) for reservation in self.reservations)

    # -- growing -------------------------------------------------------------------------------------------------
    def growth(self, slot: int, start: int, end: int, keep_rows: int, growth: Growth) -> None:
        """Add to ``growth`` what makes rows ``[start, end)`` of a slot backed and private, those past them readable.

        A copy of a shared page takes the bytes of rows below ``keep_rows``. Where every sharer of a page asks for
        a copy, the last one keeps the page.
        """
        if end <= start:
            return
        page_bytes = self.page_bytes
        readable_rows = end + self.over_read.tokens
        # Where kernels do not mask it, what lies past the new end has to be this sequence's own to be wiped.
        private_rows = end if self.over_read.masked or end < keep_rows else readable_rows
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            row_bytes, pages = lane.row_bytes, reservation.pages
            origin = lane.slot_offset(slot)
            base = origin // page_bytes
            num_pages = -(-readable_rows * row_bytes // page_bytes)
            growth.ends.append((ends, slot, num_pages))
            for index in range(base + start * row_bytes // page_bytes, base + num_pages):
                page = pages.get(index)
                if page is None:
                    growth.missing.append((reservation, index))
                elif (
                    len(page.maps) - growth.leaving[page] > 1 and (index - base) * page_bytes < private_rows * row_bytes
                ):
                    growth.leaving[page] += 1
                    kept = origin + keep_rows * row_bytes - index * page_bytes
                    growth.shared.append((reservation, index, max(0, min(kept, page_bytes))))
                    growth.slots_with_shared.add(slot)

    def grow(self, growth: Growth, undo: Undo) -> bool:
        """Carry ``growth`` out. Returns whether work was submitted to the current stream."""
        with _no_collection() if growth.num_pages > 8 else nullcontext():
            return self._grow(growth, undo)

    def _grow(self, growth: Growth, undo: Undo) -> bool:
        pages = iter(self.pool.take(growth.num_pages, undo))
        submitted = False
        for reservation, index in growth.missing:
            submitted |= self._map_new(reservation, index, next(pages), undo)
        for reservation, index, keep_bytes in growth.shared:
            self._copy_on_write(reservation, index, next(pages), keep_bytes, undo)
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

    def _map_new(self, reservation: Reservation, index: int, page: Page, undo: Undo) -> bool:
        """Map a page that nobody else has, all zeros. Returns whether that took work on the stream."""
        reservation.map(index, page, undo)
        return self._scrub(page, reservation.address_of(index), self.page_bytes, undo)

    def _scrub(self, page: Page, address: int, size_bytes: int, undo: Undo) -> bool:
        """Zero ``size_bytes`` of a page if an earlier owner wrote to it; from here on its new owner may."""
        was_dirty, page.dirty = page.dirty, True
        if not was_dirty or not size_bytes:
            return False
        undo.push(self._wait_for_stream)  # before the page is unmapped again
        self.driver.zero(address, size_bytes)
        return True

    def _copy_on_write(self, reservation: Reservation, index: int, page: Page, keep_bytes: int, undo: Undo) -> None:
        """Replace a shared page by a private copy of its first ``keep_bytes``, zeros after them.

        The old page is still mapped elsewhere, so the copy is made from there once the new page is in its place. The
        caller has waited for work that may be using this slot's rows.
        """
        (shared,) = reservation.unmap(index, index + 1, undo)
        reservation.map(index, page, undo)
        address = reservation.address_of(index)
        self._scrub(page, address + keep_bytes, self.page_bytes - keep_bytes, undo)
        if keep_bytes:
            undo.push(self._wait_for_stream)
            self.driver.copy(address, shared.maps[0], keep_bytes)

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
            for index in range(num_whole):
                reservation.map(target + index, reservation.pages[source + index], undo)
            for index in range(num_whole, num_pages):
                page = next(pages)
                reservation.map(target + index, page, undo)
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

    def stray_pages(self) -> Iterator[tuple[int, Page]]:
        """(address, page) of every page that a failed undo left mapped."""
        for reservation in self.reservations:
            for index, page in reservation.strays.items():
                yield reservation.address_of(index), page

    @property
    def has_strays(self) -> bool:
        return any(reservation.strays for reservation in self.reservations)

    def clear_strays(self) -> bool:
        """Try again to unmap what failed undos left behind. Returns whether there was any."""
        found = False
        for reservation in self.reservations:
            for index in tuple(reservation.strays):
                reservation.clear_stray(index)
                found = True
        return found

    def _num_pages(self, lane: Lane, rows: int) -> int:
        """Pages that a sequence of so many rows has, those that kernels read past its end included."""
        return self._page_span(lane, 0, rows + self.over_read.tokens)[1] if rows else 0

    def _page_span(self, lane: Lane, start: int, end: int) -> tuple[int, int]:
        """Pages, counted from the slot's first, that hold rows ``[start, end)``, as (first, one past the last)."""
        if end <= start:
            return 0, 0
        return start * lane.row_bytes // self.page_bytes, -(-end * lane.row_bytes // self.page_bytes)

    def check_integrity(self) -> None:
        """Page table and pool agree, page by page."""
        self.pool.check_integrity()
        maps: dict[Page, set[int]] = {}
        for reservation in self.reservations:
            assert not reservation.pages.keys() & reservation.strays.keys(), "a page is both mapped and stray"
            for table in (reservation.pages, reservation.strays):
                for index, page in table.items():
                    maps.setdefault(page, set()).add(reservation.address_of(index))
        assert maps.keys() <= self.pool.pages, "a page that the pool does not know is mapped"
        for page in self.pool.pages:
            assert set(page.maps) == maps.get(page, set()), f"{page} is mapped at other addresses than it says"
            assert len(set(page.maps)) == len(page.maps), f"{page} lists an address twice"
        book = getattr(self.driver, "book", None)
        if book is not None:
            assert len(book.mappings) == self.num_mapped, "the driver has mappings that the cache does not know"
            assert len(book.handles) == len(self.pool.pages), "the driver has handles that the pool does not know"

    # -- the end -------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Unmap and release everything; the addresses stay reserved. Goes on past a failure and tries once more.

        Raises:
            DriverError: the first failure; what could not be freed then is tried again by the next ``close``.
        """
        if self.closed:
            return
        self.driver.synchronize()
        failures: list[DriverError] = []
        for _ in range(2):
            for reservation in self.reservations:
                for table in (reservation.pages, reservation.strays):
                    for index in tuple(table):
                        self._unmap_finally(reservation, index, table, failures)
            for page in tuple(self.pool.pages):
                if not page.maps:
                    try:
                        self.driver.release(page.handle)
                        self.pool.pages.discard(page)
                    except DriverError as error:
                        failures.append(error)
            self.pool.free = [page for page in self.pool.free if page in self.pool.pages]
            if not self.pool.pages:
                self.closed = True
                self.driver.close()
                break
        if failures:
            raise failures[0]

    def _unmap_finally(
        self, reservation: Reservation, index: int, table: dict[int, Page], failures: list[DriverError]
    ) -> None:
        address = reservation.address_of(index)
        try:
            self.driver.unmap(address, self.page_bytes)
        except DriverError as error:
            failures.append(error)
            return
        self.pool.unmapped(table.pop(index), address)

    def _free_ranges(self) -> None:
        while self.reservations:
            self.reservations.pop().free()

    def __del__(self) -> None:
        # At the interpreter's end the system takes everything back; a forked child must not touch its parent's pages.
        if sys.is_finalizing() or os.getpid() != getattr(self, "_pid", None):
            return
        try:
            self.close()
        finally:
            if self.closed:
                self._free_ranges()
