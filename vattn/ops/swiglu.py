"""SwiGLU's and GeGLU's elementwise half, over the merged gate and up projections."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .triton_support import gdc_launch_dependents, gdc_wait, jit, launch_options, require_triton, tl

__all__ = ["ACTIVATIONS", "require_activation", "sigmoid_input", "swiglu", "swiglu_reference"]

ACTIVATIONS = ("silu", "gelu_tanh")
_BLOCK = 1024


def require_activation(activation: str) -> None:
    """Refuse what no kernel computes.

    Raises:
        ConfigError: names those that are.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def swiglu_reference(gate_up: torch.Tensor, dtype: torch.dtype | None = None, activation: str = "silu") -> torch.Tensor:
    """``silu(gate) * up`` (Shazeer 2020), in float32 or wider, rounded once.

    Args:
        gate_up: ``[tokens, 2 * size]``, the gate's columns first, or ``[splits, tokens, 2 * size]`` partial sums.
        dtype: of the result; None for gate_up's.
        activation: ``"silu"``, or ``"gelu_tanh"`` for GeGLU: ``gelu`` in its tanh form (Hendrycks & Gimpel 2016).

    Returns:
        ``[tokens, size]``.

    Raises:
        ConfigError: another activation.
    """
    require_activation(activation)
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = (wide.sum(0) if wide.dim() == 3 else wide).chunk(2, dim=-1)
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    return ((silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")) * up).to(dtype or gate_up.dtype)


def swiglu(
    gate_up: torch.Tensor,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    activation: str = "silu",
    pdl: bool = False,
) -> torch.Tensor:
    """``swiglu_reference`` as one kernel.

    Args:
        pdl: as in ``triton_support.launch_options``.

    Raises:
        ConfigError: the tensor is not on a GPU; another activation.
    """
    require_triton(gate_up)
    require_activation(activation)
    tokens, size = gate_up.shape[-2], gate_up.shape[-1] // 2
    out = gate_up.new_empty(tokens, size, dtype=dtype or gate_up.dtype) if out is None else out
    swiglu_kernel[(tokens, -(-size // _BLOCK))](
        gate_up, out, gate_up.stride(-2), gate_up.stride(0) if gate_up.dim() == 3 else 0, out.stride(0), size,
        SPLITS=gate_up.shape[0] if gate_up.dim() == 3 else 1, GELU=activation == "gelu_tanh", BLOCK=_BLOCK,
        **launch_options(pdl),
    )  # fmt: skip
    return out


@jit
def sigmoid_input(gate, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """What both activations multiply ``gate`` by the sigmoid of: ``1 + tanh(u)`` is twice the sigmoid of ``2 u``."""
    if GELU:
        gate = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate


@jit
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, out_ptr, in_stride, split_stride, out_stride, size,
    SPLITS: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
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
    value = gate / (1.0 + tl.exp(-sigmoid_input(gate, GELU))) * up
    tl.store(out_ptr + token * out_stride + columns, value.to(out_ptr.dtype.element_ty), mask=inside)
