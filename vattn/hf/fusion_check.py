"""Whether a fused part gives what the model's own module gives: both against the module in a wider dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from ..attention import AttentionBatch, get
from ..kv_cache import KVCache
from .fused_layers import Asked
from .fused_parts import Unfit
from .passes import Pass, running

__all__ = ["Call", "Oracle", "Probe"]

# Modules with more bytes of weights than this are not widened: what is computed in their own dtype is the measure.
_WIDENED_BYTES = 1 << 27
# Roundings of the largest number, in the module's dtype and in float32, that another order of sums may make where
# nothing more exact is known.
_ROUNDINGS = 8, 64


class _Rows:
    """K and V of a probe, by layer, made when a layer asks first."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def k(self, layer: int) -> torch.Tensor:
        return self.tensors[layer][0]

    def v(self, layer: int) -> torch.Tensor:
        return self.tensors[layer][1]

    def open(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        shape = (1, self.probe.num_tokens)
        self.tensors[layer] = k.new_zeros(*shape, *k.shape[1:]), v.new_zeros(*shape, *v.shape[1:])


class Probe(Pass):
    """A pass of one short text over memory of its own, with attention by the formula; notes what was asked.

    Args:
        positions: ``[T]`` int64, what the model is told of the tokens; their rows are 0, 1, 2, …
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self.num_tokens, device = len(positions), positions.device
        self.own = _Rows(self)
        rows = torch.arange(self.num_tokens, device=device)
        batch = AttentionBatch((0,), (self.num_tokens,), (self.num_tokens,), device)
        slots, rows = torch.zeros_like(rows).int(), rows.int()  # as a decode step has them: the same kernels
        super().__init__(cast(KVCache, self.own), slots, rows, [(batch, get("reference"))])
        self.positions = positions
        self.appended: list[int] = []
        self.asked: list[Asked] = []

    @property
    def where(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots, and the positions that the model is told."""
        return self.slots.long(), self.positions

    def window(self, layer: int) -> int | None:
        """None: the text is short."""
        return None

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ``Pass.append``."""
        if layer not in self.own.tensors:
            self.own.open(layer, k, v)
        self.appended.append(layer)
        self.own.k(layer)[0], self.own.v(layer)[0] = k, v

    def attend(self, layer: int, q: torch.Tensor, *, scale: float, **options: Any) -> torch.Tensor:
        """See ``Pass.attend``."""
        softcap, sinks, k = options.get("softcap"), options.get("sinks"), self.own.k(layer)
        self.asked.append(Asked(layer, q.shape[1], q.shape[2], k.shape[2], scale, softcap, sinks))
        return super().attend(layer, q, scale=scale, **options)


@dataclass
class Call:
    """How the model called a module in a pass.

    Attributes:
        count: calls in the pass; the arguments are those of the first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int = 1

    def fresh(self, scales: torch.Tensor | None = None) -> Call:
        """The same with random numbers of the same size for the hidden states.

        Args:
            scales: ``[T]``, by which each token's are multiplied.

        Raises:
            Unfit: it was not called with hidden states ``[..., hidden]``.
        """
        args, kwargs = list(self.args), dict(self.kwargs)
        given = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(given, torch.Tensor) or not given.is_floating_point():
            raise Unfit("it is not called with hidden states first")
        size = given.float().std()
        x = torch.randn_like(given) * torch.where(size.isfinite() & (size > 0), size, torch.ones_like(size))
        if scales is not None:
            x = x * scales[: x.shape[-2], None]
        x = x.to(given.dtype)
        if args:
            args[0] = x
        else:
            kwargs["hidden_states"] = x
        return Call(tuple(args), kwargs)

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """The same with its floating numbers in another dtype."""
        return Call(_in_dtype(self.args, dtype), _in_dtype(self.kwargs, dtype))


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_in_dtype(each, dtype) for each in value)
    if type(value) is dict:
        return {key: _in_dtype(each, dtype) for key, each in value.items()}
    return value


class Oracle:
    """What a module gives for one input: in its own dtype, and in a wider one with the same weights.

    Args:
        module: called as the model calls it.
        call: its arguments.
        positions: of the pass.

    Raises:
        Unfit: its forward cannot be run by itself.

    Attributes:
        probe: what the module asked of the pass.
        num_outputs: of the tuple that it returns; 0 for a tensor.
    """

    def __init__(self, module: nn.Module, call: Call, positions: torch.Tensor) -> None:
        self.call, self.positions = call, positions
        self.probe = Probe(positions)
        try:
            out, self.own = self._run(module, call, self.probe)
            self.num_outputs = len(out) if isinstance(out, tuple) else 0
        except (Unfit, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Unfit(f"it cannot be run by itself ({type(error).__name__})") from error
        size = sum(parameter.nbytes for parameter in module.parameters())
        self.exact = self._widened(module) if size <= _WIDENED_BYTES else None

    def _widened(self, module: nn.Module) -> list[torch.Tensor] | None:
        """What it gives in a wider dtype; None where it cannot be run in one, as grouped products cannot."""
        dtype = torch.float64 if self.own[0].dtype == torch.float32 else torch.float32
        state: dict[str, torch.Tensor] = {}

        def wide(*args: Any, **kwargs: Any) -> Any:
            return functional_call(twin, state, args, kwargs)

        try:  # some quantised weights cannot be converted
            state |= _in_dtype({**dict(module.named_parameters()), **dict(module.named_buffers())}, dtype)
            # A copy without weights of its own: another thread may be running the module.
            twin = copy.deepcopy(module, {id(each): each for each in (*module.parameters(), *module.buffers())})
            return self._run(wide, self.call.in_dtype(dtype), Probe(self.positions))[1]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None

    @staticmethod
    def _run(function: Callable[..., Any], call: Call, probe: Probe) -> tuple[Any, list[torch.Tensor]]:
        with running(probe):
            out = function(*call.args, **call.kwargs)
        first = out[0] if isinstance(out, tuple) else out
        return out, [first, *(each for layer in sorted(probe.own.tensors) for each in probe.own.tensors[layer])]

    def agrees(self, forward: Callable[..., Any]) -> bool:
        """Whether another forward is as near to the exact results as twice the module's own.

        Its largest error counts, and 1.5 times the mean, each as a share of its row's largest number. K and V are
        compared too.
        """
        probe = Probe(self.positions)
        for layer, (k, v) in self.probe.own.tensors.items():
            probe.own.open(layer, k[0], v[0])
        try:
            _, got = self._run(forward, self.call, probe)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it expects other arguments than this module gets
            return False
        exact = self.own if self.exact is None else self.exact
        roundings = (1, 4) if self.exact is not None else _ROUNDINGS
        return all(_near(*each, roundings) for each in zip(got, self.own, exact, strict=True))


def _near(got: torch.Tensor, own: torch.Tensor, exact: torch.Tensor, roundings: tuple[int, int]) -> bool:
    if got.shape != own.shape or got.dtype != own.dtype:
        return False
    exact = exact.to(torch.promote_types(exact.dtype, torch.float32))
    # Each row by itself: of small ones a norm's epsilon makes most.
    size = exact.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(exact.dtype).tiny)
    error, allowed = ((each.to(exact.dtype) - exact).abs() / size for each in (got, own))
    # Where the module's own error happens to be nothing, a last rounding and those of float32 are not refused.
    rounding = roundings[0] * torch.finfo(got.dtype).eps + roundings[1] * torch.finfo(torch.float32).eps
    largest = error.amax() <= 2 * allowed.amax() + rounding
    return bool((largest & (error.mean() <= 1.5 * allowed.mean() + rounding / 8)).item())
