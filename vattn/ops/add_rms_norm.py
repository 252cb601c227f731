"""Residual add and RMSNorm in one pass over the residual stream."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .triton_support import next_power_of_2, num_warps, require_triton

__all__ = ["add_rms_norm", "add_rms_norm_reference"]


def add_rms_norm_reference(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """``residual += x``, then ``residual / rms(residual) * weight`` (Zhang & Sennrich 2019).

    The sum is rounded to the residual's dtype; the norm is taken of what was rounded, in float32 or wider, and rounded
    once.

    Args:
        x: ``[tokens, hidden]``, what a block adds; None to add nothing.
        residual: ``[tokens, hidden]``, changed in place.
        weight: ``[hidden]``.
        eps: added to the mean square.

    Returns:
        ``[tokens, hidden]`` in the residual's dtype.
    """
    wide_dtype = torch.promote_types(residual.dtype, torch.float32)
    if x is not None:
        residual.copy_(residual.to(wide_dtype) + x.to(wide_dtype))
    wide = residual.to(wide_dtype)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.to(wide_dtype)).to(residual.dtype)


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``add_rms_norm_reference`` as one kernel, a program a token; rows may be strided, their elements not.

    Raises:
        ConfigError: the tensors are not on a GPU.
    """
    require_triton(residual)
    tokens, hidden = residual.shape
    out = torch.empty_like(residual) if out is None else out
    block = next_power_of_2(hidden)
    _kernel()[(tokens,)](
        residual if x is None else x,
        residual,
        weight,
        out,
        0 if x is None else x.stride(0),
        residual.stride(0),
        out.stride(0),
        hidden,
        eps,
        HAS_X=x is not None,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return out


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def add_rms_norm_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        residual_ptr,
        weight_ptr,
        out_ptr,
        x_stride,
        residual_stride,
        out_stride,
        hidden,
        eps,
        HAS_X: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < hidden
        residual_at = residual_ptr + token * residual_stride + columns
        value = tl.load(residual_at, mask=inside, other=0.0)
        if HAS_X:
            added = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0)
            value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
            tl.store(residual_at, value, mask=inside)
        wide = value.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * out_stride + columns, (wide * scale * weight).to(value.dtype), mask=inside)

    return add_rms_norm_kernel
