"""What a cache owns of the driver, and how it ends: reservations, page pool, page table."""

from __future__ import annotations

import os
import sys

import torch

from ..driver import Driver
from ..errors import ConfigError, DriverError
from ..interrupts import finish
from ..layout import GroupPlan, KVLayout
from .guard import Guard
from .page_sizes import PageSizes
from .page_table import PageTable
from .pages import Page, PhysicalPagePool
from .planner import OverRead
from .reservation import Reservation
from .tensors import tensor_from_address

_DEFAULT_MEMORY_SHARE = 0.9


def choose_page_bytes(driver: Driver, page_bytes: int | None) -> int:
    """The page size asked for, or the driver's own; ConfigError where the driver cannot have it."""
    granularity = driver.granularity_bytes
    if page_bytes is None:
        return driver.default_page_bytes
    if page_bytes % granularity:
        raise ConfigError(
            f"page_bytes must be a multiple of the {driver.name} driver's {granularity}, got {page_bytes}"
        )
    return page_bytes


def choose_page_sizes(page_bytes: int, max_page_bytes: int | None) -> PageSizes:
    """Pages of up to ``max_page_bytes``; None: of one size. ConfigError where that is not the page size times a power
    of two."""
    if max_page_bytes is None:
        return PageSizes()
    largest, rest = divmod(max_page_bytes, page_bytes)
    if rest or largest & (largest - 1) or not largest:
        raise ConfigError(
            f"max_page_bytes must be page_bytes, {page_bytes}, times a power of two, got {max_page_bytes}"
        )
    return PageSizes(largest)


def choose_memory_limit(driver: Driver, memory_limit: int | None, page_bytes: int) -> int:
    """The limit asked for, or a share of what is free now; ConfigError where it does not hold a page."""
    if memory_limit is None:
        available, _ = driver.memory_info()
        memory_limit = int(available * _DEFAULT_MEMORY_SHARE)
    if memory_limit < page_bytes:
        raise ConfigError(f"memory_limit must be at least one page of {page_bytes} bytes, got {memory_limit}")
    return memory_limit


class Backing:
    """Owns the driver, the page pool and one reservation per layer group.

    Tensors over the addresses hold a reference to it: pages are freed by ``close``, or when nobody refers to it any
    more; the addresses only then.

    Args:
        page_bytes, max_page_bytes, memory_limit: None for the driver's own page size, for pages of one size, and for a
            share of the memory that is free now.
        guard: whether shared pages are kept read-only.

    Raises:
        ConfigError: the driver cannot have such pages, the limit holds none, or there are too few addresses.
    """

    def __init__(
        self,
        driver: Driver,
        layout: KVLayout,
        max_slots: int,
        page_bytes: int | None,
        max_page_bytes: int | None,
        memory_limit: int | None,
        over_read: OverRead,
        guard: bool = False,
    ) -> None:
        self.driver = driver
        self.page_bytes = choose_page_bytes(driver, page_bytes)
        sizes = choose_page_sizes(self.page_bytes, max_page_bytes)
        self.max_page_bytes = sizes.largest * self.page_bytes
        limit_bytes = choose_memory_limit(driver, memory_limit, self.page_bytes)
        self.pool = PhysicalPagePool(driver, self.page_bytes, limit_bytes)
        self.guard = Guard(driver, self.page_bytes) if guard else None
        self.plans: list[GroupPlan] = [
            layout.plan(group, max_slots, self.page_bytes, over_read.tokens) for group in layout.groups
        ]
        self.reservations: list[Reservation] = []
        self._table: PageTable | None = None  # none where there are too few addresses
        self.closed = False
        self._pid = os.getpid()
        try:
            for plan in self.plans:
                self.reservations.append(Reservation(driver, self.pool, plan.size_bytes, self.guard))
        except DriverError as error:
            self._free_ranges()
            if not error.out_of_memory:
                raise
            total = sum(plan.size_bytes for plan in self.plans)
            raise ConfigError(
                f"{max_slots} slots of {layout.max_seq_len} tokens need {total / (1 << 40):.3g} TiB of addresses, "
                f"more than the driver can reserve ({error}): lower max_slots or max_seq_len"
            ) from error
        lanes = [
            (reservation, lane)
            for reservation, plan in zip(self.reservations, self.plans, strict=True)
            for lane in plan.lanes
        ]
        self.table = self._table = PageTable(driver, self.pool, lanes, max_slots, sizes, over_read, self.guard)

    @property
    def all_reservations(self) -> list[Reservation]:
        """Of the groups, and where the page table puts a page aside."""
        aside = None if self._table is None else self._table.aside
        return self.reservations if aside is None else [*self.reservations, aside]

    @property
    def reserved_bytes(self) -> int:
        return sum(reservation.size_bytes for reservation in self.all_reservations)

    @property
    def num_mapped(self) -> int:
        """Units of pages, each mapping counted."""
        return sum(reservation.num_pages for reservation in self.all_reservations)

    def views(self, dtype: torch.dtype) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """(K, V) by layer, each ``[max_slots, max_seq_len, num_kv_heads, head_dim]``, over the reserved addresses."""
        k: dict[int, torch.Tensor] = {}
        v: dict[int, torch.Tensor] = {}
        # Views made in inference mode could not be written outside it; those made without gradients refuse to record
        # them, where a cache would keep the graph of every step alive.
        with torch.inference_mode(False), torch.no_grad():
            for reservation, plan in zip(self.reservations, self.plans, strict=True):
                base = tensor_from_address(reservation.address, plan.size_bytes, dtype, self.driver.device, self)
                for views, tensors in ((k, plan.k), (v, plan.v)):
                    for layer, tensor in tensors.items():
                        views[layer] = base.as_strided(tensor.shape, tensor.strides, tensor.offset)
        return k, v

    # -- looking -------------------------------------------------------------------------------------------------
    def clear_strays(self) -> None:
        """Try again what failed undos left behind: to unmap it, and to set the access to what is shared."""
        for reservation in self.all_reservations:
            for index in tuple(reservation.strays):
                reservation.clear_stray(index)
        if self.guard is not None:
            self.guard.settle_all()

    def check_integrity(self) -> None:
        """Page table and pool agree, page by page."""
        self.pool.check_integrity()
        maps: dict[Page, set[int]] = {}
        for reservation in self.all_reservations:
            both = sorted([*reservation.pages.items(), *reservation.strays.items()], key=lambda item: item[0])
            end = 0
            for index, page in both:
                assert index >= end, f"{page} is mapped over another page"
                end = index + page.size
                maps.setdefault(page, set()).add(reservation.address_of(index))
            assert end * self.page_bytes <= reservation.size_bytes, "a page is mapped past the end of its addresses"
            assert reservation.num_pages == sum(page.size for _, page in both), "the count of mapped pages is off"
        assert self.table.aside is None or not self.table.aside.pages, "a page was left aside"
        assert maps.keys() <= self.pool.pages, "a page that the pool does not know is mapped"
        for page in self.pool.pages:
            assert set(page.maps) == maps.get(page, set()), f"{page} is mapped at other addresses than it says"
            assert len(set(page.maps)) == len(page.maps), f"{page} lists an address twice"
        if self.guard is not None:
            self.guard.check_integrity(self.pool.pages)
        book = getattr(self.driver, "book", None)
        if book is not None:
            num_maps = sum(map(len, maps.values()))
            assert len(book.mappings) == num_maps, "the driver has mappings that the cache does not know"
            assert len(book.handles) == len(self.pool.pages), "the driver has handles that the pool does not know"
            for page in self.pool.pages:
                size_bytes = book.handles[page.handle].size_bytes
                assert size_bytes == page.size * self.page_bytes, f"{page} is a handle of {size_bytes} bytes"
                for mapping in (book.mappings[address] for address in page.maps):
                    expected = mapping.accessible and mapping.address not in page.read_only
                    assert mapping.writable == expected, f"{page} is writable at {mapping.address:#x}, or should be"

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
            for reservation in self.all_reservations:
                for table in (reservation.pages, reservation.strays):
                    for index in tuple(table):
                        try:
                            reservation.unmap_finally(index, table)
                        except DriverError as error:
                            failures.append(error)
            failures += self.pool.release_unmapped()
            if not self.pool.pages:
                self.closed = True
                self.driver.close()
                break
        if failures:
            raise failures[0]

    def _free_ranges(self) -> None:
        if self._table is not None and self._table.aside is not None:
            self._table.aside.free()
            self._table.aside = None
        while self.reservations:
            self.reservations.pop().free()

    def __del__(self) -> None:
        # At the interpreter's end the system takes everything back; a forked child must not touch its parent's pages.
        if sys.is_finalizing() or os.getpid() != getattr(self, "_pid", None):
            return
        finish(self._end)

    def _end(self) -> None:
        try:
            self.close()
        finally:
            if self.closed:
                self._free_ranges()
