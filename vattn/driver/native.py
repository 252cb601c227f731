"""The library of ``native/``: many calls of the system in one, during which other Python threads run.

It is used where it was built. ``VATTN_NATIVE=0`` in the environment does without it: the drivers then make the same
calls one by one, from Python.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

_PATH = Path(__file__).with_name("_native.abi3.so")
_ABI = 1  # of native/native.h
_SWITCH = "VATTN_NATIVE"


class _Failure(ctypes.Structure):
    _fields_ = (("call", ctypes.c_char_p), ("code", ctypes.c_int32))


class _Cuda(ctypes.Structure):
    _fields_ = (("create", ctypes.c_void_p), ("map", ctypes.c_void_p), ("set_access", ctypes.c_void_p))


def why_not() -> str | None:
    """Why the library is not used, as a text for the user. None: it is. Asked whenever a driver is opened."""
    if os.environ.get(_SWITCH) == "0":
        return f"{_SWITCH} is 0"
    return _library()[1]


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL, None] | tuple[None, str]:
    """The library, or why there is none. Looked up once per process."""
    if not _PATH.exists():
        return None, "it is not built: install vattn where there is a C++ compiler, or run make native in a clone"
    try:
        library = ctypes.CDLL(str(_PATH))
        abi = library.vattn_abi()
    except (OSError, AttributeError) as error:
        return None, f"it cannot be loaded: {error}"
    if abi != _ABI:
        return None, f"it was built from other sources (interface {abi}, not {_ABI}): run make native"
    pages = [ctypes.c_uint64, ctypes.c_int64]  # size of each, how many
    result, pointer = ctypes.POINTER(_Failure), ctypes.c_void_p
    for name, arguments in (
        ("vattn_host_create", [ctypes.c_int, *pages, pointer, result]),
        ("vattn_host_map", [ctypes.c_int, *pages, pointer, pointer, result]),
        ("vattn_cuda_create", [pointer, pointer, *pages, pointer, result]),
        ("vattn_cuda_map", [pointer, pointer, *pages, pointer, pointer, result]),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int64
    return library, None


class _Batches:
    """Calls of the library. One thread at a time, as a driver.

    Each method returns how many calls of the system succeeded, and what failed then: (call, code), or None.
    """

    def __init__(self) -> None:
        library, reason = _library()
        assert library is not None, reason
        self._library = library
        self._failure = _Failure()
        self._result = ctypes.pointer(self._failure)

    def _end(self, num_calls: int, num_asked: int) -> tuple[int, tuple[str, int] | None]:
        if num_calls == num_asked:
            return num_calls, None
        assert self._failure.call is not None
        return num_calls, (self._failure.call.decode(), self._failure.code)


class HostBatches(_Batches):
    """Of the operating system. A handle is an offset in the file, plus one."""

    def create(self, fd: int, size_bytes: int, handles: Sequence[int]) -> tuple[int, tuple[str, int] | None]:
        """``fallocate`` for each handle."""
        numbers = array("Q", handles)
        address, count = numbers.buffer_info()
        return self._end(self._library.vattn_host_create(fd, size_bytes, count, address, self._result), count)

    def map(
        self, fd: int, size_bytes: int, addresses: Sequence[int], handles: Sequence[int]
    ) -> tuple[int, tuple[str, int] | None]:
        """Map, then grant access, page after page: two calls each."""
        places, numbers = array("Q", addresses), array("Q", handles)
        where, count = places.buffer_info()
        what, _ = numbers.buffer_info()
        return self._end(self._library.vattn_host_map(fd, size_bytes, count, where, what, self._result), 2 * count)


class CudaBatches(_Batches):
    """Of the CUDA driver.

    Args:
        functions: addresses of ``cuMemCreate``, ``cuMemMap`` and ``cuMemSetAccess``.
        properties, access: addresses of the ``CUmemAllocationProp`` and the ``CUmemAccessDesc`` that they are called
            with. The caller keeps both alive.
    """

    def __init__(self, functions: Sequence[int], properties: int, access: int) -> None:
        super().__init__()
        self._cuda = _Cuda(*functions)
        self._functions = ctypes.addressof(self._cuda)
        self._properties, self._access = properties, access

    def create(self, size_bytes: int, count: int, handles: list[int]) -> tuple[int, tuple[str, int] | None]:
        """``cuMemCreate``, ``count`` times; the new handles are appended to ``handles``."""
        numbers = array("Q", bytes(8 * count))
        num_calls = self._library.vattn_cuda_create(
            self._functions, self._properties, size_bytes, count, numbers.buffer_info()[0], self._result
        )
        handles += numbers[:num_calls]
        return self._end(num_calls, count)

    def map(
        self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int]
    ) -> tuple[int, tuple[str, int] | None]:
        """``cuMemMap``, then ``cuMemSetAccess``, page after page: two calls each."""
        places, numbers = array("Q", addresses), array("Q", handles)
        where, count = places.buffer_info()
        what, _ = numbers.buffer_info()
        num_calls = self._library.vattn_cuda_map(
            self._functions, self._access, size_bytes, count, where, what, self._result
        )
        return self._end(num_calls, 2 * count)
