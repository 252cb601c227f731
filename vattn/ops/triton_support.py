"""Whether Triton's kernels can run, and what they share."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch

from ..errors import ConfigError

__all__ = [
    "address_of",
    "interpreted",
    "launch_options",
    "next_power_of_2",
    "num_warps",
    "require_triton",
    "unavailable",
]


@cache
def unavailable() -> str | None:
    """Why Triton is not to be had at all; None where it is installed."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (PyTorch's CUDA builds bring it)"
    return None


def interpreted() -> bool:
    """Whether Triton runs through its interpreter, which multiplies bfloat16 tiles as if they were integers."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_triton(*tensors: torch.Tensor) -> None:
    """Refuse tensors that Triton cannot reach: without a GPU only its interpreter reads memory.

    Raises:
        ConfigError: Triton is not installed, or the tensors are on the CPU and ``TRITON_INTERPRET=1`` is not set.
    """
    if reason := unavailable():
        raise ConfigError(reason)
    if not interpreted() and not all(tensor.is_cuda for tensor in tensors):
        raise ConfigError("fused ops need CUDA tensors; use the reference of the same name on the CPU")


def address_of(tensor: torch.Tensor) -> tuple[int, Any, int]:
    """A tensor's address, Triton dtype and alignment in bytes, for kernels to make a pointer of.

    A launch asks the driver about every tensor that it is given, and the driver knows nothing of an address with no
    page behind it, such as the first of a cache's view while slot 0 is empty. Numbers it takes as they are.
    """
    import triton.language as tl

    address = tensor.data_ptr()
    return address, getattr(tl, str(tensor.dtype).removeprefix("torch.")), min(16, address & -address)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Keyword arguments of a launch: with ``pdl``, programmatic dependent launch (Hopper and newer).

    A kernel launched so starts while the one before it ends; it lets the next one start at its very top, and then waits
    until everything before it has ended and can be seen.
    """
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def num_warps(block: int) -> int:
    """Warps for a block of so many elements: about eight elements to a thread."""
    return min(16, max(1, block // 256))
