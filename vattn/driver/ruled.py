"""What the calls of all drivers have in common: each is checked by the rules, made, counted and logged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from ..errors import DriverError
from ..stats import CallCounts, EventLog
from .base import Fence
from .rules import Handle, RuleBook


class RuledDriver(ABC):
    """The public calls of a driver. Subclasses implement the private ones, which call the system.

    A public call first checks the rules, then calls the system, then updates the books.

    Attributes:
        why_not_native: why batches of calls are made from Python. None: the library of ``native/`` makes them.
    """

    name: str
    device: torch.device
    granularity_bytes: int
    default_page_bytes: int
    why_not_native: str | None = "this driver makes no calls"

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
        handles, error = self._create_batch(size_bytes, count)
        self.book.handles.update([(handle, Handle(size_bytes)) for handle in handles])
        done += handles
        self.counts.num_create += len(handles)
        self.log.extend([("create", None, size_bytes, handle) for handle in handles])
        if error is not None:
            raise error

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        base = self.book.check_map(address, size_bytes, handle)
        self._map(address, size_bytes, handle)
        self.book.map(address, size_bytes, handle, base)
        self.counts.num_map += 1
        self.log.add("map", address, size_bytes, handle)

    def map_pages(self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int], done: list[int]) -> None:
        if len(addresses) != len(handles):
            raise ValueError(f"map_pages got {len(addresses)} addresses, {len(handles)} handles: one list is shorter")
        book, log, mappings = self.book, self.log.add, []
        refusal: DriverError | None = None
        try:
            for address, handle in zip(addresses, handles, strict=True):
                base = book.check_map(address, size_bytes, handle)
                mappings.append(book.map(address, size_bytes, handle, base))
        except DriverError as error_of_next:  # those before it are mapped
            refusal = error_of_next
            addresses, handles = addresses[: len(mappings)], handles[: len(mappings)]
        num_calls, failure = self._map_batch(size_bytes, addresses, handles)
        num_accessible, num_mapped = num_calls // 2, (num_calls + 1) // 2
        while len(mappings) > num_mapped:
            book.unmap(mappings.pop())
        done += addresses[:num_mapped]
        for index, mapping in enumerate(mappings):
            log("map", mapping.address, size_bytes, mapping.handle)
            if index < num_accessible:
                mapping.accessible = mapping.writable = True
                log("set_access", mapping.address, size_bytes)
        self.counts.num_map += num_mapped
        self.counts.num_set_access += num_accessible
        if error := failure or refusal:
            raise error

    def set_access(self, address: int, size_bytes: int, writable: bool = True) -> None:
        mappings = self.book.whole_mappings("set_access", address, size_bytes)
        self._set_access(address, size_bytes, writable)
        for mapping in mappings:
            mapping.accessible, mapping.writable = True, writable
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

    def export_handle(self, handle: int) -> int:
        entry = self.book.check_export(handle)
        fd = self._export(handle, entry.size_bytes)
        self.log.add("export", None, entry.size_bytes, handle)
        return fd

    def import_handle(self, fd: int, size_bytes: int) -> int:
        self.book.check_size("import_handle", size_bytes)
        if fd < 0:
            raise DriverError("import_handle", "INVALID_VALUE", f"{fd} is no file descriptor")
        handle = self._import(fd, size_bytes)
        self.book.handles[handle] = Handle(size_bytes, imported=True)
        self.log.add("import", None, size_bytes, handle)
        return handle

    def zero(self, address: int, size_bytes: int) -> None:
        self.book.check_accessible("zero", address, size_bytes)
        self._zero(address, size_bytes)
        self.counts.num_zero += 1

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self.book.check_accessible("copy", source, size_bytes, writing=False)
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
    def _has_replaced(self, *calls: Callable[..., object]) -> bool:
        """Whether a subclass, or a test, has put something of its own in the place of one of these private calls.

        Then a batch must be made of them, one by one.
        """
        kind, own = type(self), self.__dict__
        for call in calls:  # noqa: SIM110 - asked at every batch, and a generator takes three times as long
            if call.__name__ in own or getattr(kind, call.__name__) is not call:
                return True
        return False

    def _create_batch(self, size_bytes: int, count: int) -> tuple[list[int], BaseException | None]:
        """``_create`` so many times, up to the first failure. Returns the handles and what failed then."""
        handles: list[int] = []
        try:
            for _ in range(count):
                handles.append(self._create(size_bytes))  # noqa: PERF401 - those before a failure count
        except BaseException as error:  # the caller notes what was done before it raises this
            return handles, error
        return handles, None

    def _map_batch(
        self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int]
    ) -> tuple[int, BaseException | None]:
        """``_map`` and ``_set_access`` for one handle after another, up to the first failure.

        Returns how many of these calls succeeded, both kinds counted, and what failed then.
        """
        num_calls = 0
        try:
            for address, handle in zip(addresses, handles, strict=True):
                self._map(address, size_bytes, handle)
                num_calls += 1
                self._set_access(address, size_bytes, True)
                num_calls += 1
        except BaseException as error:
            return num_calls, error
        return num_calls, None

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
    def _set_access(self, address: int, size_bytes: int, writable: bool) -> None: ...
    @abstractmethod
    def _unmap(self, address: int, size_bytes: int) -> None: ...
    @abstractmethod
    def _export(self, handle: int, size_bytes: int) -> int: ...
    @abstractmethod
    def _import(self, fd: int, size_bytes: int) -> int: ...
    @abstractmethod
    def _zero(self, address: int, size_bytes: int) -> None: ...
    @abstractmethod
    def _copy(self, target: int, source: int, size_bytes: int) -> None: ...
