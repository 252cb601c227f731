"""One address range and the pages behind it. Every driver call that changes something registers its undo beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..driver import Driver
from ..errors import DriverError
from ..layout import Lane
from .guard import Guard
from .pages import Page, PhysicalPagePool
from .undo import Undo


class Reservation:
    """Addresses reserved once; unit ``i`` of it lies at ``address + i * page_bytes``, and a page of several units is
    known by its first.

    Args:
        guard: keeps shared pages read-only; None: every page is writable.

    Attributes:
        pages: the mapped, accessible pages by index.
        strays: pages that an undo could not unmap; nobody uses them, and the next ``map`` there tries again.
        num_pages: units that both have.
    """

    def __init__(self, driver: Driver, pool: PhysicalPagePool, size_bytes: int, guard: Guard | None = None) -> None:
        self.driver = driver
        self.pool = pool
        self.guard = guard
        self.page_bytes = pool.page_bytes
        self.size_bytes = size_bytes
        self.address = driver.reserve(size_bytes)
        self.pages: dict[int, Page] = {}
        self.strays: dict[int, Page] = {}
        self.num_pages = 0

    def address_of(self, index: int) -> int:
        return self.address + index * self.page_bytes

    def pages_of(self, first: int, stop: int) -> list[Page]:
        """The pages that begin at ``first <= index < stop``, where there are no holes."""
        return [self.pages[index] for run in self._runs(first, stop) for index in run]

    def map(self, indexes: Sequence[int], pages: Sequence[Page], undo: Undo) -> None:
        """Put a page, new or shared, behind each index, which has none, and make it accessible."""
        for index, page in zip(indexes, pages, strict=True) if self.strays else ():
            self._clear_strays(index, index + page.size)
        if self.guard is not None and pages and pages[0].maps:
            for index, page in zip(indexes, pages, strict=True):
                self._map_guarded(self.guard, index, page, undo)
            return
        sizes = {page.size for page in pages}
        if len(sizes) == 1:
            self._map_alike(indexes, pages, undo)
            return
        for size in sizes:
            alike = [(index, page) for index, page in zip(indexes, pages, strict=True) if page.size == size]
            self._map_alike([index for index, _ in alike], [page for _, page in alike], undo)

    def _map_alike(self, indexes: Sequence[int], pages: Sequence[Page], undo: Undo) -> None:
        """``map`` for pages of one size."""
        base, page_bytes = self.address, self.page_bytes
        mapped: list[int] = []
        undo.push(self._undo_map, indexes, pages, mapped)
        try:
            addresses = [base + index * page_bytes for index in indexes]
            self.driver.map_pages(pages[0].size * page_bytes, addresses, [page.handle for page in pages], mapped)
        finally:
            for page, address in zip(pages, mapped, strict=False):
                page.maps.append(address)
            self.num_pages += pages[0].size * len(mapped)
        self.pages.update(zip(indexes, pages, strict=True))

    def _map_guarded(self, guard: Guard, index: int, page: Page, undo: Undo) -> None:
        """``map`` for a page that others have: from now on it may only be read, at every address."""
        address, mapped = self.address_of(index), list[int]()
        undo.push(guard.settle, page)  # once it is unmapped here again
        undo.push(self._undo_map, [index], [page], mapped)
        self.driver.map(address, page.size * self.page_bytes, page.handle)
        mapped.append(address)
        page.maps.append(address)
        self.num_pages += page.size
        guard.settle(page)
        self.pages[index] = page

    def _settle(self, pages: Sequence[Page]) -> None:
        """These have been unmapped somewhere: where one mapping is left, it may be written again."""
        if self.guard is not None:
            for page in pages:
                if page.read_only and len(page.maps) == 1:
                    self.guard.settle(page)

    def _note_unmapped(self, page: Page, address: int) -> None:
        page.maps.remove(address)
        page.read_only.discard(address)
        if self.guard is not None and not page.maps:
            self.guard.unsettled.discard(page)
        self.num_pages -= page.size

    def _undo_map(self, indexes: Sequence[int], pages: Sequence[Page], mapped: list[int]) -> None:
        failure: DriverError | None = None
        for index, page, address in reversed(tuple(zip(indexes, pages, mapped, strict=False))):
            self.pages.pop(index, None)
            try:
                self.driver.unmap(address, page.size * self.page_bytes)
                self._note_unmapped(page, address)
            except DriverError as error:
                failure = failure or error
                self.strays[index] = page
        if failure:
            raise failure

    def unmap(self, first: int, last: int, undo: Undo) -> list[Page]:
        """Take away the pages that begin at ``first <= index < last`` (holes are passed over); returns them, in order.

        The caller has waited for the work that may be using them, and hands them to ``pool.put_back`` at the end.
        """
        taken: list[Page] = []
        for indexes in self._runs(first, last):
            end = indexes[-1] + self.pages[indexes[-1]].size
            self.driver.unmap(self.address_of(indexes[0]), (end - indexes[0]) * self.page_bytes)
            pages = [self.pages.pop(index) for index in indexes]
            for index, page in zip(indexes, pages, strict=True):
                self._note_unmapped(page, self.address_of(index))
            undo.push(self._undo_unmap, indexes, pages)
            self._settle(pages)
            taken += pages
        return taken

    def _undo_unmap(self, indexes: list[int], pages: list[Page]) -> None:
        failure: DriverError | None = None
        for index, page in zip(indexes, pages, strict=True):
            address, size_bytes = self.address_of(index), page.size * self.page_bytes
            mapped = False
            try:
                self.driver.map(address, size_bytes, page.handle)
                page.maps.append(address)
                self.num_pages += page.size
                mapped = True
                if self.guard is not None and len(page.maps) > 1:
                    self.guard.settle(page)
                else:
                    self.driver.set_access(address, size_bytes)
                self.pages[index] = page
            except DriverError as error:  # the rows of this page are lost; the others need not be
                failure = failure or error
                if mapped:
                    self.strays[index] = page
                else:
                    self.pool.put_back(page)
        if failure:
            raise failure

    def clear_stray(self, index: int) -> None:
        """Unmap a page that an earlier undo had to leave behind."""
        page = self.strays[index]
        self.unmap_finally(index, self.strays)
        self.pool.put_back(page)
        self._settle([page])

    def unmap_finally(self, index: int, table: dict[int, Page]) -> None:
        """Unmap a page of ``pages`` or ``strays``; there is no way back."""
        address, page = self.address_of(index), table[index]
        self.driver.unmap(address, page.size * self.page_bytes)
        del table[index]
        self._note_unmapped(page, address)

    def _clear_strays(self, first: int, last: int) -> None:
        for index, page in tuple(self.strays.items()):
            if index < last and first < index + page.size:
                self.clear_stray(index)

    def _runs(self, first: int, last: int) -> Iterator[list[int]]:
        """Stretches of mapped pages without a hole, as their indexes. Safe while their pages are being removed."""
        index, run = first, list[int]()
        while index < last:
            page = self.pages.get(index)
            if page is not None:
                run.append(index)
                index += page.size
            else:
                if run:
                    yield run
                    run = []
                index += 1
        if run:
            yield run

    def free(self) -> None:
        """Give the addresses back. Nothing may be mapped, and no tensor over them may be in use."""
        self.driver.free_range(self.address, self.size_bytes)


class LanePages:
    """A lane of a group: per slot a stretch of its reservation, whose units are numbered from the slot's first.

    A page of n units begins at a number that is a multiple of n.

    Attributes:
        ends: per slot, how many units from the first on are its sequence's own. What is mapped beyond them is parked.
            No page has units on both sides.
        tops: per slot, one past the highest page that was ever parked and not unmapped since; int64.
        first_address: of slot 0.
    """

    def __init__(
        self, reservation: Reservation, lane: Lane, over_read_tokens: int, tops: np.ndarray, largest: int
    ) -> None:
        self.reservation = reservation
        self.pages = reservation.pages
        self.page_bytes = reservation.page_bytes
        self.row_bytes = lane.row_bytes
        self.offset_bytes, self.slot_stride_bytes = lane.offset_bytes, lane.slot_stride_bytes
        self.first_address = reservation.address + lane.offset_bytes
        self.ends = [0] * len(tops)
        self.tops = tops
        self._over_read_tokens = over_read_tokens
        self._largest = largest

    def first(self, slot: int) -> int:
        """The slot's first unit, as an index of the reservation. No page holds rows of two slots."""
        return (self.offset_bytes + slot * self.slot_stride_bytes) // self.page_bytes

    def num_pages(self, rows: int) -> int:
        """Pages that a sequence of so many rows needs, those that kernels read past its end included."""
        return -(-(rows + self._over_read_tokens) * self.row_bytes // self.page_bytes) if rows else 0

    def at(self, slot: int, number: int) -> tuple[int, Page] | None:
        """(its first unit, page) of the page that has a unit of the slot; None where there is none."""
        first, get, start = self.first(slot), self.pages.get, number
        while number - start < self._largest:
            if page := get(first + start):
                return (start, page) if number < start + page.size else None
            if not start:
                break
            start &= start - 1  # the next multiple of a larger power of two
        return None

    def walk(self, slot: int, start: int, end: int) -> Iterator[tuple[int, int, Page | None]]:
        """(first unit, one past its last, page) of each page with units among ``[start, end)``; holes as None."""
        if start < end and (found := self.at(slot, start)):
            start = found[0]
        first, get = self.first(slot), self.pages.get
        while start < end:
            page = get(first + start)
            stop = start + (page.size if page else 1)
            while page is None and stop < end and first + stop not in self.pages:
                stop += 1
            yield start, stop, page
            start = stop

    def end_of(self, slot: int, number: int) -> int:
        """Where the page ends that has the last of so many units."""
        found = self.at(slot, number - 1) if number else None
        return found[0] + found[1].size if found else number

    def cut(self, slot: int, end: int) -> None:
        """The units from ``end`` on are not the sequence's own any more, nor mapped."""
        old = self.ends[slot]
        self.ends[slot] = min(old, end)
        if self.tops[slot] <= old:  # nothing is parked past what was taken, so nothing is there
            self.tops[slot] = min(int(self.tops[slot]), self.ends[slot])

    def owned(self, slot: int) -> list[Page]:
        """Every page that is the sequence's own."""
        first, end, get, found = self.first(slot), self.first(slot) + self.ends[slot], self.pages.get, []
        while first < end:
            page = get(first)
            if page is None:  # after a failed undo one may be missing
                first += 1
            else:
                found.append(page)
                first += page.size
        return found

    def parked(self, slot: int) -> Iterator[tuple[int, Page]]:
        """(address, page) of every page that is parked in the slot."""
        first = self.first(slot)
        for start, _, page in self.walk(slot, self.ends[slot], int(self.tops[slot])):
            if page is not None:
                yield self.reservation.address_of(first + start), page
