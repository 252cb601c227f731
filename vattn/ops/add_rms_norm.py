"""Residual add and RMSNorm in one pass over the residual stream."""

from __future__ import annotations

import torch

from .triton_support import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    num_warps,
    require_triton,
    tl,
)

__all__ = ["add_rms_norm", "add_rms_norm_reference"]


def add_rms_norm_reference(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """``residual += x``, then ``residual / rms(residual) * weight`` (Zhang & Sennrich 2019).

    The sum is rounded to the residual's dtype. The norm of the rounded sum is computed in float32 or wider, and rounded
    once.

    Args:
        x: ``[tokens, hidden]``, what a block adds, or ``[splits, tokens, hidden]`` partial sums of it; None to add
            nothing.
        residual: ``[tokens, hidden]``, changed in place.
        weight: ``[hidden]``.
        eps: added to the mean square.

    Returns:
        ``[tokens, hidden]`` in the residual's dtype.
    """
    wide_dtype = torch.promote_types(residual.dtype, torch.float32)
    if x is not None:
        added = x.to(wide_dtype).sum(0) if x.dim() == 3 else x.to(wide_dtype)
        residual.copy_(residual.to(wide_dtype) + added)
    wide = residual.to(wide_dtype)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.to(wide_dtype)).to(residual.dtype)


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """``add_rms_norm_reference`` as one kernel, a program a token; rows may be strided, their elements not.

    Args:
        pdl: as in ``triton_support.launch_options``.

    Raises:
        ConfigError: the tensors are not on a GPU.
    """
    require_triton(residual)
    tokens, hidden = residual.shape
    out = torch.empty_like(residual) if out is None else out
    block = next_power_of_2(hidden)
    add_rms_norm_kernel[(tokens,)](
        residual if x is None else x, residual, weight, out,
        0 if x is None else x.stride(-2), 0 if x is None or x.dim() == 2 else x.stride(0),
        residual.stride(0), out.stride(0),
        hidden, eps,
        SPLITS=0 if x is None else 1 if x.dim() == 2 else x.shape[0], BLOCK=block,
        num_warps=num_warps(block), **launch_options(pdl),
    )  # fmt: skip
    return out


@jit
def add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, out_ptr,
    x_stride, split_stride, residual_stride, out_stride,
    hidden, eps,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    residual_at = residual_ptr + token * residual_stride + columns
    value = tl.load(residual_at, mask=inside, other=0.0)
    if SPLITS > 0:
        x_at = x_ptr + token * x_stride + columns
        added = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            added += tl.load(x_at + split * split_stride, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + added).to(value.dtype)
        tl.store(residual_at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + columns, (wide * scale * weight).to(value.dtype), mask=inside)
