"""``make_capturable``: a module's forward as CUDA graphs, one for each signature of its inputs."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from itertools import cycle
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..tuning.choices import choices_for, kept_or_timed
from .choosing import CHOICES, WAYS, measured
from .constants import Constants
from .entry import Entry
from .graph import Graph
from .inputs import Inputs
from .making import Making
from .pointers import Span
from .report import ADVICE, Finding, Report
from .state import Buffers, State
from .trees import map_tensors

__all__ = ["Capturable", "make_capturable"]

FASTER = "the forward was faster than a replay"


class Capturable:
    """A module that replays a CUDA graph where it has one for its inputs, and runs as ever where it has none.

    ``make_capturable`` makes it. Call it as the module. A call runs the module's own forward, eagerly, if

    * its signature was not captured: the structure of the arguments, shapes, dtypes and devices, plain values, and the
      contents of tensors of the CPU;
    * the forward was faster than a replay when the signature was captured;
    * gradients are asked for (gradients are on, and an argument or a parameter requires them), autocast is on, or
      another capture is underway;
    * the module has changed: a parameter, buffer, submodule or hook was replaced, added or moved, a tensor of the CPU
      written to, or an attribute of a plain type (``training`` is one) set. Writing to parameters and buffers on the
      device in place is no change: replays see it. ``capture`` makes new graphs after a change.

    Not seen: globals, objects other than modules that the forward reads, and settings of PyTorch (precision of
    products, attention backends). A graph keeps them as they were. A replay runs no Python of the forward.

    A replay copies its inputs, or reads them where they are: then they have to stay as they are until it is done on the
    current stream, as in any call of PyTorch.

    Outputs are copies, which the next call leaves alone. With ``copy_outputs=False`` they are the graph's own memory:
    the next call of any signature overwrites them.

    One call at a time: a lock sees to it. Calls on several streams wait for each other.

    Attributes:
        eager_calls: why calls ran eagerly, and how many.
    """

    def __init__(self, module: nn.Module, *, copy_outputs: bool = True, choice: str = "measured") -> None:
        if choice not in CHOICES:
            raise ConfigError(f"choice must be one of {', '.join(map(repr, CHOICES))}, got {choice!r}")
        if not isinstance(module, nn.Module):
            raise ConfigError(f"module must be a torch.nn.Module, got a {type(module).__name__}")
        self.module = module
        self.copy_outputs = copy_outputs
        self.choice = choice
        self.eager_calls: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._report = Report(type(module).__name__, "cpu")
        self._done: torch.cuda.Event | None = None
        self._forget()

    def __enter__(self) -> Capturable:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    @property
    def report(self) -> Report:
        """What was found and done."""
        entries = [entry for known in self._entries.values() for entry in known]
        return replace(self._report, signatures=tuple(entry.signature() for entry in entries))

    @property
    def capturable(self) -> bool:
        """Whether nothing unmended was found."""
        return self._report.capturable

    def undo(self) -> None:
        """Free graphs and memory; later calls run the module's forward. The module itself was never changed."""
        with self._lock:
            if self._done is not None:
                self._done.synchronize()
            self._forget()
            self._report = replace(self._report, num_graphs=0, constant_bytes=0, graph_bytes=0)

    def _forget(self) -> None:
        self._entries: dict[Hashable, list[Entry]] = {}
        self._replays = False  # whether any of them has a graph
        self._reserved: list[Span] = []
        self._constants = Constants()
        self._state: State | None = None

    # -- calls -----------------------------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            found = self._find(args, kwargs)
            if not isinstance(found, str):
                return self._replay(*found)
            self.eager_calls[found] += 1
        return self.module(*args, **kwargs)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, frozenset[int], Inputs] | str:
        """The graph for a call and the inputs that it reads where they are, or why there is none."""
        if not self._entries:
            return "nothing was captured"
        if not self._replays:
            return FASTER
        try:
            called = Inputs(args, kwargs)
        except ConfigError as error:
            return str(error)
        known = self._entries.get(called.key)
        if known is None:
            return "the signature was not captured"
        entry = next((entry for entry in known if entry.takes(called)), None)
        if entry is None:
            return "a tensor of the CPU among the arguments has other values than when it was captured"
        if entry.graph is None or entry.way == "eager":
            return FASTER
        if torch.is_autocast_enabled("cuda"):
            return "autocast is on"
        if torch.cuda.is_current_stream_capturing():
            return "another capture is underway"
        if self._state is not None:
            if change := self._state.change():
                return f"the module has changed: {change}"
            if torch.is_grad_enabled() and any(t.requires_grad for t in (*called.on_device, *self._state.tensors())):
                return "gradients are asked for: call it under torch.no_grad() or torch.inference_mode()"
        return entry.graph, entry.moved(), called

    def _replay(self, graph: Graph, moved: frozenset[int], called: Inputs) -> Any:
        stream = torch.cuda.current_stream(graph.device)
        if self._done is not None:
            stream.wait_event(self._done)
        graph.load(called.on_device, moved)
        graph.replay()
        outputs = map_tensors(graph.outputs, torch.clone) if self.copy_outputs else graph.outputs
        self._done = self._done or torch.cuda.Event()
        self._done.record(stream)
        return outputs

    # -- capture ---------------------------------------------------------------------------------------------------
    def capture(self, *args: Any, **kwargs: Any) -> Report:
        """Find, mend, capture and verify for one more signature. Runs the forward as ``make_capturable`` does.

        Raises:
            ConfigError: arguments of other types than tensors, plain values, tuples, lists and dicts.
        """
        return self._capture(Inputs(args, kwargs), None)

    def _capture(self, example: Inputs, another: Inputs | None) -> Report:
        begin = perf_counter()
        if another is not None and another.key != example.key:
            raise ConfigError("another must have the structure, shapes, types and plain values of example")
        with self._lock:
            if self._state is not None and self._state.change():
                self._forget()
            held = [*self.module.parameters(), *self.module.buffers(), *example.on_device]
            devices = {tensor.device for tensor in held if tensor.device.type == "cuda"}
            device = min(devices, key=str, default=torch.device("cpu"))
            if another is not None and device.type == "cuda" and not another.same_on_host(example):
                raise ConfigError("another must have the values of example in tensors of the CPU")
            known = [entry for entry in self._entries.get(example.key, []) if not entry.takes(example)]
            if len(devices) > 1:
                names = ", ".join(sorted(map(str, devices)))
                findings, graph = [Finding("device", names, "", 0, ADVICE["device"])], None
            else:
                pool = next((graph.pool for graph in self._graphs()), None)
                another = another or example.shuffled(device)
                making = Making(self.module, device, self._constants, example, another, self.choice)
                findings, graph = making.make(pool)
            if graph is not None:
                self._state = State(self.module, device)
                self._entries[example.key] = [*known, self._entry(graph, example)]
                self._replays = bool(self._graphs())
            self._report = self._reported(device, findings, perf_counter() - begin)
        return self.report

    def _entry(self, graph: Graph, example: Inputs) -> Entry:
        """How calls of the example's signature run from now on."""
        if not self.copy_outputs:
            graph.reserved = self._reserved
            self._reserved += graph.output_memory()
        entry = Entry.of(example, graph, self.choice)
        if self.choice == "measured":
            ways = WAYS if graph.moved else WAYS[:2]
            known, replays = self._entries.get(example.key), self._replays
            self._entries[example.key], self._replays = [entry], True  # for the calls that are timed
            try:
                chosen = kept_or_timed(
                    choices_for(graph.device),
                    self._key(entry, example),
                    ways,
                    lambda: self._timed(entry, example, ways, graph.device),
                )
            except BaseException:
                self._replays = replays
                if known is None:
                    del self._entries[example.key]
                else:
                    self._entries[example.key] = known
                raise
            entry.times = dict(chosen.us)
            entry.settle(chosen.way)
        elif self.choice == "graph":
            entry.settle("graph")
        return entry

    def _key(self, entry: Entry, example: Inputs) -> dict[str, str | int]:
        """What a signature's choice is kept under. Modules of one class differ by their sizes, signatures by structure
        and plain values too, of which the key has a digest."""
        kind = type(self.module)
        digest = hashlib.sha256(repr(example.key).encode()).hexdigest()[:6]
        sizes = [parameter.nbytes for parameter in self.module.parameters()]
        return {
            "kind": "module",
            "module": f"{kind.__module__}.{kind.__qualname__}",
            "parameters": len(sizes),
            "parameter_bytes": sum(sizes),
            "training": int(self.module.training),
            "copy_outputs": int(self.copy_outputs),
            "signature": f"{entry.inputs} ({digest})",
        }

    def _timed(self, entry: Entry, example: Inputs, ways: tuple[str, ...], device: torch.device) -> dict[str, float]:
        """Microseconds of a call in each of these ways, with inputs at other addresses in each call."""
        buffers, counted = Buffers(self.module), dict(self.eager_calls)
        given = cycle([example.copied(), example.copied()])

        def call(way: str) -> Callable[[], None]:
            def run() -> None:
                entry.way, inputs = way, next(given)
                self(*inputs.args, **inputs.kwargs)
                torch.cuda.synchronize(device)

            return run

        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cuda", enabled=False),
            torch.cuda.device(device),
        ):
            try:
                return measured({way: call(way) for way in ways})
            finally:
                buffers.restore()
                self.eager_calls.clear()
                self.eager_calls.update(counted)

    def _graphs(self) -> list[Graph]:
        return [entry.graph for known in self._entries.values() for entry in known if entry.graph is not None]

    def _reported(self, device: torch.device, findings: list[Finding], seconds: float) -> Report:
        graphs, before = self._graphs(), self._report
        return Report(
            before.module,
            str(device),
            tuple(dict.fromkeys((*before.findings, *findings))),
            len(graphs),
            sum(copy.nbytes for copy in self._constants.copies),
            sum(graph.graph_bytes for graph in graphs),
            before.capture_ms + seconds * 1e3,
        )


def make_capturable(
    module: nn.Module, example: Any, another: Any = None, *, copy_outputs: bool = True, choice: str = "measured"
) -> Capturable:
    """Find what keeps a module's forward out of a CUDA graph, mend what can be mended, and capture it.

    What the forward brings from the CPU to the GPU in every call (masks, tables, ``torch.tensor`` of a list) is kept
    there instead, if it is the same in every call. All else that a graph cannot hold is named with file and line, and
    the module stays eager. The module itself is not changed. A graph is used only if its outputs were those of the
    forward, on values that it was not captured with.

    A call then runs in one of three ways: ``"eager"``, ``"graph"`` (inputs are copied into the graph's placeholders),
    or ``"indirect"`` (the graph reads them where they are, each for which that was right at other addresses and took
    less time than the copy). All are timed, and the fastest one stays.

    The forward runs six times, without gradients, and then up to 75 times in half a second or so to be timed. Buffers
    are put back afterwards; what else it writes to is not.

    Args:
        module: on a GPU, with its inputs. On the CPU there is only the analysis: it takes arguments, parameters and
            buffers for tensors of the GPU, and other tensors that are made without ``device=`` for tensors of the CPU.
            It cannot see what a forward leaves out under capture, as those of transformers leave out looks at masks.
        example: the arguments of a call: a tuple of positional ones, or a dict of keyword ones, of tensors, plain
            values, tuples, lists and dicts.
        another: the same with other values in tensors of the GPU, by default the example's values in another order (but
            for integers that ascend, as offsets do). Give it where that makes no sense to the forward.
        copy_outputs: whether outputs are copies; see ``Capturable``.
        choice: ``"measured"``, or one of the three ways, which is then taken without being timed. With ``"eager"``
            nothing is captured, and the report is all there is.

    Returns:
        What to call instead of the module. ``report`` says what was found.

    Raises:
        ConfigError: not a module, no such choice, or arguments of other types. What the forward itself raises comes
            through.
    """
    made = Capturable(module, copy_outputs=copy_outputs, choice=choice)
    made._capture(_inputs("example", example), None if another is None else _inputs("another", another))
    return made


def _inputs(name: str, given: Any) -> Inputs:
    if isinstance(given, tuple):
        return Inputs(given, {})
    if isinstance(given, dict) and all(isinstance(key, str) for key in given):
        return Inputs((), given)
    raise ConfigError(
        f"{name} must be a tuple of arguments, or a dict of keyword arguments, got a {type(given).__name__}"
    )
