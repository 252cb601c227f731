"""Virtual memory of the operating system (Linux): pages in a memfd, mapped with ``mmap`` into reserved addresses.

Pages and page faults are real, so the allocator can be tested without a GPU.

``fallocate`` allocates a page when it is created. So a shortage of memory is an error of ``create`` and not a SIGBUS at
the first access. A released page is punched out of the file. So the file's allocated blocks are the memory in use.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count

import torch

from ..errors import ConfigError, DriverError
from ..machine import available_and_total_bytes
from . import native
from .host_calls import MAP_FIXED, PROT_NONE, READ_WRITE, RESERVED, map_range, protect, punch, unmap_range
from .host_errors import failed, refused, soft_limit, too_many_mappings
from .ruled import RuledDriver
from .rules import Mapping

_RANGE_ALIGNMENT_BYTES = 2 << 20
# Spare mappings, removed when the process reaches its limit of mappings. At that limit every ``mmap`` fails, also that
# of an ``unmap`` and of the interpreter's next allocation.
_NUM_SPARE = 128
# Memory left to the rest of the system. Without it, fallocate would take all, and the kernel would kill a process.
_KEEP_FREE_BYTES = 64 << 20
_BYTES_BETWEEN_CHECKS = 64 << 20
_FIRST_IMPORTED = 1 << 62
# Of an exported file: nobody can cut it, so that an importer's reads never fail.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class HostDriver(RuledDriver):
    """Virtual memory of the operating system (Linux). A handle is an offset in the memfd, plus one.

    A handle that was exported or imported has a file of its own, since a file descriptor gives away all of its file.
    """

    name = "host"
    default_page_bytes = 2 << 20

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.granularity_bytes = mmap.PAGESIZE
        self.why_not_native = native.why_not()
        self._batches = None if self.why_not_native else native.HostBatches()
        super().__init__()
        try:
            self._fd = os.memfd_create("vattn", os.MFD_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"no memory can be had on the CPU: {refused('memfd_create', error)}") from error
        _DRIVERS.add(self)
        self._end = 0
        self._holes: dict[int, list[int]] = {}  # size -> offsets that were punched out and can be used again
        self._files: dict[int, int] = {}  # handle -> the file of its own
        self._imported = count(_FIRST_IMPORTED)  # the next handles of other drivers' memory
        self._may_take_bytes = 0  # so many may be allocated before the system's free memory is read again
        self._spare: int | None = None
        try:
            self._hold_spare("mmap")
        except BaseException:
            self.close()
            raise

    # -- address ranges ------------------------------------------------------------------------------------------
    def _reserve(self, size_bytes: int) -> int:
        wide = size_bytes + _RANGE_ALIGNMENT_BYTES
        start = map_range(None, wide, PROT_NONE, RESERVED, -1, 0)
        address = -(-start // _RANGE_ALIGNMENT_BYTES) * _RANGE_ALIGNMENT_BYTES
        for surplus, length in ((start, address - start), (address + size_bytes, start + wide - address - size_bytes)):
            if length:
                unmap_range(surplus, length)
        return address

    def _free_range(self, address: int, size_bytes: int) -> None:
        unmap_range(address, size_bytes)

    # -- handles -------------------------------------------------------------------------------------------------
    def _create(self, size_bytes: int) -> int:
        self._num_allowed(size_bytes)
        (handle,) = self._unused(size_bytes, 1)
        try:
            os.posix_fallocate(self._fd, handle - 1, size_bytes)
        except OSError as error:
            raise refused("fallocate", error) from error
        self._note_created(size_bytes, 1)
        return handle

    def _create_batch(self, size_bytes: int, count: int) -> tuple[list[int], BaseException | None]:
        if self._batches is None or self._has_replaced(HostDriver._create):
            return super()._create_batch(size_bytes, count)
        return self._create_natively(self._batches, size_bytes, count)

    def _create_natively(
        self, batches: native.HostBatches, size_bytes: int, count: int
    ) -> tuple[list[int], BaseException | None]:
        made: list[int] = []
        try:
            while len(made) < count:
                handles = self._unused(size_bytes, min(count - len(made), self._num_allowed(size_bytes)))
                num_made, failure = batches.create(self._fd, size_bytes, handles)
                self._note_created(size_bytes, num_made)
                made += handles[:num_made]
                if failure:
                    raise failed(*failure)
        except BaseException as error:
            return made, error
        return made, None

    def _num_allowed(self, size_bytes: int) -> int:
        """How many pages, one at least, may be created before the system's free memory is read again."""
        if size_bytes > self._may_take_bytes:
            spare_bytes = self.memory_info()[0] - _KEEP_FREE_BYTES
            if size_bytes > spare_bytes:
                detail = f"the system has {max(spare_bytes, 0)} bytes to spare"
                raise DriverError("fallocate", "ENOMEM", detail, out_of_memory=True)
            self._may_take_bytes = max(size_bytes, min(spare_bytes, _BYTES_BETWEEN_CHECKS))
        return self._may_take_bytes // size_bytes

    def _unused(self, size_bytes: int, count: int) -> list[int]:
        """The handles that the next pages get, ``count`` of them; fewer where a file may not be that large."""
        holes = self._holes.get(size_bytes, [])
        offsets = holes[: -count - 1 : -1]
        offsets += range(self._end, self._end + (count - len(offsets)) * size_bytes, size_bytes)
        limit = soft_limit(resource.RLIMIT_FSIZE)
        if limit is not None:  # fallocate could end the process with SIGXFSZ
            within = [offset + size_bytes <= limit for offset in offsets]
            if not within[0]:
                raise failed("fallocate", errno.EFBIG)
            offsets = offsets[: within.index(False)] if False in within else offsets
        return [offset + 1 for offset in offsets]

    def _note_created(self, size_bytes: int, count: int) -> None:
        """The first so many of ``_unused`` are pages now."""
        holes = self._holes.get(size_bytes, [])
        num_holes = min(count, len(holes))
        del holes[len(holes) - num_holes :]
        self._end += (count - num_holes) * size_bytes
        self._may_take_bytes -= count * size_bytes

    def _release(self, handle: int, size_bytes: int, still_mapped: bool) -> None:
        if not still_mapped:
            self._free(handle, size_bytes)

    def _after_unmap(self, freed: list[tuple[int, int]]) -> None:
        for handle, size_bytes in freed:
            self._free(handle, size_bytes)

    def _free(self, handle: int, size_bytes: int) -> None:
        if (own := self._files.pop(handle, None)) is not None:
            os.close(own)
        else:
            punch(self._fd, handle - 1, size_bytes)
        if handle < _FIRST_IMPORTED:
            self._holes.setdefault(size_bytes, []).append(handle - 1)

    # -- handles of two processes ----------------------------------------------------------------------------------
    def _export(self, handle: int, size_bytes: int) -> int:
        try:
            if handle not in self._files:
                self._move_to_own_file(handle, size_bytes)
            return os.dup(self._files[handle])
        except OSError as error:
            raise refused("export_handle", error) from error

    def _move_to_own_file(self, handle: int, size_bytes: int) -> None:
        """The handle and its mappings stay what they are, on another file. It has its memory twice for a moment."""
        self._num_allowed(size_bytes)
        self._may_take_bytes -= size_bytes
        mappings = [mapping for mapping in self.book.mappings.values() if mapping.handle == handle]
        own = os.memfd_create("vattn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(own, 0, size_bytes)
            fcntl.fcntl(own, fcntl.F_ADD_SEALS, _SEALS)
            num_copied = 0
            while num_copied < size_bytes:
                num_copied += os.sendfile(own, self._fd, handle - 1 + num_copied, size_bytes - num_copied)
            self._remap(mappings, own, 0)
            punch(self._fd, handle - 1, size_bytes)
        except BaseException:
            self._remap(mappings, self._fd, handle - 1)
            os.close(own)
            raise
        self._files[handle] = own

    def _remap(self, mappings: list[Mapping], fd: int, offset: int) -> None:
        """In one step each: others may be reading there."""
        for mapping in mappings:
            prot = PROT_NONE if not mapping.accessible else READ_WRITE if mapping.writable else mmap.PROT_READ
            map_range(mapping.address, mapping.size_bytes, prot, mmap.MAP_SHARED | MAP_FIXED, fd, offset)

    def _import(self, fd: int, size_bytes: int) -> int:
        try:
            is_exported = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if not is_exported or os.fstat(fd).st_size != size_bytes:
                detail = f"file descriptor {fd} is no exported handle of {size_bytes} bytes"
                raise DriverError("import_handle", "INVALID_VALUE", detail)
            own = os.dup(fd)
        except OSError as error:  # EINVAL: a file of another kind
            raise refused("import_handle", error) from error
        handle = next(self._imported)
        self._files[handle] = own
        return handle

    # -- mappings ------------------------------------------------------------------------------------------------
    def _map(self, address: int, size_bytes: int, handle: int) -> None:
        self._hold_spare("mmap")
        flags = mmap.MAP_SHARED | MAP_FIXED
        own = self._files.get(handle)
        fd, offset = (self._fd, handle - 1) if own is None else (own, 0)
        with self._at_the_limit("mmap"):
            map_range(address, size_bytes, PROT_NONE, flags, fd, offset)

    def _map_batch(
        self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int]
    ) -> tuple[int, BaseException | None]:
        is_in_one_file = not self._files or self._files.keys().isdisjoint(handles)
        if self._batches is None or self._has_replaced(HostDriver._map, HostDriver._set_access) or not is_in_one_file:
            return super()._map_batch(size_bytes, addresses, handles)
        return self._map_natively(self._batches, size_bytes, addresses, handles)

    def _map_natively(
        self, batches: native.HostBatches, size_bytes: int, addresses: Sequence[int], handles: Sequence[int]
    ) -> tuple[int, BaseException | None]:
        num_calls = 0
        try:
            self._hold_spare("mmap")
            num_calls, failure = batches.map(self._fd, size_bytes, addresses, handles)
            if failure:
                with self._at_the_limit(failure[0]):
                    raise failed(*failure)
        except BaseException as error:
            return num_calls, error
        return num_calls, None

    def _set_access(self, address: int, size_bytes: int, writable: bool) -> None:
        with self._at_the_limit("mprotect"):
            protect(address, size_bytes, READ_WRITE if writable else mmap.PROT_READ)

    def _unmap(self, address: int, size_bytes: int) -> None:
        for attempt in range(2):
            try:
                map_range(address, size_bytes, PROT_NONE, RESERVED | MAP_FIXED, -1, 0)
                return
            except DriverError as error:
                # Removing a mapping may split another one, so it fails at the limit. The spare ones make room.
                if not error.out_of_memory or attempt:
                    raise
                self._drop_spare()

    # -- data ----------------------------------------------------------------------------------------------------
    def _zero(self, address: int, size_bytes: int) -> None:
        ctypes.memset(address, 0, size_bytes)

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        ctypes.memmove(target, source, size_bytes)

    # -- the rest of the interface -------------------------------------------------------------------------------
    def memory_info(self) -> tuple[int, int]:
        try:
            return available_and_total_bytes()
        except OSError as error:
            raise refused("open /proc/meminfo", error) from error

    def allocated_bytes(self) -> int | None:
        """Bytes in allocated blocks of the memfds, but for imported ones. 0 after ``close``."""
        files = [own for handle, own in self._files.items() if handle < _FIRST_IMPORTED]
        return sum(os.fstat(fd).st_blocks * 512 for fd in (self._fd, *files) if fd >= 0)

    def close(self) -> None:
        if self._fd >= 0:
            self._close_files()
            self._drop_spare()

    def _close_files(self) -> None:
        files = [self._fd, *self._files.values()]
        self._fd, self._files = -1, {}
        for fd in files:
            if fd >= 0:
                os.close(fd)

    # -- the limit of mappings -----------------------------------------------------------------------------------
    def _hold_spare(self, call: str) -> None:
        """Make the spare mappings. Raises the error of ``call`` where the limit leaves no room for them."""
        if self._spare is not None:
            return
        with self._at_the_limit(call):
            self._spare = map_range(None, _NUM_SPARE * mmap.PAGESIZE, PROT_NONE, RESERVED, -1, 0)
            for index in range(0, _NUM_SPARE, 2):  # the kernel merges neighbours of equal protection into one mapping
                protect(self._spare + index * mmap.PAGESIZE, mmap.PAGESIZE, mmap.PROT_READ)

    @contextmanager
    def _at_the_limit(self, call: str) -> Iterator[None]:
        """Where the block reaches the limit of mappings: remove the spare ones, and raise an error that explains it."""
        try:
            yield
        except DriverError as error:
            if not error.out_of_memory:
                raise
            self._drop_spare()
            raise too_many_mappings(call) from error

    def _drop_spare(self) -> None:
        if self._spare is not None:
            with suppress(DriverError):
                unmap_range(self._spare, _NUM_SPARE * mmap.PAGESIZE)
            self._spare = None


_DRIVERS: weakref.WeakSet[HostDriver] = weakref.WeakSet()


def _begin_in_a_child() -> None:
    """After a fork, close the child's copies of the files: they would keep the pages after the parent's end."""
    for driver in tuple(_DRIVERS):
        driver._close_files()


os.register_at_fork(after_in_child=_begin_in_a_child)
