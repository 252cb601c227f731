"""Products of a few tokens with a weight matrix. Their time is the time that reading the weight takes.

On the smaller matrices of a decode step cuBLAS leaves a third of an H100's bandwidth unused: their few output tiles do
not fill the GPU. Here the tiles are narrow, and the inner dimension can be split. A split product gives partial sums,
which the next operation (a norm, the rotary embedding, SwiGLU) adds up as it loads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .swiglu import require_activation, sigmoid_input
from .triton_support import (
    gdc_launch_dependents,
    gdc_wait,
    interpreted,
    jit,
    launch_options,
    next_power_of_2,
    require_triton,
    tl,
)

__all__ = ["LinearConfig", "skinny_linear", "skinny_linear_reference"]


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How one product is cut into programs.

    Attributes:
        block_n: outputs of a program.
        block_k: inputs of one round of its loop.
        splits: programs that share an output, each for its part of the inputs; above 1 the result is partial sums.
        num_warps, num_stages: Triton's.
        dot: use tensor cores, ``[block_n, block_k] @ [block_k, tokens]``; else multiply and add, for one token only.
    """

    block_n: int
    block_k: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4
    dot: bool = True


def skinny_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, splits: int = 1, block_k: int = 1
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32 or wider.

    Args:
        x: ``[tokens, inputs]``.
        weight: ``[outputs, inputs]``.
        bias: ``[outputs]``; in the first partial sum.
        splits: number of partial sums; each is over equally many blocks of ``block_k`` inputs.

    Returns:
        ``[tokens, outputs]`` in x's dtype for one split; else ``[splits, tokens, outputs]`` in float32 or wider, which
        the caller adds up and rounds.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    stretch = _stretch(x.shape[1], splits, block_k)
    parts = []
    for i in range(splits):
        inputs = slice(i * stretch, (i + 1) * stretch)
        parts.append(x[:, inputs].to(wide) @ weight[:, inputs].to(wide).T)
    if bias is not None:
        parts[0] += bias.to(wide)
    return parts[0].to(x.dtype) if splits == 1 else torch.stack(parts)


def _stretch(inputs: int, splits: int, block_k: int) -> int:
    return -(-inputs // (splits * block_k)) * block_k


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    config: LinearConfig,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    swiglu: bool = False,
    activation: str = "silu",
    pdl: bool = False,
) -> torch.Tensor:
    """``skinny_linear_reference`` as one kernel, for up to 128 tokens (one without ``config.dot``).

    Args:
        out: takes the result: ``[tokens, outputs]``, or ``[splits, tokens, outputs]`` float32.
        swiglu: the first half of the outputs is a gate; the result is ``silu(first half) * second half``
            (``swiglu_reference``). Needs ``splits=1``; a program computes ``block_n`` outputs of each half.
        activation: of that gate, as for ``swiglu_reference``.
        pdl: as in ``triton_support.launch_options``.

    Raises:
        ConfigError: the tensors are not on a GPU, too many tokens, SwiGLU of partial sums, or another activation.
    """
    require_triton(x, weight)
    require_activation(activation)
    if swiglu and config.splits > 1:
        raise ConfigError(f"SwiGLU needs whole sums, got a config with {config.splits} splits")
    (tokens, inputs), outputs = x.shape, weight.shape[0] // 2 if swiglu else weight.shape[0]
    if tokens > (128 if config.dot else 1):
        raise ConfigError(f"skinny_linear is for {'up to 128 tokens' if config.dot else 'one token'}, got {tokens}")
    splits = config.splits
    if out is None:
        shape = (tokens, outputs) if splits == 1 else (splits, tokens, outputs)
        out = x.new_empty(shape, dtype=x.dtype if splits == 1 else torch.float32)
    stretch = _stretch(inputs, splits, config.block_k)
    skinny_linear_kernel[(-(-outputs // config.block_n), splits)](
        x, weight, weight if bias is None else bias, out,
        tokens, outputs, inputs, stretch,
        x.stride(0), weight.stride(0), out.stride(0) if splits > 1 else 0, out.stride(-2),
        HAS_BIAS=bias is not None, SWIGLU=swiglu, GELU=activation == "gelu_tanh",
        BLOCK_M=max(8, next_power_of_2(tokens)) if config.dot else 1, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        WHOLE=outputs % config.block_n == 0 and inputs % (splits * config.block_k) == 0,
        DOT=config.dot, STAGES=config.num_stages, UPCAST=interpreted(),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(pdl),
    )  # fmt: skip
    return out


@jit
def skinny_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    tokens, outputs, inputs, stretch,
    x_stride, weight_stride, split_stride, out_stride,
    HAS_BIAS: tl.constexpr, SWIGLU: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * stretch + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    weight_at = weight_ptr + n.to(tl.int64)[:, None] * weight_stride + k[None, :]
    if PDL:
        # Measured: long programs (DOT) slow down when the next kernel's programs start early. For short ones a late
        # start of the next kernel costs a tenth.
        if not DOT:
            gdc_launch_dependents()
        gdc_wait()
    # The bias is added by the first split alone. Written as a bound: Triton 3.9's interpreter refuses a mask that
    # joins a block with a scalar.
    biased = tl.where(split == 0, outputs, 0)
    up = outputs.to(tl.int64) * weight_stride  # from a gate's row to that of the other half
    if DOT:
        x_at = x_ptr + m[None, :] * x_stride + k[:, None]
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        up_sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for start in tl.range(0, stretch, BLOCK_K, num_stages=STAGES):
            if WHOLE:
                weight = tl.load(weight_at + start, eviction_policy="evict_first")
                x = tl.load(x_at + start, mask=m[None, :] < tokens, other=0.0)
            else:
                inside = (n < outputs)[:, None] & (k + start < inputs)[None, :]
                weight = tl.load(weight_at + start, mask=inside, other=0.0)
                x = tl.load(x_at + start, mask=(m < tokens)[None, :] & (k + start < inputs)[:, None], other=0.0)
            if UPCAST:
                weight, x = weight.to(tl.float32), x.to(tl.float32)
            sums = tl.dot(weight, x, sums, input_precision=PRECISION)
            if SWIGLU:
                if WHOLE:
                    weight = tl.load(weight_at + up + start, eviction_policy="evict_first")
                else:
                    weight = tl.load(weight_at + up + start, mask=inside, other=0.0)
                if UPCAST:
                    weight = weight.to(tl.float32)
                up_sums = tl.dot(weight, x, up_sums, input_precision=PRECISION)
        if PDL:
            gdc_launch_dependents()
        if HAS_BIAS:
            bias = tl.load(bias_ptr + n, mask=n < biased, other=0.0)
            sums += bias.to(tl.float32)[:, None]
            if SWIGLU:
                up_sums += tl.load(bias_ptr + outputs + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
        if SWIGLU:
            sums = sums / (1.0 + tl.exp(-sigmoid_input(sums, GELU))) * up_sums
        out_at = out_ptr + split * split_stride + m[None, :] * out_stride + n[:, None]
        inside_out = (n < outputs)[:, None] & (m < tokens)[None, :]
        tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=inside_out)
    else:
        products = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        up_products = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for start in tl.range(0, stretch, BLOCK_K, num_stages=STAGES):
            if WHOLE:
                weight = tl.load(weight_at + start, eviction_policy="evict_first")
                x = tl.load(x_ptr + k + start)
            else:
                inside = (n < outputs)[:, None] & (k + start < inputs)[None, :]
                weight = tl.load(weight_at + start, mask=inside, other=0.0)
                x = tl.load(x_ptr + k + start, mask=k + start < inputs, other=0.0)
            x = x.to(tl.float32)[None, :]
            if SWIGLU:
                if WHOLE:
                    up_weight = tl.load(weight_at + up + start, eviction_policy="evict_first")
                else:
                    up_weight = tl.load(weight_at + up + start, mask=inside, other=0.0)
                up_products += up_weight.to(tl.float32) * x
            products += weight.to(tl.float32) * x
        sum_ = tl.sum(products, axis=1)
        if HAS_BIAS:
            sum_ += tl.load(bias_ptr + n, mask=n < biased, other=0.0).to(tl.float32)
        if SWIGLU:
            up_sum = tl.sum(up_products, axis=1)
            if HAS_BIAS:
                up_sum += tl.load(bias_ptr + outputs + n, mask=n < outputs, other=0.0).to(tl.float32)
            sum_ = sum_ / (1.0 + tl.exp(-sigmoid_input(sum_, GELU))) * up_sum
        tl.store(out_ptr + split * split_stride + n, sum_.to(out_ptr.dtype.element_ty), mask=n < outputs)
