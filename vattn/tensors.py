"""An address range as a torch tensor, through DLPack, which does not look at what lies behind the addresses.

The protocol's struct and its deleter are those of DLPack 0.8 (``dlpack.h``). ``__cuda_array_interface__`` would ask the
driver about the pointer and fail on addresses with nothing mapped.
"""

from __future__ import annotations

import ctypes
from typing import Any

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
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]


_live: dict[int, tuple[Any, ...]] = {}  # struct address -> what must outlive the tensor's storage


def _forget(address: int, live: dict[int, tuple[Any, ...]] = _live) -> None:
    live.pop(address, None)


_deleter = _Deleter(_forget)
# A storage can die while the interpreter tears modules down; its deleter must still be callable then.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_deleter))

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def tensor_from_address(
    address: int, size_bytes: int, dtype: torch.dtype, device: torch.device, owner: object
) -> torch.Tensor:
    """A 1-D tensor over ``[address, address + size_bytes)``, shape ``[size_bytes / dtype.itemsize]``.

    Args:
        address: first byte, aligned to the dtype; nothing need be mapped there yet.
        size_bytes: a multiple of the dtype's size.
        owner: kept alive until the tensor and every view of it are gone.
    """
    shape = (ctypes.c_int64 * 1)(size_bytes)
    managed = _DLManagedTensor()
    managed.tensor = _DLTensor(
        data=address,
        device_type=_KDL_CUDA if device.type == "cuda" else _KDL_CPU,
        device_id=device.index or 0,
        ndim=1,
        code=_KDL_UINT,  # bytes first, then a view: DLPack's consumers differ in the float types that they know
        bits=8,
        lanes=1,
        shape=ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
        strides=None,
        byte_offset=0,
    )
    managed.deleter = _deleter
    key = ctypes.addressof(managed)
    _live[key] = (managed, shape, owner)
    try:
        data = from_dlpack(_new_capsule(key, b"dltensor", None))
    except BaseException:
        _live.pop(key, None)
        raise
    return data.view(dtype)
