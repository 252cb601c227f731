"""The operating system's calls on address ranges and files; one that fails raises ``DriverError``."""

from __future__ import annotations

import ctypes
import mmap

from .host_errors import failed

# From Linux's uapi headers. They are the same on every architecture that PyTorch supports.
MAP_FIXED = 0x10
PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_MADV_DONTFORK = 10

RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_range(address: int | None, size_bytes: int, prot: int, flags: int, fd: int, offset: int) -> int:
    """``mmap``, out of the reach of forked children; returns the first address."""
    result = _libc.mmap(address, size_bytes, prot, flags, fd, offset)
    if result == _MAP_FAILED:
        raise failed("mmap")
    # A forked child must not get this mapping: it is shared, so the child's writes would change our data.
    if _libc.madvise(result, size_bytes, _MADV_DONTFORK):
        failure = failed("madvise")
        if not flags & MAP_FIXED:
            _libc.munmap(result, size_bytes)
        raise failure
    return result or 0


def unmap_range(address: int, size_bytes: int) -> None:
    """``munmap``."""
    if _libc.munmap(address, size_bytes):
        raise failed("munmap")


def protect(address: int, size_bytes: int, prot: int) -> None:
    """``mprotect``."""
    if _libc.mprotect(address, size_bytes, prot):
        raise failed("mprotect")


def punch(fd: int, offset: int, size_bytes: int) -> None:
    """Give the memory behind a part of a file back; the file keeps its size."""
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, size_bytes):
        raise failed("fallocate")
