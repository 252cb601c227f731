"""What was found in a forward, as a person reads it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["ADVICE", "Finding", "Report", "Signature", "here"]

# What to do about each kind of finding.
ADVICE = {
    "read": "keep the value on the device (torch.where, masked arithmetic), or pass it as a plain argument",
    "shape": "give the result a fixed shape: torch.where, a mask to multiply by, torch.nonzero_static, output_size=",
    "host": "keep the tensor on the device: register_buffer, or device= where it is made",
    "changes": "what it depends on changes from call to call: pass it as an argument",
    "random": "call eval(), or pass the random numbers as an argument",
    "stream": "run everything on the current stream",
    "argument": "work on a copy of the argument",
    "output": "return tensors, plain values, and tuples, lists, dicts or dataclasses of them",
    "state": "keep it in a buffer that is written in place: a replay runs no Python",
    "device": "put the whole module, and its inputs, on one device",
    "capture": "CUDA refused; the cause may be a synchronisation, or a library, that PyTorch does not see",
    "different": "the graph's outputs are not those of the forward: what it does cannot be replayed",
}
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a CUDA graph cannot hold.

    Attributes:
        kind: ``"read"`` (the host waits for a value: ``.item()``, ``.tolist()``, ``bool(tensor)``, ``.cpu()``),
            ``"shape"`` (a shape that depends on values: ``nonzero``, boolean indexing, ``repeat_interleave``),
            ``"host"`` (a tensor of the CPU in work of the GPU), ``"changes"`` (a number, a tensor of the CPU or an
            operation that is another one in the next call), ``"random"``, ``"stream"`` (work on another stream),
            ``"argument"`` (an argument is written to), ``"output"`` (of a type that cannot be copied), ``"state"`` (an
            attribute of a module that every call changes), ``"device"`` (several devices), ``"capture"`` (CUDA
            refused), ``"different"`` (outputs differ).
        operation: what was called, as ``torch.Tensor.item``.
        file, line: of the code that called it; ``""`` and 0 where there is none.
        advice: what to do, or what was done.
        mended: whether it no longer stands in the way.
        count: how often it happened in one call.
    """

    kind: str
    operation: str
    file: str
    line: int
    advice: str
    mended: bool = False
    count: int = 1

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        where = f"{self.file}:{self.line}: " if self.file else ""
        return f"{where}{self.kind}: {self.operation}{times}: {'mended: ' if self.mended else ''}{self.advice}"


@dataclass(frozen=True, slots=True)
class Signature:
    """How calls of one signature run.

    Attributes:
        inputs: the shapes and dtypes of its tensors.
        choice: ``"eager"``, ``"graph"`` (a replay; inputs are copied), ``"indirect"`` (a replay that reads inputs where
            the caller has them, but for those in ``copied``).
        times: each way that was timed, and the median microseconds from a call until the GPU was done with it.
        moved_bytes: what an indirect call does not copy.
        num_updates: nodes of the graph that it updates where all these inputs are at other addresses than before.
        copied: the inputs that an indirect call copies all the same, by number, each with the reason.
    """

    inputs: str
    choice: str
    times: tuple[tuple[str, float], ...] = ()
    moved_bytes: int = 0
    num_updates: int = 0
    copied: tuple[str, ...] = ()

    def __str__(self) -> str:
        times = ", ".join(f"{name} {microseconds:.0f} µs" for name, microseconds in self.times)
        return f"{self.choice} for {self.inputs}" + (f" ({times})" if times else "")


@dataclass(frozen=True, slots=True)
class Report:
    """What ``make_capturable`` found and did; ``str`` of it is for people.

    Attributes:
        module: its class.
        device: where it runs; on ``cpu`` there is only the analysis.
        findings: in the order of the forward.
        capturable: whether nothing unmended was found.
        num_graphs: input signatures that are replayed.
        constant_bytes: device memory of the copies of tensors of the CPU.
        graph_bytes: device memory that capturing took, inputs and outputs of the graphs included.
        capture_ms: time that finding, capturing, verifying and timing took.
        signatures: those that were captured, and how calls of each run.
    """

    module: str
    device: str
    findings: tuple[Finding, ...] = ()
    num_graphs: int = 0
    constant_bytes: int = 0
    graph_bytes: int = 0
    capture_ms: float = 0.0
    signatures: tuple[Signature, ...] = ()

    @property
    def capturable(self) -> bool:
        return all(finding.mended for finding in self.findings)

    def __str__(self) -> str:
        if self.num_graphs:
            state = f"{self.num_graphs} graphs, {self.graph_bytes / 2**20:.1f} MiB, made in {self.capture_ms:.0f} ms"
        elif self.capturable:
            state = "can be captured" if self.device == "cpu" else "no graph"
        else:
            state = "stays eager"
        lines = [f"{self.module} on {self.device}: {state}", *map(str, self.findings), *map(str, self.signatures)]
        return "\n  ".join(lines)


def here() -> tuple[str, int]:
    """File and line that a person would look at: the innermost one outside of PyTorch and of this folder."""
    frames = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)
    return _outside(list(frames))


def raised_at(error: BaseException) -> tuple[str, int]:
    """The same for where an exception came from."""
    frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    return _outside(list(reversed(frames)))


def _outside(frames: list[traceback.FrameSummary]) -> tuple[str, int]:
    for frame in frames:
        if not frame.filename.startswith((_TORCH, _HERE, "<")):
            return frame.filename, frame.lineno or 0
    return "", 0
