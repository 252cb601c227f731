"""The operations of a decode step as one set: fused kernels, or their eager references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .add_rms_norm import add_rms_norm, add_rms_norm_reference
from .advance import advance, advance_reference
from .begin_step import begin_step, begin_step_reference
from .experts import experts, experts_reference
from .host_linear import host_linear
from .host_sampling import sample_tokens_eager
from .rope_append import rope_append, rope_append_reference
from .sample_tokens import sample_tokens
from .skinny_linear import LinearConfig, skinny_linear
from .swiglu import swiglu, swiglu_reference

__all__ = ["LinearTable", "Ops", "fused_ops", "reference_ops"]


@dataclass(frozen=True)
class Ops:
    """What a decode step calls. Each field has the signature of the function of the same name, without ``pdl``.

    Attributes:
        linear: ``(x, weight, bias=None, whole=False)`` -> ``[tokens, outputs]``, or partial sums ``[splits, tokens,
            outputs]`` unless ``whole``.
        linear_add: ``(x, weight, residual, bias=None)``: adds the product of many tokens to ``residual [tokens,
            outputs]``, in place.
        linear_swiglu: ``(x, weight, bias=None, activation="silu")`` -> ``[tokens, outputs / 2]``; the gate's outputs
            come first.
        name: for messages.
        rope_in_attention: whether decode attention may do what ``rope_append`` does, in the same kernel. False for a
            ``rope_append`` of one's own, which is not called where it does.
        plain: the same without programmatic dependent launch; None where these have none either.
    """

    begin_step: Callable[..., None]
    add_rms_norm: Callable[..., torch.Tensor]
    rope_append: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    linear_add: Callable[..., None]
    linear_swiglu: Callable[..., torch.Tensor]
    experts: Callable[..., torch.Tensor]
    sample_tokens: Callable[..., None]
    advance: Callable[..., None]
    name: str
    rope_in_attention: bool = False
    plain: Ops | None = None


class LinearTable:
    """The kernel that was measured fastest for each product; cuBLAS where nothing was measured or nothing beat it.

    Args:
        entries: (outputs, inputs, whether SwiGLU follows) -> {tokens: config, or None for cuBLAS}. A number of tokens
            that is not listed takes the entry of the next larger number.
        pdl: launch with programmatic dependent launch (compute capability 9.0 or newer).
    """

    def __init__(self, entries: dict[tuple[int, int, bool], dict[int, LinearConfig | None]], pdl: bool = False) -> None:
        self.entries = {shape: dict(sorted(by_tokens.items())) for shape, by_tokens in entries.items()}
        self.pdl = pdl

    def find(self, outputs: int, inputs: int, tokens: int, swiglu: bool = False) -> LinearConfig | None:
        """The config for a product, None for cuBLAS."""
        for limit, config in self.entries.get((outputs, inputs, swiglu), {}).items():
            if tokens <= limit:
                return config if config is None or config.dot or tokens == 1 else None
        return None

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, whole: bool = False
    ) -> torch.Tensor:
        """See ``Ops.linear``."""
        config = self.find(weight.shape[0], weight.shape[1], x.shape[0])
        if config is None or (whole and config.splits > 1):
            return torch.nn.functional.linear(x, weight, bias)
        return skinny_linear(x, weight, config, bias, pdl=self.pdl)

    def linear_swiglu(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "silu"
    ) -> torch.Tensor:
        """See ``Ops.linear_swiglu``."""
        config = self.find(weight.shape[0], weight.shape[1], x.shape[0], swiglu=True)
        if config is None:
            return swiglu(self.linear(x, weight, bias), x.dtype, activation=activation, pdl=self.pdl)
        return skinny_linear(x, weight, config, bias, swiglu=True, activation=activation, pdl=self.pdl)


def _linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, whole: bool = False
) -> torch.Tensor:
    return host_linear(x, weight, bias)


def _linear_add_reference(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    residual += host_linear(x, weight, bias)


def _linear_add(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """The product's own kernel adds, and the norm after it reads one tensor less: 1 % of a prefill on an H100."""
    if bias is not None:
        residual += bias
    residual.addmm_(x, weight.t())


def _linear_swiglu_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "silu"
) -> torch.Tensor:
    return swiglu_reference(host_linear(x, weight, bias), activation=activation)


def reference_ops() -> Ops:
    """Eager torch for everything; runs anywhere."""
    return Ops(
        begin_step=begin_step_reference,
        add_rms_norm=add_rms_norm_reference,
        rope_append=rope_append_reference,
        linear=_linear_reference,
        linear_add=_linear_add_reference,
        linear_swiglu=_linear_swiglu_reference,
        experts=experts_reference,
        sample_tokens=sample_tokens_eager,
        advance=advance_reference,
        name="reference",
    )


def fused_ops(table: LinearTable | None = None) -> Ops:
    """Triton kernels, with the products that ``table`` chooses.

    Args:
        table: its ``pdl`` applies to every kernel; None: cuBLAS for every product, and no ``pdl``.
    """
    table = table or LinearTable({})

    def option(function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(function, pdl=True) if table.pdl else function

    return Ops(
        begin_step=begin_step,
        add_rms_norm=option(add_rms_norm),
        rope_append=option(rope_append),
        linear=table.linear,
        linear_add=_linear_add,
        linear_swiglu=table.linear_swiglu,
        experts=option(experts),
        sample_tokens=sample_tokens,
        advance=advance,
        name="fused",
        rope_in_attention=True,
        plain=fused_ops(LinearTable(table.entries)) if table.pdl else None,
    )
