"""Whether Triton's kernels can run, and what they share."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from ..errors import ConfigError

__all__ = ["next_power_of_2", "num_warps", "require_triton", "unavailable"]


@cache
def unavailable() -> str | None:
    """Why Triton is not to be had at all; None where it is installed."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (PyTorch's CUDA builds bring it)"
    return None


def require_triton(*tensors: torch.Tensor) -> None:
    """Refuse tensors that Triton cannot reach: without a GPU only its interpreter reads memory.

    Raises:
        ConfigError: Triton is not installed, or the tensors are on the CPU and ``TRITON_INTERPRET=1`` is not set.
    """
    if reason := unavailable():
        raise ConfigError(reason)
    if os.environ.get("TRITON_INTERPRET") != "1" and not all(tensor.is_cuda for tensor in tensors):
        raise ConfigError("fused ops need CUDA tensors; use the reference of the same name on the CPU")


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def num_warps(block: int) -> int:
    """Warps for a block of so many elements: about eight elements to a thread."""
    return min(16, max(1, block // 256))
