"""The interface every driver keeps, and the base class that checks, counts and logs each call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from ..errors import DriverError
from ..stats import CallCounts, EventLog
from .rules import Handle, RuleBook


@runtime_checkable
class Fence(Protocol):
    """A point in the work submitted to a stream.

    Of two fences in one stream, the later one covers the earlier one.

    Attributes:
        stream: a number that identifies the stream. No other stream ever has the same number, not even after this one
            was destroyed.
    """

    stream: int

    def done(self) -> bool:
        """Whether all work before the point has ended. Does not wait."""

    def wait(self) -> None:
        """Block the host until all work before the point has ended."""


@runtime_checkable
class Driver(Protocol):
    """Virtual memory with the operations that the CUDA driver has.

    A call that fails raises ``DriverError`` and changes nothing. Addresses and handles are ints. Sizes are in bytes. A
    driver belongs to one cache, whose lock guards it; but ``fence``, ``order_after`` and ``is_capturing`` are called
    beside other calls.

    Attributes:
        name: ``"cuda"``, ``"host"`` or ``"ledger"``.
        device: the device of tensors over its addresses.
        granularity_bytes: every size and every address is a multiple of this.
        default_page_bytes: size of a handle where the user gives none.
        counts: calls that succeeded, by kind.
        log: the newest calls.
    """

    name: str
    device: torch.device
    granularity_bytes: int
    default_page_bytes: int
    counts: CallCounts
    log: EventLog

    def reserve(self, size_bytes: int) -> int:
        """Reserve a range of addresses without memory; returns its first address."""

    def free_range(self, address: int, size_bytes: int) -> None:
        """Free a reserved range. It must be the whole range, with nothing mapped in it."""

    def create(self, size_bytes: int) -> int:
        """Allocate physical memory that is zero; returns its handle."""

    def release(self, handle: int) -> None:
        """Release a handle. Its memory is freed when it is mapped nowhere any more."""

    def create_pages(self, size_bytes: int, count: int, done: list[int]) -> None:
        """Call ``create`` ``count`` times.

        Each handle is appended to ``done`` as soon as it exists. So after a failure ``done`` has those that were made.
        """

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        """Map a whole handle at an address. It can be accessed after ``set_access``."""

    def map_pages(self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int], done: list[int]) -> None:
        """Call ``map`` and ``set_access`` for one handle after another. Stops at the first failure.

        Args:
            size_bytes: size of each handle.
            addresses, handles: the i-th handle is mapped at the i-th address.
            done: each address is appended when it is mapped. So after a failure it has those to unmap. The last of them
                may be without access then.
        """

    def set_access(self, address: int, size_bytes: int) -> None:
        """Allow reads and writes. The range must consist of whole mapped handles."""

    def unmap(self, address: int, size_bytes: int) -> None:
        """Unmap whole handles. Does **not** wait for work that may still use them."""

    def zero(self, address: int, size_bytes: int) -> None:
        """Fill a range with zeros, on the current stream."""

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy ``size_bytes`` from ``source`` to ``target``, on the current stream."""

    def fence(self) -> Fence | None:
        """A fence after everything submitted to the current stream. None where work is never asynchronous."""

    def order_after(self, fence: Fence) -> None:
        """Make the current stream wait for the fence. The host does not wait."""

    def synchronize(self) -> None:
        """Block the host until all work on the device has ended. Used when a cache is closed only."""

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph."""

    def memory_info(self) -> tuple[int, int]:
        """The device's memory: (available, total) in bytes."""

    def allocated_bytes(self) -> int | None:
        """Physical memory of this driver in bytes, as the system counts it. None where the system cannot tell."""

    def close(self) -> None:
        """Close the driver's files. Idempotent. ``free_range`` works afterwards too."""


class RuledDriver(ABC):
    """The public calls of a driver. Subclasses implement the private ones, which call the system.

    A public call first checks the rules, then calls the system, then updates the books.
    """

    name: str
    device: torch.device
    granularity_bytes: int
    default_page_bytes: int

    def __init__(self) -> None:
        self.counts = CallCounts()
        self.log = EventLog()
        self.book = RuleBook(self.granularity_bytes)

    def reserve(self, size_bytes: int) -> int:
        self.book.check_size("reserve", size_bytes)
        if size_bytes >> 63:  # would wrap around on its way into C
            raise DriverError("reserve", "OUT_OF_MEMORY", f"no machine has {size_bytes} addresses", out_of_memory=True)
        address = self._reserve(size_bytes)
        self.book.ranges[address] = size_bytes
        self.log.add("reserve", address, size_bytes)
        return address

    def free_range(self, address: int, size_bytes: int) -> None:
        self.book.check_free_range(address, size_bytes)
        self._free_range(address, size_bytes)
        del self.book.ranges[address]
        self.log.add("free_range", address, size_bytes)

    def create(self, size_bytes: int) -> int:
        done: list[int] = []
        self.create_pages(size_bytes, 1, done)
        return done[0]

    def release(self, handle: int) -> None:
        entry = self.book.check_release(handle)
        self._release(handle, entry.size_bytes, still_mapped=entry.num_maps > 0)
        self.book.release(handle)
        self.counts.num_release += 1
        self.log.add("release", None, None, handle)

    def create_pages(self, size_bytes: int, count: int, done: list[int]) -> None:
        self.book.check_create(size_bytes)
        create, handles, first = self._create, self.book.handles, len(done)
        try:
            for _ in range(count):
                handle = create(size_bytes)
                handles[handle] = Handle(size_bytes)
                done.append(handle)
        finally:
            self.counts.num_create += len(done) - first
            self.log.extend(("create", None, size_bytes, handle) for handle in done[first:])

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        self.book.check_map(address, size_bytes, handle)
        self._map(address, size_bytes, handle)
        self.book.map(address, size_bytes, handle)
        self.counts.num_map += 1
        self.log.add("map", address, size_bytes, handle)

    def map_pages(self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int], done: list[int]) -> None:
        book, map_, set_access = self.book, self._map, self._set_access
        num_mapped = num_accessible = 0
        try:
            for address, handle in zip(addresses, handles, strict=True):
                book.check_map(address, size_bytes, handle)
                map_(address, size_bytes, handle)
                mapping = book.map(address, size_bytes, handle)
                done.append(address)
                num_mapped += 1
                set_access(address, size_bytes)
                mapping.accessible = True
                num_accessible += 1
        finally:
            self.counts.num_map += num_mapped
            self.counts.num_set_access += num_accessible
            for index in range(num_mapped):
                self.log.add("map", addresses[index], size_bytes, handles[index])
                if index < num_accessible:
                    self.log.add("set_access", addresses[index], size_bytes)

    def set_access(self, address: int, size_bytes: int) -> None:
        mappings = self.book.whole_mappings("set_access", address, size_bytes)
        self._set_access(address, size_bytes)
        for mapping in mappings:
            mapping.accessible = True
        self.counts.num_set_access += 1
        self.log.add("set_access", address, size_bytes)

    def unmap(self, address: int, size_bytes: int) -> None:
        mappings = self.book.whole_mappings("unmap", address, size_bytes)
        self._unmap(address, size_bytes)
        freed = [(mapping.handle, mapping.size_bytes) for mapping in mappings if self.book.unmap(mapping)]
        self.counts.num_unmap += 1
        self.log.add("unmap", address, size_bytes)
        if freed:
            self._after_unmap(freed)

    def zero(self, address: int, size_bytes: int) -> None:
        self.book.check_accessible("zero", address, size_bytes)
        self._zero(address, size_bytes)
        self.counts.num_zero += 1

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self.book.check_accessible("copy", source, size_bytes)
        self.book.check_accessible("copy", target, size_bytes)
        self._copy(target, source, size_bytes)
        self.counts.num_copy += 1

    # -- streams: for a system without asynchronous work and without capture ------------------------------------------
    def fence(self) -> Fence | None:
        return None

    def order_after(self, fence: Fence) -> None:  # noqa: B027
        pass

    def synchronize(self) -> None:  # noqa: B027
        pass

    def is_capturing(self) -> bool:
        return False

    # -- calls of the system -----------------------------------------------------------------------------------------
    def _after_unmap(self, freed: list[tuple[int, int]]) -> None:  # noqa: B027 - CUDA has done it by itself
        """Free memory of handles that were released before their last mapping went.

        Args:
            freed: (handle, bytes) of each.
        """

    @abstractmethod
    def _reserve(self, size_bytes: int) -> int: ...
    @abstractmethod
    def _free_range(self, address: int, size_bytes: int) -> None: ...
    @abstractmethod
    def _create(self, size_bytes: int) -> int: ...
    @abstractmethod
    def _release(self, handle: int, size_bytes: int, still_mapped: bool) -> None: ...
    @abstractmethod
    def _map(self, address: int, size_bytes: int, handle: int) -> None: ...
    @abstractmethod
    def _set_access(self, address: int, size_bytes: int) -> None: ...
    @abstractmethod
    def _unmap(self, address: int, size_bytes: int) -> None: ...
    @abstractmethod
    def _zero(self, address: int, size_bytes: int) -> None: ...
    @abstractmethod
    def _copy(self, target: int, source: int, size_bytes: int) -> None: ...
