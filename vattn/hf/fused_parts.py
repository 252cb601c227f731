"""Norms, products and experts of a transformers model as a pass computes them: fused operations over merged weights.

Parts are found by the names that checkpoints fix (``q_proj``, ``gate_up_proj``, ``input_layernorm``, …). What such a
module computes beside that is not read from its code: ``candidates`` gives what it may be, and ``vattn.hf.fusion``
takes one that gives what the module gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..ops.experts import MOST_PAIRS
from ..ops.merge import merge
from ..ops.ops_table import Ops
from ..ops.swiglu import ACTIVATIONS

__all__ = ["Experts", "Merged", "Mlp", "Norm", "Output", "Unfit", "altered", "linears", "packed", "require_plain"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def linears(owner: nn.Module, *names: str) -> list[nn.Linear]:
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
class Merged:
    """Projections of one input as one.

    Attributes:
        sources: lists of parameters that become views, each with the tensor that they become views of.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    sources: list[tuple[list[torch.Tensor], torch.Tensor]]

    @classmethod
    def of(cls, linears: Sequence[nn.Linear]) -> Merged:
        """A single projection is taken as it is."""
        biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        if biases and len(biases) < len(linears):
            raise Unfit("only some of its projections have a bias")
        weights: list[torch.Tensor] = [linear.weight for linear in linears]
        if len(linears) == 1:
            return cls(weights[0].detach(), biases[0].detach() if biases else None, [])
        weight, bias = merge(weights), merge(biases) if biases else None
        return cls(weight, bias, [(weights, weight)] + ([] if bias is None else [(biases, bias)]))


def packed(hidden_states: torch.Tensor) -> torch.Tensor:
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
        return self(packed(hidden_states)).view(hidden_states.shape)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[T, hidden]`` of the same."""
        if x.shape[-1] != len(self.weight):
            raise ConfigError(f"this norm is of {len(self.weight)} numbers, got {x.shape[-1]}")
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
        x, shape = packed(input), (*input.shape[:-1], len(self.weight))
        if not len(x):  # a prompt's pass, of which nobody asks for logits
            return x.new_empty(shape)
        return self.ops.linear(x, self.weight, self.bias, whole=True).view(shape)


# -- MLP -------------------------------------------------------------------------------------------------------------
@dataclass
class Mlp:
    """SwiGLU or GeGLU over merged projections."""

    ops: Ops
    gate_up: Merged
    down: Merged
    activation: str

    @property
    def sources(self) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """See ``Merged``."""
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
        *gates, down = linears(module, *cls._names(module), "down_proj")
        gate_up, out = Merged.of(gates), Merged.of([down])
        if len(gate_up.weight) != 2 * down.in_features:
            raise Unfit("its projections do not fit each other")
        for activation in ACTIVATIONS:
            yield cls(ops, gate_up, out, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In place of the module's."""
        return self.ops.linear(self.gated(packed(x)), self.down.weight, self.down.bias, whole=True).view(x.shape)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, intermediate]``, what the last projection takes."""
        return self.ops.linear_swiglu(x, self.gate_up.weight, self.gate_up.bias, self.activation)


# -- experts ---------------------------------------------------------------------------------------------------------
@dataclass
class Experts:
    """What the experts give that a router chose; for many tokens the model's own."""

    ops: Ops
    gate_up: torch.Tensor
    down: torch.Tensor
    activation: str
    own: Callable[..., torch.Tensor]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether it has the weights of all experts as two tensors."""
        weights = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
        return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)

    @classmethod
    def candidates(cls, module: nn.Module, ops: Ops) -> Iterator[Experts]:
        """One for each activation."""
        gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
        _require_weight("gate_up_proj", gate_up)
        _require_weight("down_proj", down)
        count, hidden, size = down.shape
        if gate_up.shape != (count, 2 * size, hidden) or len(list(module.parameters())) > 2:
            raise Unfit("its experts have biases, or weights of other shapes than [experts, outputs, inputs]")
        for activation in ACTIVATIONS:
            yield cls(ops, gate_up.detach(), down.detach(), activation, module.forward)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """In place of the module's."""
        if top_k_index.numel() > MOST_PAIRS:
            return self.own(hidden_states, top_k_index, top_k_weights)
        return self.ops.experts(hidden_states, top_k_index, top_k_weights, self.gate_up, self.down, self.activation)
