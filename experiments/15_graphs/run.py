"""Forwards not written for capture, as they are and after make_capturable; what copies of inputs cost. See README.md.
Needs an NVIDIA GPU."""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records, time_us
from forwards import FORWARDS
from indirection import indirection

from vattn.graphs import make_capturable
from vattn.tuning.choices import choices_for

NEEDS = ("cuda", "transformers")
REPEATS, TURNS, WARM_UP = 50, 5, 5
CHILDREN, CHILD_SECONDS = 3, 900  # that get ready side by side; one at a time measures


# -- one forward, in a process of its own: a capture that fails may leave PyTorch unfit for more -----------------------
def measure(name: str, quick: bool) -> dict[str, Any]:
    """Times in ms and what was found; for JSON."""
    torch.manual_seed(0)
    (forward,) = (forward for forward in FORWARDS if forward.name == name)
    module, given = forward.make(quick)
    with alone():
        return measured(module, given)


@contextmanager
def alone() -> Iterator[None]:
    """No other process that measures is in here."""
    with Path(__file__).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measured(module: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device, torch.bfloat16).eval()
    given = {key: _moved(value, device) for key, value in given.items()}
    # Two sets of inputs take turns, as a caller's inputs are seldom where those of the call before were.
    sets = cycle(
        [given, {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in given.items()}]
    )
    with torch.inference_mode():
        found: dict[str, Any] = {"eager": timed(lambda: module(**next(sets)))}
        made = make_capturable(module, given)
        print(made.report)
        found["findings"] = [
            [f.kind, Path(f.file).name, f.line, f.operation, f.mended, f.count] for f in made.report.findings
        ]
        for signature in made.report.signatures:
            found["vattn"] = timed(lambda: made(**next(sets)))
            assert signature.choice == "eager" or not made.eager_calls, made.eager_calls
            found["make"] = made.report.capture_ms
            found["graph_mib"] = made.report.graph_bytes / 2**20
            found["choice"] = signature.choice
            found["chosen by"] = dict(signature.times)
            found["again"] = again(module, given, list(found["chosen by"]), sets)
        made.undo()
    if device == "cuda":
        try:
            found["as it is"] = as_it_is(module, given)
        except Exception as error:
            first = error.__context__ or error
            found["as it is"] = f"{type(first).__name__}: {str(first).partition(chr(10))[0]}"
    return found


def again(module: torch.nn.Module, given: dict[str, Any], ways: list[str], sets: Any) -> dict[str, list[float]]:
    """Times of each way that there was to choose from, in turns after the choice; each graph is captured anew."""
    calls = {way: module if way == "eager" else make_capturable(module, given, choice=way) for way in ways}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(TURNS):
        for way, call in calls.items():
            found[way] += timed(lambda call=call: call(**next(sets)), REPEATS // TURNS)
    return found


def _moved(value: Any, device: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, torch.bfloat16) if value.is_floating_point() else value.to(device)


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Milliseconds from a call until the GPU is done with it."""

    def once() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return [us / 1e3 for us in time_us(once, WARM_UP + repeats)[WARM_UP:]]


@torch.no_grad()
def as_it_is(module: torch.nn.Module, given: dict[str, Any]) -> list[float] | str:
    """Times of a plain capture, as PyTorch's documentation has it; or how its result is wrong."""
    static = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(**static)
    for value in (value for value in static.values() if isinstance(value, torch.Tensor)):
        value.copy_(value.flatten().roll(1).view_as(value))
    graph.replay()
    expected = module(**static)
    for one, other in zip(_tensors(expected), _tensors(out), strict=True):
        if not torch.allclose(one, other, rtol=0.05, atol=0.05):
            return "its outputs differ from the forward's on other inputs"
    return timed(graph.replay)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in values for tensor in _tensors(item)]


# -- all of them -------------------------------------------------------------------------------------------------------
def twelve(records: Records, names: list[str], quick: bool) -> None:
    def run(name: str) -> list[str]:
        command = [sys.executable, __file__, "--forward", name, *(["--quick"] if quick else [])]
        child = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
        if child.returncode:
            raise RuntimeError(f"{name} failed:\n{child.stdout[-1000:]}\n{child.stderr[-3000:]}")
        return child.stdout.splitlines()

    children = ThreadPoolExecutor(CHILDREN)
    try:
        for name, child in [(name, children.submit(run, name)) for name in names]:
            with records.going_on(name):
                *printed, last = child.result()
                print("\n".join(printed))
                add(records, name, json.loads(last))
    finally:
        children.shutdown(cancel_futures=True)


def add(records: Records, name: str, found: dict[str, Any]) -> None:
    """The records of one forward; a table is made of them by report.py."""
    records.add(name, "eager", "forward", "ms", found["eager"])
    plain = found.get("as it is")
    if isinstance(plain, list):
        records.add(name, "torch-capture", "forward", "ms", plain)
    elif plain is not None:
        print(f"{name} captured as it is: {plain}")
        records.add(name, "torch-capture", "wrong" if "outputs differ" in plain else "refused", "1", [1])
    if "vattn" in found:
        records.add(name, "vattn", "forward", "ms", found["vattn"])
        records.add(name, "vattn", "make", "ms", [found["make"]])
        records.add(name, "vattn", "graph_memory", "MiB", [found["graph_mib"]])
        for way, ms in found["again"].items():
            records.add(name, way, "again", "ms", ms)
        medians = {way: statistics.median(ms) for way, ms in found["again"].items()}
        regret = 100 * (medians[found["choice"]] / min(medians.values()) - 1)
        records.add(f"{name} choice={found['choice']}", "vattn", "regret", "%", [regret])
    for kind, file, line, operation, mended, count in found["findings"]:
        where = f"at={file}:{line} " if file else ""
        what = "_".join(operation.split())
        records.add(
            f"{name} {where}kind={kind} mended={'yes' if mended else 'no'} operation={what}",
            "vattn",
            "found",
            "times",
            [count],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--twelve", action="store_true", help="the twelve forwards")
    parser.add_argument("--indirection", action="store_true", help="inputs copied, or read where they are")
    parser.add_argument(
        "--only", nargs="+", choices=[forward.name for forward in FORWARDS], help="these of the twelve; the rest stays"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes; without a GPU, the analysis and eager times"
    )
    parser.add_argument("--forward", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forward:
        print(json.dumps(measure(options.forward, options.quick)))
        return
    if not (options.twelve or options.indirection):
        parser.error("name a part: --twelve or --indirection")
    names = options.only or [forward.name for forward in FORWARDS]
    parts = [*(names if options.twelve else []), *(["indirection"] if options.indirection else [])]
    records = Records("15_graphs", options.quick, parts)
    if torch.cuda.is_available():  # choices are to be made anew
        choices_for(torch.device("cuda", torch.cuda.current_device())).forget({"kind": "module"})
    if options.twelve:
        twelve(records, names, options.quick)
    if options.indirection:
        indirection(records, options.quick)
    records.end()


if __name__ == "__main__":
    main()
