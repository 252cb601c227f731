"""Fused parts in place of a transformers model's own, each only after it gave the same numbers as the module it is for.

A layer's modules keep their weights and names; ``forward`` is overridden on the instance, and computes a pass of the
runtime. Outside of a pass the module's own forward runs. What differs, was altered, or is of another structure stays
the model's, and the report says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..graphs.state import place
from ..ops.merge import adopt
from ..ops.ops_table import Ops
from .fused_layers import Attention, Layer
from .fused_parts import Experts, Mlp, Norm, Output, Unfit, altered, require_plain
from .fusion_check import Call, Oracle, Probe
from .passes import Pass, current
from .shadow import Shadow

__all__ = ["Fusion", "FusionReport"]

_DIFFERS = "it computes something else than its fused form"
_DRAWS = 3
_CANDIDATES: dict[str, Callable[[nn.Module, Ops], Iterator[Any]]] = {
    "mlp": Mlp.candidates,
    "experts": Experts.candidates,
    "norm": Norm.candidates,
    "output": Output.candidates,
}
_KINDS = ("layer", "attention", "mlp", "experts", "norm", "output")


@dataclass(frozen=True)
class FusionReport:
    """What of a model was fused.

    Attributes:
        fused: kind of part ("layer", "attention", "mlp", "experts", "norm", "output") -> how many. In a fused layer the
            sums between its parts are fused too; the parts of one that is left are fused by themselves.
        left: kind -> why -> how many stay the model's.
    """

    fused: dict[str, int]
    left: dict[str, dict[str, int]]

    def __str__(self) -> str:
        lines = []
        for kind in (kind for kind in _KINDS if kind in self.fused or kind in self.left):
            reasons = self.left.get(kind, {})
            line = f"{kind}: {self.fused.get(kind, 0)} fused"
            if reasons:
                line += f", {sum(reasons.values())} left"
            lines += [line, *(f"  {count} left: {reason}" for reason, count in reasons.items())]
        return "\n".join(lines) or "nothing was fused"


class Fusion:
    """Fuses what fits when it is made; ``undo`` restores the model.

    Memory grows by the merged weights of one layer at a time: their parameters become views of them.

    Args:
        model: a decoder of transformers, in evaluation mode, whose attention runs in passes.
        ops: what fused parts call.
        forward: ``(tokens [T], Pass)``: runs the model's forward in that pass.
        vocab_size: tokens are below it.
        max_seq_len: positions are below it.

    Attributes:
        report: what was fused, what was left, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        ops: Ops,
        forward: Callable[[torch.Tensor, Pass], Any],
        vocab_size: int,
        max_seq_len: int,
    ) -> None:
        self._ops = ops
        self._overridden: dict[nn.Module, Shadow] = {}
        self._places: dict[nn.Module, dict[str, Any]] = {}
        self._skipped: set[nn.Module] = set()
        self._fused: Counter[str] = Counter()
        self._left: dict[str, Counter[str]] = {kind: Counter() for kind in _KINDS}
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)  # the user's random numbers stay as they are
        self._positions = _positions(max_seq_len).to(device)
        tokens = torch.randint(vocab_size, (len(self._positions),), generator=generator).to(device)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                self._fuse(model, tokens, forward)
        except BaseException:
            self.undo()
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the checks took is wanted for K and V, which are not torch's
        self.report = FusionReport(
            {kind: self._fused[kind] for kind in _KINDS if self._fused[kind]},
            {kind: dict(reasons) for kind, reasons in self._left.items() if reasons},
        )

    def require_unchanged(self) -> None:
        """Refuse a model whose weights are others than those that were fused, or whose parts were altered since.

        Raises:
            ConfigError: it was moved, converted or loaded anew; a part that is not called any more got a hook.
        """
        if any(_places(module) != places for module, places in self._places.items()):
            raise ConfigError("the model was moved, converted or loaded since its parts were fused; make a new one")
        for module in self._skipped:
            if reason := altered(module):
                raise ConfigError(
                    f"a {type(module).__name__} {reason} since it was fused into what it is a part of, which does not "
                    "call it; make a new one"
                )

    def undo(self) -> None:
        """Give every module its own forward back. Parameters stay views of merged weights, of the same values.

        A forward that somebody put over ours since stays.
        """
        for module, shadow in self._overridden.items():
            shadow.on = False  # what was put over it may call it
            if vars(module).get("forward") is shadow:
                del module.forward
        self._overridden.clear()
        self._places.clear()
        self._skipped.clear()

    # -- one after the other ---------------------------------------------------------------------------------------
    def _fuse(self, model: nn.Module, tokens: torch.Tensor, forward: Callable[[torch.Tensor, Pass], Any]) -> None:
        kinds = {module: kind for module in model.modules() if (kind := _kind(model, module))}
        self._calls: dict[nn.Module, Call] = {}
        handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in kinds]
        try:
            forward(tokens, probe := Probe(self._positions))
        finally:
            for handle in handles:
                handle.remove()
        inside: set[nn.Module] = set()  # of what was fused as a part of something larger
        for module, kind in kinds.items():
            if module in inside or module not in self._calls:
                continue
            if kind == "layer":
                inside |= self._layer(module)
            elif part := self._part(kind, module):
                self._override(module, part)
                inside |= set(module.modules())
        if unknown := len(probe.asked) - self._fused["attention"] - self._left["attention"].total():
            self._left["attention"]["its projections have other names"] += unknown
        del self._calls
        self._places = {module: _places(module) for module in self._overridden}

    @torch.compiler.disable  # layers may be compiled, each by itself
    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if current() is None:  # another thread runs the model
            return
        if module in self._calls:
            self._calls[module].count += 1
        else:
            self._calls[module] = Call(args, kwargs)

    def _layer(self, module: nn.Module) -> set[nn.Module]:
        """Fuse a layer, or its parts by themselves; returns the modules that are inside of what was fused."""
        names = Layer.names(module)
        children = {"self_attn": "attention", "mlp": "mlp"} | dict.fromkeys(filter(None, names or ()), "norm")
        parts: dict[str | None, Any] = {None: None}
        inside: set[nn.Module] = set()
        for name, kind in children.items():
            child = module.get_submodule(name)
            inside.add(child)
            if _kind(module, child) == kind:
                parts[name] = self._part(kind, child)
                inside |= set(child.modules()) if parts[name] else set()
            elif kind == "mlp" and not any(Experts.fits(each) for each in child.modules()):
                self._left["mlp"]["its projections have other names"] += 1
        try:
            layer = self._whole(module, names, parts)
        except Unfit as reason:
            self._left["layer"][str(reason)] += 1
            for name in children:
                if part := parts.get(name):
                    self._override(module.get_submodule(name), part)
        else:
            self._override(module, layer)
            self._fused["layer"] += 1
        return inside

    def _whole(self, module: nn.Module, names: tuple[str | None, ...] | None, parts: dict[str | None, Any]) -> Layer:
        self._require_once(module)
        require_plain(module)
        if names is None:
            raise Unfit("its norms are in none of the places that are known")
        for name in filter(None, names):
            if not parts.get(name):
                raise Unfit(f"its {name} is left, a {type(module.get_submodule(name)).__name__}")
        norms = tuple(parts[name] for name in names)
        if norms[1] and norms[2] and (norms[1].eps, norms[1].offset) != (norms[2].eps, norms[2].offset):
            raise Unfit("its norms are of different kinds")
        attention, mlp = (parts.get(name) or module.get_submodule(name) for name in ("self_attn", "mlp"))
        return self._agreeing(module, [Layer(self._ops, attention, mlp, norms)])

    def _part(self, kind: str, module: nn.Module) -> Any:
        """The fused form of a module, its weights merged; None where it is left."""
        try:
            if kind in ("attention", "mlp"):
                self._require_once(module)
            require_plain(module)
            if kind == "attention":
                part = self._attention(module)
            else:
                candidates = _CANDIDATES[kind](module, self._ops)
                part = self._agreeing(module, candidates, norm=kind == "norm")
        except Unfit as reason:
            self._left[kind][str(reason)] += 1
            return None
        for parameters, merged in getattr(part, "sources", ()):
            adopt(parameters, merged)
        self._fused[kind] += 1
        return part

    def _require_once(self, module: nn.Module) -> None:
        if (call := self._calls.get(module)) is None or call.count > 1:
            raise Unfit("it does not run once in a pass")

    def _attention(self, module: nn.Module) -> Attention:
        oracle = Oracle(module, self._calls[module].fresh(), self._positions)
        asked, appended = oracle.probe.asked, oracle.probe.appended
        if len(asked) != 1 or appended != [asked[0].layer]:
            raise Unfit("it does not cache and read K and V of its own, once")
        k, v = oracle.probe.own.tensors[asked[0].layer]
        if asked[0].head_dim != k.shape[-1] or k.shape[-1] != v.shape[-1]:
            raise Unfit("its K and V heads are of different sizes")
        own = {parameter.data_ptr() for parameter in module.parameters()}
        sinks = asked[0].sinks
        if not isinstance(asked[0].scale, float) or (sinks is not None and sinks.data_ptr() not in own):
            raise Unfit("its scale or its sinks are computed in the pass")
        candidates = list(Attention.candidates(module, self._ops, asked[0]))
        for part in candidates:
            part.num_outputs = oracle.num_outputs
        return self._agreeing(module, candidates, oracle=oracle)

    def _agreeing(
        self, module: nn.Module, candidates: Iterable[Any], norm: bool = False, oracle: Oracle | None = None
    ) -> Any:
        """The first of the candidates that gives what the module gives, for one of a few random inputs.

        One input is not enough: a rounding may decide to which expert a router sends a token, or what a row of few
        numbers is taken for.
        """
        # Small rows show where an epsilon stands.
        scales = torch.logspace(0, -4, len(self._positions), device=self._positions.device) if norm else None
        candidates = list(candidates)
        for _ in range(_DRAWS):
            oracle = oracle or Oracle(module, self._calls[module].fresh(scales), self._positions)
            for part in candidates:
                if oracle.agrees(part.forward):
                    return part
            oracle = None
        raise Unfit(_DIFFERS)

    def _override(self, module: nn.Module, part: Any) -> None:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs) if current() is None else part.forward(*args, **kwargs)

        called = {child for each in vars(part).values() if isinstance(each, nn.Module) for child in each.modules()}
        self._skipped |= set(module.modules()) - called - {module}
        module.forward = self._overridden[module] = Shadow(own, forward)


def _places(module: nn.Module) -> dict[str, Any]:
    """Of its parameters, all in use by what was fused."""
    return {name: place(parameter) for name, parameter in module.named_parameters()}


def _positions(max_seq_len: int) -> torch.Tensor:
    """Few, up to the last: some layers treat far positions in another way than near ones."""
    near, far = torch.arange(4), torch.linspace(4, max_seq_len - 1, 4).long()
    return torch.cat((near, far)).clamp(max=max_seq_len - 1)


def _kind(model: nn.Module, module: nn.Module) -> str | None:
    """What a module is, by the names of what it has."""
    if isinstance(getattr(module, "self_attn", None), nn.Module) and isinstance(
        getattr(module, "mlp", None), nn.Module
    ):
        return "layer"
    if Attention.fits(module):
        return "attention"
    if Mlp.fits(module):
        return "mlp"
    if Experts.fits(module):
        return "experts"
    if Norm.fits(module):
        return "norm"
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    return "output" if module is outputs else None
