"""Decode steps whose sequences are equally long: their rows are one rectangle, which one plain call reads in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .sdpa import folded_decode
from .torch_varlen import TorchVarlenAttention, flash_decode

__all__ = ["UniformDecode", "uniform_decode"]

# q [batch, num_heads, 1, head_dim], k and v [batch, num_kv_heads, rows, head_dim] of any strides, scale (None for
# head_dim ** -0.5) -> [batch, num_heads, 1, head_dim]. Nothing outside k and v is read.
UniformDecode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "float | None"], torch.Tensor]


def uniform_decode(device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> UniformDecode | None:
    """What computes such a step in one call that copies neither K nor V; None where nothing does.

    The kernels for sequences of any length take tensors of lengths and slots besides, and more of the host's time,
    which an eager step is made of.
    """
    if head_dim != v_head_dim:  # torch has no kernel for that; the products it takes instead copy strided K and V
        return None
    if TorchVarlenAttention().supports(device, dtype, head_dim) is None:
        return flash_decode
    return folded_decode if device.type == "cpu" else None
