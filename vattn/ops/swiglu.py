"""SwiGLU's elementwise half, over the merged gate and up projections."""

from __future__ import annotations

import torch

from .triton_support import gdc_launch_dependents, gdc_wait, jit, launch_options, require_triton, tl

__all__ = ["swiglu", "swiglu_reference"]

_BLOCK = 1024


def swiglu_reference(gate_up: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``silu(gate) * up`` (Shazeer 2020), in float32 or wider, rounded once.

    Args:
        gate_up: ``[tokens, 2 * size]``, the gate's columns first, or ``[splits, tokens, 2 * size]`` partial sums.
        dtype: of the result; None for gate_up's.

    Returns:
        ``[tokens, size]``.
    """
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = (wide.sum(0) if wide.dim() == 3 else wide).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(dtype or gate_up.dtype)


def swiglu(
    gate_up: torch.Tensor,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """``swiglu_reference`` as one kernel.

    Args:
        pdl: as in ``triton_support.launch_options``.

    Raises:
        ConfigError: the tensor is not on a GPU.
    """
    require_triton(gate_up)
    tokens, size = gate_up.shape[-2], gate_up.shape[-1] // 2
    out = gate_up.new_empty(tokens, size, dtype=dtype or gate_up.dtype) if out is None else out
    swiglu_kernel[(tokens, -(-size // _BLOCK))](
        gate_up, out, gate_up.stride(-2), gate_up.stride(0) if gate_up.dim() == 3 else 0, out.stride(0), size,
        SPLITS=gate_up.shape[0] if gate_up.dim() == 3 else 1, BLOCK=_BLOCK, **launch_options(pdl),
    )  # fmt: skip
    return out


@jit
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, out_ptr, in_stride, split_stride, out_stride, size,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    row = gate_up_ptr + token * in_stride
    gate = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + size + columns, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        part = row + split * split_stride
        gate += tl.load(part + columns, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(part + size + columns, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * out_stride + columns, value.to(out_ptr.dtype.element_ty), mask=inside)
