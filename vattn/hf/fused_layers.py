"""Attention and whole layers of a transformers decoder as a pass computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..attention.rope_decode import rope_attention, rope_decode
from ..ops.ops_table import Ops
from .fused_parts import Merged, Mlp, Norm, Unfit, linears, packed
from .passes import Pass, current

__all__ = ["Asked", "Attention", "Layer"]

# Products of more tokens than skinny kernels take are added to the residual stream by cuBLAS itself.
_MANY_TOKENS = 128
# How a layer takes its angles' cosines and sines: of dimensions half a rotation apart, or of pairs side by side.
_ANGLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "halves": lambda given: given[:, : given.shape[-1] // 2],  # given twice, one after the other: Llama
    "halves, given once": lambda given: given,  # GPT-OSS
    "pairs": lambda given: given[:, : given.shape[-1] // 2],  # GLM
    "pairs, given side by side": lambda given: given[:, ::2],  # Cohere
}
# Names of the norms before attention, after it, before the MLP, after it; None where a layer has none.
_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)


# -- attention -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Asked:
    """What a module's attention asked of the pass.

    Attributes:
        layer: of the cache, whose rows it wrote and read.
        num_heads, head_dim, num_kv_heads: of its queries, and of its K and V.
        scale, softcap, sinks: as in ``Pass.attend``.
    """

    layer: int
    num_heads: int
    head_dim: int
    num_kv_heads: int
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


@dataclass
class Attention:
    """Merged projections, QK-norm with rotary embedding and append, attention, output projection."""

    ops: Ops
    asked: Asked
    qkv: Merged
    o: Merged
    norms: tuple[Norm, Norm] | None
    angles: str | None
    num_outputs: int = 2
    still: tuple[torch.Tensor, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = (1, self.asked.head_dim // 2)
        self.still = self.qkv.weight.new_ones(shape), self.qkv.weight.new_zeros(shape)

    @property
    def sources(self) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """See ``Merged``."""
        return self.qkv.sources

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it has the projections."""
        return all(isinstance(getattr(module, name, None), nn.Module) for name in (*Attention._names(module), "o_proj"))

    @staticmethod
    def _names(module: nn.Module) -> tuple[str, ...]:
        return ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")

    @classmethod
    def candidates(cls, module: nn.Module, ops: Ops, asked: Asked) -> Iterator[Attention]:
        """With a norm of the heads if there is one, whose weights lack one or not; rotated or not."""
        names = cls._names(module)
        *projections, o = linears(module, *names, "o_proj")
        heads = (asked.num_heads, asked.num_kv_heads, asked.num_kv_heads)
        sizes = [count * asked.head_dim for count in heads]
        if [each.out_features for each in projections] != (sizes if len(names) == 3 else [sum(sizes)]):
            raise Unfit("its projections are of other sizes than its heads")
        qkv, out = Merged.of(projections), Merged.of([o])
        q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        pairs: list[tuple[Norm, Norm] | None] = [None]
        if isinstance(q_norm, nn.Module) and isinstance(k_norm, nn.Module):
            pairs = list(zip(Norm.candidates(q_norm, ops), Norm.candidates(k_norm, ops), strict=True))
            first = pairs[0]
            if first and first[0].eps != first[1].eps:
                raise Unfit("its q_norm and k_norm have different epsilons")
            if first and [len(norm.weight) for norm in first] not in ([asked.head_dim] * 2, sizes[:2]):
                raise Unfit("its q_norm and k_norm are neither of a head nor of all heads")
        for norms in pairs:
            for angles in (*_ANGLES, None):
                yield cls(ops, asked, qkv, out, norms, angles)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """In place of the module's."""
        out = self.product(packed(hidden_states), kwargs.get("position_embeddings"), whole=True)
        return (out.view(*hidden_states.shape[:-1], len(self.o.weight)), None, None)[: self.num_outputs]

    def product(self, x: torch.Tensor, position_embeddings: Any, whole: bool = False) -> torch.Tensor:
        """``[T, hidden]``, or partial sums of it unless ``whole``; appends K and V.

        Args:
            x: ``[T, hidden]``.
            position_embeddings: cosines and sines ``[1, T, …]``.
        """
        this, asked = _pass(), self.asked
        if self.angles is None:
            cos, sin = (each.expand(len(x), -1) for each in self.still)
        else:
            cos, sin = (_ANGLES[self.angles](each.squeeze(0)) for each in position_embeddings)
        angles = cos, sin
        norms, by_head = self.norms, self.norms is None or len(self.norms[0].weight) == asked.head_dim
        qkv = self.ops.linear(x, self.qkv.weight, self.qkv.bias, whole=not by_head)
        weights: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        eps = offset = 0.0
        if norms and by_head:
            weights, eps, offset = (norms[0].weight, norms[1].weight), norms[0].eps, norms[0].offset
        elif norms:  # over all heads at once, as in OLMo 2
            start = 0
            for norm in norms:
                part = qkv[:, start : start + len(norm.weight)]
                norm(part, out=part)
                start += len(norm.weight)
        k, v = this.cache.k(asked.layer), this.cache.v(asked.layer)
        interleaved = self.angles is not None and self.angles.startswith("pairs")
        options: dict[str, Any] = {"scale": asked.scale, "window": this.window(asked.layer)}
        options |= {"softcap": asked.softcap, "sinks": asked.sinks}
        one_kernel = rope_attention(this.parts) if self.ops.rope_in_attention else None
        if one_kernel is not None:
            batch = this.parts[0][0]
            out = rope_decode(one_kernel, qkv, angles, k, v, *weights, eps, batch, offset, interleaved, **options)
        else:
            q = self.ops.rope_append(qkv, angles, this.slots, this.rows, k, v, *weights, eps, offset, interleaved)
            out = this.attend(asked.layer, q, **options)
        return self.ops.linear(out.flatten(-2), self.o.weight, self.o.bias, whole=whole)


def _pass() -> Pass:
    this = current()
    assert this is not None  # a fused forward runs in a pass only
    return this


# -- the whole layer -------------------------------------------------------------------------------------------------
@dataclass
class Layer:
    """A layer that adds attention, then an MLP, with norms around them. Either may be the model's own module."""

    ops: Ops
    attention: Attention | nn.Module
    mlp: Mlp | nn.Module
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]

    @staticmethod
    def names(module: nn.Module) -> tuple[str | None, ...] | None:
        """Of its norms before attention, after it, before the MLP, after it, None for one that it lacks; None: others.

        A module with a vector of weights and an epsilon counts as a norm, and so does one with a norm's name.
        """
        known = {name for names in _NORMS for name in names if name}
        own = {name for name, child in module.named_children() if name in known or Norm.fits(child)}
        return next((names for names in _NORMS if own == set(filter(None, names))), None)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In place of the module's."""
        shape, residual, ops = hidden_states.shape, packed(hidden_states), self.ops
        before, after, before_mlp, after_mlp = self.norms
        x = residual if before is None else before(residual)
        if isinstance(self.attention, Attention):
            product = self.attention.product(x, kwargs.get("position_embeddings"))
        else:
            product = packed(self.attention(x.view(shape), *args, **kwargs)[0])
        # A sum of its own: whoever handed the hidden states in may keep them.
        total = torch.empty_like(residual)
        norm = before_mlp or after
        x = ops.add_rms_norm(
            product,
            residual,
            None if before_mlp is None else before_mlp.weight,
            0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.offset,
            None if after is None else after.weight,
            total,
        )
        if isinstance(self.mlp, Mlp):
            x, down = self.mlp.gated(x), self.mlp.down
            if after_mlp is None and len(x) > _MANY_TOKENS:
                ops.linear_add(x, down.weight, total, down.bias)
                return total.view(shape)
            product = ops.linear(x, down.weight, down.bias)
        else:
            out = self.mlp(x.view(shape))
            product = packed(out[0] if isinstance(out, tuple) else out)
        if after_mlp is None:
            return ops.add_rms_norm(product, total, None, 0.0).view(shape)
        return ops.add_rms_norm(product, total, None, after_mlp.eps, after_mlp.offset, after_mlp.weight).view(shape)
