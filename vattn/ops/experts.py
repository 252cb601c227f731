"""A mixture of experts for a few tokens: only the weights of the chosen experts are read, without asking the host."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .host_linear import host_linear
from .swiglu import require_activation, sigmoid_input, swiglu_reference
from .triton_support import gdc_launch_dependents, gdc_wait, jit, launch_options, next_power_of_2, require_triton, tl

__all__ = ["MOST_PAIRS", "experts", "experts_reference"]

# Pairs of a token and an expert that ``experts`` takes. Each reads its expert's weights by itself, from the second
# level cache where another pair does too; products of many tokens want each weight loaded once.
MOST_PAIRS = 128
_BLOCK_K = 1024  # inputs of one round of a program's loop


def experts_reference(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """The weighted sum of what each token's experts give, each a SwiGLU or GeGLU MLP. Waits for the device.

    Args:
        x: ``[tokens, hidden]``.
        index: ``[tokens, chosen]`` int64, the experts of each token.
        weights: ``[tokens, chosen]``, of those.
        gate_up: ``[experts, 2 * size, hidden]``, the gate's outputs first.
        down: ``[experts, hidden, size]``.
        activation: as for ``swiglu_reference``.

    Returns:
        ``[tokens, hidden]`` in x's dtype.

    Raises:
        ConfigError: another activation.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape, dtype=wide)
    for expert in index.unique().tolist():
        tokens, choices = (index == expert).nonzero(as_tuple=True)
        hidden = swiglu_reference(host_linear(x[tokens], gate_up[expert]), activation=activation)
        given = host_linear(hidden, down[expert]).to(wide) * weights[tokens, choices, None].to(wide)
        out.index_add_(0, tokens, given)
    return out.to(x.dtype)


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str = "silu",
    pdl: bool = False,
) -> torch.Tensor:
    """``experts_reference`` as two kernels and a sum, for up to ``MOST_PAIRS`` choices in all.

    Args:
        pdl: as in ``triton_support.launch_options``.

    Raises:
        ConfigError: the tensors are not on a GPU, too many choices, or another activation.
    """
    require_triton(x, gate_up)
    require_activation(activation)
    (tokens, chosen), (_, size, hidden) = index.shape, (len(down), down.shape[2], down.shape[1])
    if tokens * chosen > MOST_PAIRS:
        raise ConfigError(f"experts is for up to {MOST_PAIRS} choices, got {tokens} tokens with {chosen} each")
    index, weights = index.contiguous(), weights.contiguous()
    between = x.new_empty(tokens * chosen, size)
    parts = x.new_empty(chosen, tokens, hidden)
    for source, matrix, out, outputs, inputs, block_n in (
        (x, gate_up, between, size, hidden, 2),
        (between, down, parts, hidden, size, 4),
    ):
        gated = out is between
        block_k = min(_BLOCK_K, next_power_of_2(inputs))
        # Pairs lie side by side in the grid: those of one expert read the same rows at about the same time.
        experts_kernel[(tokens * chosen, -(-outputs // block_n))](
            source, index, weights, matrix, out,
            chosen, outputs, inputs, source.stride(0), matrix.stride(0), matrix.stride(1),
            0 if gated else parts.stride(0), out.stride(-2),
            GATED=gated, GELU=activation == "gelu_tanh", BLOCK_N=block_n, BLOCK_K=block_k,
            WHOLE=outputs % block_n == 0 and inputs % block_k == 0, num_warps=4, **launch_options(pdl),
        )  # fmt: skip
    return parts[0] if chosen == 1 else parts.sum(0)


@jit
def experts_kernel(  # type: ignore[no-untyped-def]
    x_ptr, index_ptr, scale_ptr, weight_ptr, out_ptr,
    chosen, outputs, inputs, x_stride, expert_stride, weight_stride, choice_stride, out_stride,
    GATED: tl.constexpr, GELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A product of one pair with rows of its expert's matrix: gated, of the token; or weighted, of the pair."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    expert = tl.load(index_ptr + pair).to(tl.int64)
    weight_at = weight_ptr + expert * expert_stride + n.to(tl.int64)[:, None] * weight_stride + k[None, :]
    up = outputs.to(tl.int64) * weight_stride  # from a gate's row to that of the other half
    if GATED:
        x_at = x_ptr + pair // chosen * x_stride + k
    else:
        x_at = x_ptr + pair * x_stride + k
    products = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    up_products = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in tl.range(0, inputs, BLOCK_K):
        if WHOLE:
            x = tl.load(x_at + start).to(tl.float32)[None, :]
            products += tl.load(weight_at + start).to(tl.float32) * x
            if GATED:
                up_products += tl.load(weight_at + up + start).to(tl.float32) * x
        else:
            inside = (n < outputs)[:, None] & (k + start < inputs)[None, :]
            x = tl.load(x_at + start, mask=k + start < inputs, other=0.0).to(tl.float32)[None, :]
            products += tl.load(weight_at + start, mask=inside, other=0.0).to(tl.float32) * x
            if GATED:
                up_products += tl.load(weight_at + up + start, mask=inside, other=0.0).to(tl.float32) * x
    value = tl.sum(products, axis=1)
    if GATED:
        value = value / (1.0 + tl.exp(-sigmoid_input(value, GELU))) * tl.sum(up_products, axis=1)
        out_at = out_ptr + pair * out_stride + n
    else:
        value *= tl.load(scale_ptr + pair).to(tl.float32)
        out_at = out_ptr + pair % chosen * choice_stride + pair // chosen * out_stride + n
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=n < outputs)
