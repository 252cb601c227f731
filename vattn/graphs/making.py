"""From an example to a verified graph: watch, rehearse, capture, compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from ..interrupts import FinalisersWait, GarbageWaits, Uninterrupted
from .constants import Constants
from .graph import Graph, has_nan
from .inputs import Inputs
from .report import ADVICE, Finding, raised_at
from .state import Buffers, State, same_bits
from .trees import map_tensors
from .watch import Uncapturable, Watch

__all__ = ["Making"]

# Largest difference of a graph's outputs from the forward's, over the largest output. Nearly always they are the same
# bits; operations that add in no fixed order, and convolutions that are chosen anew, are not: a ViT's pooled output of
# bfloat16 is off by 0.025 (probe, H100, 2026-11-27).
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
WAITS = ("read", "shape")


class Making:
    """One signature's way from eager to a graph.

    Args:
        constants: gets what the forward brings from the CPU.
        choice: one of ``CHOICES``: ``"eager"`` finds all the same, and captures nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        constants: Constants,
        example: Inputs,
        another: Inputs,
        choice: str,
    ) -> None:
        self._module, self._device, self._constants = module, device, constants
        self._example, self._another, self._choice = example, another, choice
        self._found: dict[Any, Finding] = {}
        self._buffers: Buffers
        self._stream: torch.cuda.Stream | None = None

    def make(self, pool: Any) -> tuple[list[Finding], Graph | None]:
        """What was found, and the graph if nothing stands in its way, with memory of ``pool`` if that is not None."""
        graph = None
        with self._alone():
            self._buffers = Buffers(self._module)
            try:
                trace = self._record()
                refused = [kind for kind in self._unmended() if kind not in WAITS]
                if not refused and (self._stream is not None or not self._unmended()):
                    self._rehearse(trace)
                    captures = self._stream is not None and self._choice != "eager"
                    if captures and set(self._unmended()) <= set(WAITS):
                        graph = self._captured(pool)
            finally:
                self._buffers.restore()
        return list(self._found.values()), graph

    def _unmended(self) -> list[str]:
        return [finding.kind for finding in self._found.values() if not finding.mended]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Without gradients and autocast, on a stream of its own; random numbers drawn in here do not count."""
        cuda = self._device.type == "cuda"
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cuda", enabled=False) if cuda else nullcontext(),
            torch.random.fork_rng([self._device] if cuda else []),
            torch.cuda.device(self._device) if cuda else nullcontext(),
        ):
            if not cuda:
                yield
                return
            current = torch.cuda.current_stream()
            self._stream = _stream(torch.cuda.current_device())
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
            torch.cuda.synchronize()

    def _watch(self, inputs: Inputs, **options: Any) -> Watch:
        resident = [*self._module.parameters(), *self._module.buffers(), *inputs.tensors]
        return Watch(self._device, self._constants, resident=resident if self._stream is None else (), **options)

    def _add(self, kind: str, operation: str, file: str = "", line: int = 0) -> None:
        self._found[kind, operation, file, line] = Finding(kind, operation, file, line, ADVICE[kind])

    # -- eager runs ------------------------------------------------------------------------------------------------
    def _record(self) -> list[Any]:
        """Run on the example; find everything, and learn what is brought from the CPU."""
        inputs = self._example.copied()
        watch = self._watch(inputs, learn=True)
        with watch.watching():
            outputs = self._module(*inputs.args, **inputs.kwargs)
        self._found |= watch.findings
        for number, (before, after) in enumerate(zip(self._example.tensors, inputs.tensors, strict=True)):
            if not same_bits(before, after):
                self._add("argument", f"tensor {number} of the arguments, {list(before.shape)} {before.dtype}")
        try:
            map_tensors(outputs, torch.Tensor.detach)
        except ValueError as error:
            self._add("output", str(error))
        return watch.trace

    def _rehearse(self, trace: list[Any]) -> None:
        """Run on other values: all that a graph would fix has to be as it was, and the module too."""
        state = State(self._module, self._device)
        self._buffers.restore()
        inputs = self._another.copied()
        waits = bool(self._unmended())  # then what follows may depend on values; a capture will show whether it does
        watch = self._watch(inputs, learn=waits, expected=None if waits else trace)
        with watch.watching():
            self._module(*inputs.args, **inputs.kwargs)
        for key, finding in watch.findings.items():
            self._found.setdefault(key, finding)
        if change := state.change():
            self._add("state", f"in each call, {change}")

    # -- capture ---------------------------------------------------------------------------------------------------
    def _captured(self, pool: Any) -> Graph | None:
        """Capture twice, as a forward may do otherwise under capture than eagerly, and compare.

        The inputs are elsewhere in the second capture, which tells what reads them.
        """
        self._buffers.restore()
        first, inputs = self._example.copied(), self._example.copied()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        try:
            trial, trace, outputs = self._capture(first, pool, None)
            del outputs
            graph, _, outputs = self._capture(inputs, trial.pool(), trace)  # the pool ends with its last graph
            graph.instantiate()
        except Exception as error:
            self._refused(error)
            return None
        for key, finding in self._found.items():
            if not finding.mended:
                self._found[key] = replace(finding, mended=True, advice="the forward leaves it out under capture")
        made = Graph(graph, self._device, inputs, outputs)
        if self._choice in ("measured", "indirect"):
            made.find_readers(trial, first)
        del trial, first
        torch.cuda.synchronize()
        made.graph_bytes = max(0, free - torch.cuda.mem_get_info()[0]) + sum(t.nbytes for t in inputs.on_device)
        expected = self._expected()
        if difference := self._differs(made, expected, frozenset()):
            self._add("different", difference)
            return None
        if made.moved:
            self._move(made, expected)
        return made

    def _capture(self, inputs: Inputs, pool: Any, expected: list[Any] | None) -> tuple[Any, list[Any], Any]:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        watch = self._watch(inputs, guard=True, expected=expected)
        capturing = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        # Other threads may work meanwhile; this one runs no finaliser of ours and no signal handler. The inner context
        # leaves its stream current where the end of a capture fails.
        quiet, own_stream = GarbageWaits(), torch.cuda.stream(self._stream)
        with Uninterrupted(), FinalisersWait(), quiet, own_stream, capturing, watch.watching():
            outputs = self._module(*inputs.args, **inputs.kwargs)
        if swallowed := next((finding for finding in watch.findings.values() if not finding.mended), None):
            raise Uncapturable(swallowed)
        return graph, watch.trace, outputs

    def _refused(self, error: Exception) -> None:
        """Note why a capture failed. Its end may have failed too, and raised over what was raised first."""
        first = error.__context__ if isinstance(error.__context__, Exception) else error
        why = next((each for each in (error, first) if isinstance(each, Uncapturable)), None)
        if why is None:
            text = f"{type(first).__name__}: {str(first).partition(chr(10))[0]}"
            self._add("capture", text, *raised_at(first))
        else:
            finding = why.finding
            self._found.setdefault((finding.kind, finding.operation, finding.file, finding.line), finding)
        if error is not why:
            # CUDA gave the capture up, and PyTorch's random numbers are as under one: until another ends well.
            capturing = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream)
            with Uninterrupted(), GarbageWaits(), suppress(RuntimeError), capturing:
                torch.zeros(1, device=self._device)

    # -- comparison ------------------------------------------------------------------------------------------------
    def _expected(self) -> list[tuple[Inputs, Inputs, Any]]:
        """Inputs, others with other values, and what the forward makes of the inputs: outputs and buffers."""
        expected = []
        for given, other in ((self._another, self._example), (self._example, self._another)):
            self._buffers.restore()
            inputs = given.copied()
            outputs = map_tensors(self._module(*inputs.args, **inputs.kwargs), torch.clone)
            expected.append((given, other, (outputs, self._buffers.values())))
        return expected

    def _differs(self, graph: Graph, expected: list[tuple[Inputs, Inputs, Any]], moved: frozenset[int]) -> str | None:
        """How replays do something else than the forward, to outputs or to buffers."""
        for given, other, wanted in expected:
            self._buffers.restore()
            graph.poison(other.on_device, moved)
            graph.load(given.copied().on_device, moved)
            graph.replay()
            if difference := _difference(wanted, (graph.outputs, self._buffers.values())):
                return difference
        return None

    def _move(self, graph: Graph, expected: list[tuple[Inputs, Inputs, Any]]) -> None:
        """Of the inputs that might be read where they are, leave out those for which that is wrong or does not pay."""
        alike = "example and another hold the same values of it, so that a test would show nothing"
        wrong = "replays that read it elsewhere gave other outputs"
        pairs = zip(self._example.on_device, self._another.on_device, strict=True)
        same = [n for n, pair in enumerate(pairs) if not has_nan(pair[0]) and same_bits(*pair)]
        graph.always_copy(dict.fromkeys(same, alike))
        if self._differs(graph, expected, graph.moved):
            graph.always_copy({n: wrong for n in graph.moved if self._differs(graph, expected, frozenset({n}))})
            if self._differs(graph, expected, graph.moved):
                graph.always_copy(dict.fromkeys(graph.moved, wrong))
        if self._choice == "measured":
            graph.always_copy(graph.dearer([tensor.detach().clone() for tensor in self._example.on_device]))


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """To capture on; always the same, as PyTorch keeps a workspace of cuBLAS for every stream that used it."""
    return torch.cuda.Stream(device)


def _difference(expected: Any, found: Any) -> str | None:
    """In words; None where there is none to speak of."""
    tensors: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []

    def shape(value: Any, into: list[torch.Tensor]) -> str:
        def note(tensor: torch.Tensor) -> torch.Tensor:
            into.append(tensor)
            return torch.empty_like(tensor, device="meta")

        return repr(map_tensors(value, note))

    if shape(expected, tensors[0]) != shape(found, tensors[1]):
        return "another structure, or other plain values"
    for number, (one, other) in enumerate(zip(*tensors, strict=True)):
        if same_bits(one, other):
            continue
        if not one.is_floating_point():
            return f"tensor {number} of the outputs has other values"
        if not torch.equal(one.isfinite(), other.isfinite()) or not torch.equal(one.isnan(), other.isnan()):
            return f"tensor {number} of the outputs is infinite or NaN elsewhere"
        wide = one.double().nan_to_num(0, 0, 0), other.double().nan_to_num(0, 0, 0)
        error = float((wide[0] - wide[1]).abs().max() / wide[0].abs().max().clamp(min=1e-30))
        if error > TOLERANCE.get(one.dtype, 0.1):
            return f"tensor {number} of the outputs is off by {error:.1e} of its largest value"
    return None
