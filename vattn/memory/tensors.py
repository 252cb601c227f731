"""An address range as a torch tensor, and arrays of the host on the device.

The tensor comes through DLPack, which does not look at what lies behind the addresses. The struct is that of DLPack 0.8
(``dlpack.h``). ``__cuda_array_interface__`` would ask the driver about the pointer and fail on addresses with nothing
mapped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

_KDL_CPU, _KDL_CUDA = 1, 2
_KDL_UINT = 1


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _Allocated(ctypes.Structure):
    """The managed tensor and the shape that it points to, in one piece of C memory."""

    _fields_ = [("managed", _DLManagedTensor), ("shape", ctypes.c_int64)]


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
# The deleter frees the struct, and nothing else: it runs whenever a storage dies, at the interpreter's end or with an
# exception on its way too, when a callback into Python would do harm.
_free = ctypes.cast(_libc.free, ctypes.c_void_p).value

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class BackedRows:
    """K and V of the rows that slots' pages hold, in storages of their own, kept while the pages stay the same.

    The storage of the full views has addresses with nothing behind them, which ends what copies whole storages.
    """

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._known: dict[int, tuple[int, dict[int, tuple[torch.Tensor, torch.Tensor]]]] = {}

    def of(
        self, slot: int, layer: int, reach: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(k, v), each ``[reach, num_kv_heads, head_dim]``, of a slot whose pages hold ``reach`` rows, out of the full
        views of a layer."""
        known = self._known.get(slot)
        if known is None or known[0] != reach:
            known = self._known[slot] = (reach, {})
        pair = known[1].get(layer)
        if pair is None:
            pair = _alone(k[slot, :reach], self._owner), _alone(v[slot, :reach], self._owner)
            known[1][layer] = pair
        return pair


def _alone(view: torch.Tensor, owner: object) -> torch.Tensor:
    """The elements of ``view``, of the same shape and strides, in a storage that is theirs alone.

    Args:
        view: into a larger address range; all that lies between its first and last element is mapped.
        owner: kept alive until the tensor and every view of it are gone.
    """
    last = sum((n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True))
    extent = last + 1 if view.numel() else 0
    with torch.inference_mode(False), torch.no_grad():  # as for the views of everything
        size_bytes = extent * view.element_size()
        base = tensor_from_address(view.data_ptr(), size_bytes, view.dtype, view.device, owner)
        return base.as_strided(view.shape, view.stride())


def tensor_from_address(
    address: int, size_bytes: int, dtype: torch.dtype, device: torch.device, owner: object
) -> torch.Tensor:
    """A 1-D tensor over ``[address, address + size_bytes)``, shape ``[size_bytes / dtype.itemsize]``.

    Args:
        address: first byte, aligned to the dtype; nothing need be mapped there yet.
        size_bytes: a multiple of the dtype's size.
        owner: kept alive until the tensor and every view of it are gone.

    On the meta device (a driver with no memory) it is a tensor without data, and holds nothing.
    """
    if device.type == "meta":
        return torch.empty(size_bytes // dtype.itemsize, dtype=dtype, device=device)
    memory = _libc.malloc(ctypes.sizeof(_Allocated))
    if not memory:
        raise MemoryError
    allocated = _Allocated.from_address(memory)
    allocated.shape = size_bytes
    allocated.managed.context = None
    allocated.managed.deleter = _free
    allocated.managed.tensor = _DLTensor(
        data=address,
        device_type=_KDL_CUDA if device.type == "cuda" else _KDL_CPU,
        device_id=device.index or 0,
        ndim=1,
        code=_KDL_UINT,  # bytes first, then a view: DLPack's consumers differ in the float types that they know
        bits=8,
        lanes=1,
        shape=memory + _Allocated.shape.offset,
        strides=None,
        byte_offset=0,
    )
    data = from_dlpack(_new_capsule(memory, b"dltensor", None))
    # PyTorch keeps a storage's Python object, with what hangs on it, for as long as the storage lives.
    data.untyped_storage()._vattn_owner = owner  # type: ignore[attr-defined]
    return data.view(dtype)


_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float64: np.float64}


def upload(values: np.ndarray | Sequence[int], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on the device, in the order of the current stream.

    From ordinary memory (``torch.tensor(..., device="cuda")``) the host would wait there for all work queued so far.
    torch keeps the page-locked memory in between until the copy has been made.

    Args:
        values: of any shape. On the CPU the tensor may share an array's memory.
        dtype: int32, int64 or float64; None for an array's own.
    """
    array = np.ascontiguousarray(values, None if dtype is None else _NUMPY[dtype])
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
