"""Triton where it is installed, a stand-in where it is not, and what the kernels share.

``from .triton_support import jit, tl`` lets a kernel stand at module level either way: without Triton ``jit`` returns
the function as it is, and nothing calls it, because ``require_triton`` comes before every launch.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import ConfigError

__all__ = [
    *("address_of", "gdc_launch_dependents", "gdc_wait", "interpreted", "jit", "launch_options", "next_power_of_2"),
    *("num_warps", "require_triton", "tl", "triton", "unavailable"),
]

_REASON: str | None = None
try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    jit: Any = triton.jit
except ImportError as error:
    triton = gdc_launch_dependents = gdc_wait = None
    tl = SimpleNamespace(constexpr=lambda value: value)

    def jit(function: Any) -> Any:
        """The function itself: a kernel that cannot be launched."""
        return function

    _REASON = f"Triton cannot be imported: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        _REASON = "Triton is not installed: pip install triton (PyTorch's CUDA builds bring it)"


def unavailable() -> str | None:
    """Why Triton cannot be used at all, or None."""
    return _REASON


def interpreted() -> bool:
    """Whether Triton runs its interpreter, which multiplies bfloat16 tiles as if they were integers."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_triton(*tensors: torch.Tensor) -> None:
    """Refuse tensors that a kernel cannot reach: on the CPU only the interpreter can.

    Raises:
        ConfigError: Triton is not installed, or a tensor is on the CPU and ``TRITON_INTERPRET=1`` is not set.
    """
    if _REASON:
        raise ConfigError(_REASON)
    if not interpreted() and not all(tensor.is_cuda for tensor in tensors):
        raise ConfigError("fused ops need CUDA tensors; use the reference of the same name on the CPU")


def address_of(tensor: torch.Tensor) -> tuple[int, Any, int]:
    """A tensor's address, Triton dtype and alignment in bytes, from which a kernel makes a pointer.

    A launch asks the driver about every tensor argument. The driver does not know an address with no page behind it,
    such as the first of a cache's view while slot 0 is empty. It does not ask about numbers.
    """
    address = tensor.data_ptr()
    return address, getattr(tl, str(tensor.dtype).removeprefix("torch.")), min(16, address & -address)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Keyword arguments of a launch: with ``pdl``, programmatic dependent launch (Hopper and newer).

    Such a kernel starts while the one before it ends. It allows the next one to start, then waits until everything
    before it has ended and its writes are visible.
    """
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def num_warps(block: int) -> int:
    """Warps for a block of so many elements: about eight elements a thread."""
    return min(16, max(1, block // 256))
