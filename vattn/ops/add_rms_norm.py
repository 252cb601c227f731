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
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    x_weight: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual += x``, then ``residual / rms(residual) * weight`` (Zhang & Sennrich 2019).

    The sum is rounded to the residual's dtype. The norm of the rounded sum is computed in float32 or wider, and rounded
    once.

    Args:
        x: ``[tokens, hidden]``, what a block adds, or ``[splits, tokens, hidden]`` partial sums of it; None to add
            nothing.
        residual: ``[tokens, hidden]``, changed in place, unless ``total`` is given.
        weight: ``[hidden]``; None for no norm of the sum.
        eps: added to the mean square, in both norms.
        offset: added to the weights; 1 for Gemma's.
        x_weight: ``[hidden]``; x is normed by itself before it is added.
        total: ``[tokens, hidden]``, takes the sum where there is one.
        out: ``[tokens, hidden]``, takes the norm; it may be the residual.

    Returns:
        ``[tokens, hidden]`` in the residual's dtype: the norm, or the sum where there is no ``weight``.
    """
    wide_dtype = torch.promote_types(residual.dtype, torch.float32)

    def normed(wide: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (by.to(wide_dtype) + offset)

    total = residual if total is None or x is None else total
    if x is not None:
        added = x.to(wide_dtype).sum(0) if x.dim() == 3 else x.to(wide_dtype)
        total.copy_(residual.to(wide_dtype) + (added if x_weight is None else normed(added, x_weight)))
    if weight is None:
        return total
    norm = normed(total.to(wide_dtype), weight).to(total.dtype)
    return norm if out is None else out.copy_(norm)


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    x_weight: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
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
    total = residual if total is None or x is None else total
    if out is None:
        out = total if weight is None else torch.empty_like(residual)
    block = next_power_of_2(hidden)
    add_rms_norm_kernel[(tokens,)](
        residual if x is None else x, residual, residual if weight is None else weight,
        residual if x_weight is None else x_weight, total, out,
        0 if x is None else x.stride(-2), 0 if x is None or x.dim() == 2 else x.stride(0),
        residual.stride(0), total.stride(0), out.stride(0),
        hidden, eps, offset,
        SPLITS=0 if x is None else 1 if x.dim() == 2 else x.shape[0], NORM=weight is not None,
        X_NORM=x_weight is not None, BLOCK=block,
        num_warps=num_warps(block), **launch_options(pdl),
    )  # fmt: skip
    return out


@jit
def add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, x_weight_ptr, total_ptr, out_ptr,
    x_stride, split_stride, residual_stride, total_stride, out_stride,
    hidden, eps, offset,
    SPLITS: tl.constexpr, NORM: tl.constexpr, X_NORM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        if SPLITS > 0:
            gdc_launch_dependents()
        gdc_wait()
        # Nothing is added: the first norm of a step. Kernels after it may read lengths and the cache before their wait.
        if SPLITS == 0:
            gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(residual_ptr + token * residual_stride + columns, mask=inside, other=0.0)
    if SPLITS > 0:
        x_at = x_ptr + token * x_stride + columns
        added = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            added += tl.load(x_at + split * split_stride, mask=inside, other=0.0).to(tl.float32)
        if X_NORM:
            x_weight = tl.load(x_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
            added *= tl.rsqrt(tl.sum(added * added, axis=0) / hidden + eps) * x_weight
        value = (value.to(tl.float32) + added).to(value.dtype)
        tl.store(total_ptr + token * total_stride + columns, value, mask=inside)
    if NORM:
        wide = value.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
        tl.store(out_ptr + token * out_stride + columns, (wide * scale * weight).to(value.dtype), mask=inside)
