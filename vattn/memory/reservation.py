"""One address range and the pages behind it. Every driver call that changes something registers its undo beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..driver import Driver
from ..errors import DriverError
from ..layout import Lane
from .pages import Page, PhysicalPagePool
from .undo import Undo


class Reservation:
    """Addresses reserved once; page ``i`` of it lies at ``address + i * page_bytes``.

    Attributes:
        pages: the mapped, accessible pages by index.
        strays: pages that an undo could not unmap; nobody uses them, and the next ``map`` there tries again.
    """

    def __init__(self, driver: Driver, pool: PhysicalPagePool, size_bytes: int) -> None:
        self.driver = driver
        self.pool = pool
        self.page_bytes = pool.page_bytes
        self.size_bytes = size_bytes
        self.address = driver.reserve(size_bytes)
        self.pages: dict[int, Page] = {}
        self.strays: dict[int, Page] = {}

    def address_of(self, index: int) -> int:
        return self.address + index * self.page_bytes

    def map(self, indexes: Sequence[int], pages: Sequence[Page], undo: Undo) -> None:
        """Put a page, new or shared, behind each index, which has none, and make it accessible."""
        for index in self.strays.keys() & set(indexes) if self.strays else ():
            self.clear_stray(index)
        base, page_bytes = self.address, self.page_bytes
        mapped: list[int] = []
        undo.push(self._undo_map, indexes, pages, mapped)
        try:
            addresses = [base + index * page_bytes for index in indexes]
            self.driver.map_pages(page_bytes, addresses, [page.handle for page in pages], mapped)
        finally:
            for page, address in zip(pages, mapped, strict=False):
                page.maps.append(address)
        self.pages.update(zip(indexes, pages, strict=True))

    def _undo_map(self, indexes: Sequence[int], pages: Sequence[Page], mapped: list[int]) -> None:
        failure: DriverError | None = None
        for index, page, address in reversed(tuple(zip(indexes, pages, mapped, strict=False))):
            self.pages.pop(index, None)
            try:
                self.driver.unmap(address, self.page_bytes)
                page.maps.remove(address)
            except DriverError as error:
                failure = failure or error
                self.strays[index] = page
        if failure:
            raise failure

    def unmap(self, first: int, last: int, undo: Undo) -> list[Page]:
        """Take away the pages with ``first <= index < last`` (holes are passed over); returns them, in order.

        The caller has waited for the work that may be using them, and hands them to ``pool.put_back`` at the end.
        """
        taken: list[Page] = []
        for start, stop in self._runs(first, last):
            self.driver.unmap(self.address_of(start), (stop - start) * self.page_bytes)
            pages = [self.pages.pop(index) for index in range(start, stop)]
            for index, page in enumerate(pages, start):
                page.maps.remove(self.address_of(index))
            undo.push(self._undo_unmap, start, pages)
            taken += pages
        return taken

    def _undo_unmap(self, start: int, pages: list[Page]) -> None:
        failure: DriverError | None = None
        for index, page in enumerate(pages, start):
            address = self.address_of(index)
            try:
                self.driver.map(address, self.page_bytes, page.handle)
                page.maps.append(address)
                self.driver.set_access(address, self.page_bytes)
                self.pages[index] = page
            except DriverError as error:  # the rows of this page are lost; the others need not be
                failure = failure or error
                if address in page.maps:
                    self.strays[index] = page
                else:
                    self.pool.put_back(page)
        if failure:
            raise failure

    def clear_stray(self, index: int) -> None:
        """Unmap a page that an earlier undo had to leave behind."""
        address = self.address_of(index)
        self.driver.unmap(address, self.page_bytes)
        page = self.strays.pop(index)
        page.maps.remove(address)
        self.pool.put_back(page)

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Stretches of mapped pages without a hole, as (start, stop). Safe while their pages are being removed."""
        index = first
        while index < last:
            start = index
            while index < last and index in self.pages:
                index += 1
            if index > start:
                yield start, index
            else:
                index += 1

    def free(self) -> None:
        """Give the addresses back. Nothing may be mapped, and no tensor over them may be in use."""
        self.driver.free_range(self.address, self.size_bytes)


class LanePages:
    """A lane of a group: per slot a stretch of pages in its reservation, numbered from the slot's first.

    Attributes:
        ends: per slot, how many pages from the first on are its sequence's own. What is mapped beyond them is parked.
        tops: per slot, one past the highest page that was ever parked and not unmapped since; int64.
        first_address: of slot 0.
    """

    def __init__(self, reservation: Reservation, lane: Lane, over_read_tokens: int, tops: np.ndarray) -> None:
        self.reservation = reservation
        self.pages = reservation.pages
        self.page_bytes = reservation.page_bytes
        self.row_bytes = lane.row_bytes
        self.offset_bytes, self.slot_stride_bytes = lane.offset_bytes, lane.slot_stride_bytes
        self.first_address = reservation.address + lane.offset_bytes
        self.ends = [0] * len(tops)
        self.tops = tops
        self._over_read_tokens = over_read_tokens

    def first(self, slot: int) -> int:
        """The slot's first page, as an index of the reservation. No page holds rows of two slots."""
        return (self.offset_bytes + slot * self.slot_stride_bytes) // self.page_bytes

    def num_pages(self, rows: int) -> int:
        """Pages that a sequence of so many rows has, those that kernels read past its end included."""
        return -(-(rows + self._over_read_tokens) * self.row_bytes // self.page_bytes) if rows else 0

    def owned(self, slot: int) -> list[Page]:
        """Every page that is the sequence's own."""
        first, get = self.first(slot), self.pages.get
        found = [get(index) for index in range(first, first + self.ends[slot])]
        return [page for page in found if page is not None]  # after a failed undo one may be missing

    def parked(self, slot: int) -> Iterator[tuple[int, Page]]:
        """(address, page) of every page that is parked in the slot."""
        first = self.first(slot)
        for index in range(first + self.ends[slot], first + int(self.tops[slot])):
            page = self.pages.get(index)
            if page is not None:
                yield self.reservation.address_of(index), page
