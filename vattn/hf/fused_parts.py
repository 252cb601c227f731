"""The parts of a transformers decoder layer as a pass computes them: fused operations over merged weights.

Parts are found by the names that checkpoints fix (``q_proj``, ``gate_up_proj``, ``input_layernorm``, …). What such a
module computes beside that is not read from its code: ``candidates`` gives what it may be, and ``vattn.hf.fusion``
takes one that gives what the module gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..ops.merge import merge
from ..ops.ops_table import Ops
from ..ops.swiglu import ACTIVATIONS
from .passes import Pass, current

__all__ = ["Asked", "Attention", "Layer", "Mlp", "Norm", "Output", "Unfit", "altered", "require_plain"]

# Products of more tokens than skinny kernels take are added to the residual stream by cuBLAS itself.
_MANY_TOKENS = 128
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Names of the norms before attention, after it, before the MLP, after it; None where a layer has none.
_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)


class Unfit(Exception):
    """A module is left to the model; the text says why, and is the same for modules that differ in nothing else."""


def altered(module: nn.Module) -> str | None:
    """What somebody did to a module that calling its class's forward would pass over; None for nothing."""
    attributes = vars(module)
    if any(value for name, value in attributes.items() if "forward" in name and name.endswith("hooks")):
        return "has hooks"
    return "has a forward of its own" if "forward" in attributes else None


def require_plain(module: nn.Module) -> None:
    """Refuse a module that was altered, or has a part that was.

    Raises:
        Unfit: says which.
    """
    for name, each in module.named_modules():
        if reason := altered(each):
            raise Unfit(f"{'its ' + name if name else 'it'} {reason}")


def _require_weight(name: str, weight: Any) -> None:
    if type(weight) is not nn.Parameter or weight.is_inference():
        raise Unfit(f"its {name} has a weight of another kind than torch.nn.Parameter")
    if weight.dtype not in _DTYPES or not weight.is_contiguous():
        raise Unfit(f"its {name} has a weight of {str(weight.dtype).removeprefix('torch.')}, or with gaps")


def _linears(owner: nn.Module, *names: str) -> list[nn.Linear]:
    found = []
    for name in names:
        linear = getattr(owner, name, None)
        if type(linear) is not nn.Linear:
            raise Unfit(f"its {name} is a {type(linear).__name__}, not a torch.nn.Linear")
        _require_weight(name, linear.weight)
        found.append(linear)
    if len({linear.weight.dtype for linear in found}) > 1:
        raise Unfit(f"its {', '.join(names)} have different dtypes")
    return found


@dataclass
class _Merged:
    """Projections of one input as one.

    Attributes:
        sources: lists of parameters that become views, each with the tensor that they become views of.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    sources: list[tuple[list[torch.Tensor], torch.Tensor]]

    @classmethod
    def of(cls, linears: Sequence[nn.Linear]) -> _Merged:
        """A single projection is taken as it is."""
        biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        if biases and len(biases) < len(linears):
            raise Unfit("only some of its projections have a bias")
        weights: list[torch.Tensor] = [linear.weight for linear in linears]
        if len(linears) == 1:
            return cls(weights[0].detach(), biases[0].detach() if biases else None, [])
        weight, bias = merge(weights), merge(biases) if biases else None
        return cls(weight, bias, [(weights, weight)] + ([] if bias is None else [(biases, bias)]))


def _packed(hidden_states: torch.Tensor) -> torch.Tensor:
    """``[1, T, hidden]`` -> ``[T, hidden]``."""
    return hidden_states.reshape(-1, hidden_states.shape[-1])


# -- norms and products ----------------------------------------------------------------------------------------------
@dataclass
class Norm:
    """RMSNorm; ``offset`` is added to its weights."""

    ops: Ops
    weight: torch.Tensor
    eps: float
    offset: float

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it looks like one: a vector of weights, an epsilon, and nothing else."""
        weight = getattr(module, "weight", None)
        own = list(module.parameters())
        return (
            isinstance(weight, torch.Tensor) and weight.dim() == 1 and len(own) == 1 and Norm._eps(module) is not None
        )

    @staticmethod
    def _eps(module: nn.Module) -> float | None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return eps if isinstance(eps, float) else None

    @classmethod
    def candidates(cls, module: nn.Module, ops: Ops) -> Iterator[Norm]:
        """Llama's and Gemma's."""
        eps = cls._eps(module)
        if not cls.fits(module) or eps is None:
            raise Unfit(f"it is a {type(module).__name__}, which has more than a vector of weights and an epsilon")
        _require_weight("norm", module.weight)
        for offset in (0.0, 1.0):
            yield cls(ops, module.weight.detach(), eps, offset)  # type: ignore[operator]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """In place of the module's."""
        return self(_packed(hidden_states)).view(hidden_states.shape)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[T, hidden]`` of the same."""
        return self.ops.add_rms_norm(None, x, self.weight, self.eps, self.offset, out=out)


@dataclass
class Output:
    """The product that gives logits."""

    ops: Ops
    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def candidates(cls, module: nn.Module, ops: Ops) -> Iterator[Output]:
        """One."""
        if type(module) is not nn.Linear:
            raise Unfit(f"it is a {type(module).__name__}, not a torch.nn.Linear")
        _require_weight("weight", module.weight)
        yield cls(ops, module.weight.detach(), None if module.bias is None else module.bias.detach())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """In place of the module's."""
        logits = self.ops.linear(_packed(input), self.weight, self.bias, whole=True)
        return logits.view(*input.shape[:-1], -1)


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
    qkv: _Merged
    o: _Merged
    norms: tuple[Norm, Norm] | None
    rotates: bool
    num_outputs: int = 2
    still: tuple[torch.Tensor, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = (1, self.asked.head_dim)
        self.still = self.qkv.weight.new_ones(shape), self.qkv.weight.new_zeros(shape)

    @property
    def sources(self) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """See ``_Merged``."""
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
        *projections, o = _linears(module, *names, "o_proj")
        heads = (asked.num_heads, asked.num_kv_heads, asked.num_kv_heads)
        sizes = [count * asked.head_dim for count in heads]
        if [each.out_features for each in projections] != (sizes if len(names) == 3 else [sum(sizes)]):
            raise Unfit("its projections are of other sizes than its heads")
        qkv, out = _Merged.of(projections), _Merged.of([o])
        q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        pairs: list[tuple[Norm, Norm] | None] = [None]
        if isinstance(q_norm, nn.Module) and isinstance(k_norm, nn.Module):
            pairs = list(zip(Norm.candidates(q_norm, ops), Norm.candidates(k_norm, ops), strict=True))
            if pairs[0] and pairs[0][0].eps != pairs[0][1].eps:
                raise Unfit("its q_norm and k_norm have different epsilons")
        for norms in pairs:
            for rotates in (True, False):
                yield cls(ops, asked, qkv, out, norms, rotates)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """In place of the module's."""
        out = self.product(_packed(hidden_states), kwargs.get("position_embeddings"), whole=True)
        return (out.view(*hidden_states.shape[:-1], -1), None, None)[: self.num_outputs]

    def product(self, x: torch.Tensor, position_embeddings: Any, whole: bool = False) -> torch.Tensor:
        """``[T, hidden]``, or partial sums of it unless ``whole``; appends K and V.

        Args:
            x: ``[T, hidden]``.
            position_embeddings: cosines and sines ``[1, T, rotary_dim]``.
        """
        this, asked = _pass(), self.asked
        if self.rotates:
            angles = (position_embeddings[0].squeeze(0), position_embeddings[1].squeeze(0))
        else:
            angles = (self.still[0].expand(len(x), -1), self.still[1].expand(len(x), -1))
        norms, by_head = self.norms, self.norms is None or len(self.norms[0].weight) == asked.head_dim
        qkv = self.ops.linear(x, self.qkv.weight, self.qkv.bias, whole=not by_head)
        weights: tuple[torch.Tensor | None, ...] = (None, None)
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
        q = self.ops.rope_append(qkv, angles, this.slots, this.rows, k, v, *weights, eps, offset)
        out = this.attend(
            asked.layer,
            q,
            scale=asked.scale,
            window=this.window(asked.layer),
            softcap=asked.softcap,
            sinks=asked.sinks,
        )
        return self.ops.linear(out.flatten(-2), self.o.weight, self.o.bias, whole=whole)


def _pass() -> Pass:
    this = current()
    assert this is not None  # a fused forward runs in a pass only
    return this


# -- MLP -------------------------------------------------------------------------------------------------------------
@dataclass
class Mlp:
    """SwiGLU or GeGLU over merged projections."""

    ops: Ops
    gate_up: _Merged
    down: _Merged
    activation: str

    @property
    def sources(self) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """See ``_Merged``."""
        return self.gate_up.sources

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it has the projections."""
        return all(isinstance(getattr(module, name, None), nn.Module) for name in (*Mlp._names(module), "down_proj"))

    @staticmethod
    def _names(module: nn.Module) -> tuple[str, ...]:
        return ("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj")

    @classmethod
    def candidates(cls, module: nn.Module, ops: Ops) -> Iterator[Mlp]:
        """One for each activation."""
        *gates, down = _linears(module, *cls._names(module), "down_proj")
        gate_up, out = _Merged.of(gates), _Merged.of([down])
        if len(gate_up.weight) != 2 * down.in_features:
            raise Unfit("its projections do not fit each other")
        for activation in ACTIVATIONS:
            yield cls(ops, gate_up, out, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In place of the module's."""
        return self.ops.linear(self.gated(_packed(x)), self.down.weight, self.down.bias, whole=True).view(x.shape)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, intermediate]``, what the last projection takes."""
        return self.ops.linear_swiglu(x, self.gate_up.weight, self.gate_up.bias, self.activation)


# -- the whole layer -------------------------------------------------------------------------------------------------
@dataclass
class Layer:
    """A layer that adds attention, then an MLP, with norms around them. Either may be the model's own module."""

    ops: Ops
    attention: Attention | nn.Module
    mlp: Mlp | nn.Module
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]

    @staticmethod
    def names(module: nn.Module) -> tuple[str | None, ...]:
        """Of its norms: before attention, after it, before the MLP, after it.

        Raises:
            Unfit: it has others.
        """
        known = {name for names in _NORMS for name in names if name}
        own = {name for name, child in module.named_children() if name in known or Norm.fits(child)}
        for names in _NORMS:
            if own == set(filter(None, names)):
                return names
        raise Unfit(f"its norms are none of a known order: {', '.join(sorted(own)) or 'none'}")

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In place of the module's."""
        shape, residual, ops = hidden_states.shape, _packed(hidden_states), self.ops
        before, after, before_mlp, after_mlp = self.norms
        x = residual if before is None else before(residual)
        if isinstance(self.attention, Attention):
            product = self.attention.product(x, kwargs.get("position_embeddings"))
        else:
            product = _packed(self.attention(x.view(shape), *args, **kwargs)[0])
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
            product = _packed(out[0] if isinstance(out, tuple) else out)
        if after_mlp is None:
            return ops.add_rms_norm(product, total, None, 0.0).view(shape)
        return ops.add_rms_norm(product, total, None, after_mlp.eps, after_mlp.offset, after_mlp.weight).view(shape)
