"""Which of several ways to run something is fastest on a GPU: measured once, kept in a file, found by its key.

"Use a graph only where it wins" is the third idea of PyGraph (Ghosh et al., arXiv 2503.19779). Here the ways to run a
thing are timed in turns, and what was chosen is kept beside the tables of ``vattn tune``, for every later process.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ..driver import cuda_version
from ..errors import ConfigError
from .table import file_name, own_folder

__all__ = [
    "EAGER",
    "Choice",
    "Choices",
    "choices_for",
    "fastest",
    "kept_choices",
    "kept_or_timed",
    "time_in_turns",
    "versions_now",
]

EAGER = "eager"  # kernels are launched one by one
_SUFFIX = ".graphs.json"
_TIE = 1.01  # timings of the same thing differ by as much

Key = Mapping[str, str | int]
Record = tuple[dict[str, str | int], "Choice"]


@cache
def versions_now() -> Mapping[str, str]:
    """Of the software that decides how fast a way is. ``driver`` is the newest CUDA that the driver knows."""

    def installed(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    cuda = {"cuda": torch.version.cuda or "none", "driver": cuda_version() or "none"}
    return {"vattn": installed("vattn"), "torch": str(torch.__version__), "triton": installed("triton"), **cuda}


@dataclass(frozen=True)
class Choice:
    """What was measured for one key.

    Attributes:
        way: the one to use.
        us: microseconds of every way that ran.
        failed: why, for each way that did not run.
        versions: of the software that it was measured with.
        made: when, in UTC.
    """

    way: str
    us: Mapping[str, float]
    failed: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions_now)
    made: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d %H:%M}")

    def __post_init__(self) -> None:
        if self.way not in self.us:
            raise ConfigError(f"the way {self.way!r} is none of those that were timed, {[*self.us]}")

    @classmethod
    def of(cls, us: Mapping[str, float], failed: Mapping[str, str] | None = None) -> Choice:
        """The ``fastest`` way of these, measured now."""
        return cls(fastest(us), {way: round(each, 2) for way, each in us.items()}, failed or {})

    @property
    def current(self) -> bool:
        """Whether the software is still what it was measured with."""
        return self.versions == versions_now()

    def slower_percent(self, way: str) -> float:
        """How much longer another way takes than the chosen one."""
        return 100 * (self.us[way] / self.us[self.way] - 1)


class Choices:
    """A file of choices of one GPU. Several processes may use it at once.

    A file that is missing holds none. One that cannot be read holds none either, ``read`` says why, and the next choice
    that is kept replaces it. Records that are not whole are left out.

    Args:
        path: of the file; it and its folder need not be there.
        gpu: whose it is, for those who read it.
    """

    def __init__(self, path: Path, gpu: str = "") -> None:
        self.path, self.gpu = path, gpu

    def find(self, key: Key) -> Choice | None:
        """The choice for exactly this key, of today's software; None where it is to be measured.

        Args:
            key: names to texts and numbers; whatever changes which way is fastest.
        """
        wanted = _checked(key)
        choice = next((choice for found, choice in self.read()[0] if found == wanted), None)
        return choice if choice is not None and choice.current else None

    def keep(self, key: Key, choice: Choice) -> None:
        """Keep a choice in place of an earlier one for the same key. Where the file cannot be written, a warning says
        so: what was measured holds for this process.
        """
        wanted = _checked(key)
        self._change(lambda found: found != wanted, [(wanted, choice)])

    def forget(self, part: Key) -> None:
        """Drop the choices whose keys hold all of this, so that they are measured again."""
        wanted = _checked(part).items()
        if any(wanted <= key.items() for key, _ in self.read()[0]):
            self._change(lambda found: not wanted <= found.items(), [])

    def read(self) -> tuple[list[Record], str | None]:
        """All keys and their choices, those of other software included; and what is wrong with the file, or None."""
        try:
            document = json.loads(self.path.read_text())
            listed = document["choices"]
            self.gpu = self.gpu or str(document.get("gpu", ""))
        except FileNotFoundError:
            return [], None
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            return [], f"{self.path} holds no choices ({error!r}): delete it, or measure again, which replaces it"
        records = [_parsed(each) for each in listed] if isinstance(listed, list) else [None]
        whole = [each for each in records if each is not None]
        broken = len(records) - len(whole)
        return whole, f"{self.path}: {broken} of {len(records)} choices cannot be read" if broken else None

    def _change(self, keeps: Callable[[dict[str, str | int]], bool], more: list[Record]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                kept = [record for record in self.read()[0] if keeps(record[0])]
                _replace(self.path, _text(self.gpu, kept + more))
        except OSError as error:
            warnings.warn(
                f"what was measured is not kept, and is measured again next time ({error}): let {self.path.parent} be "
                "written to, or set XDG_CACHE_HOME to a folder that can be",
                RuntimeWarning,
                stacklevel=4,
            )


def choices_for(device: torch.device) -> Choices:
    """Those of a device's GPU, in the user's own folder."""
    gpu = torch.cuda.get_device_name(device)
    return Choices(own_folder() / (file_name(gpu) + _SUFFIX), gpu)


def kept_or_timed(store: Choices, key: Key, ways: Iterable[str], time: Callable[[], Mapping[str, float]]) -> Choice:
    """The kept choice, if exactly these ways were timed for it; else one made and kept now.

    Args:
        time: microseconds of each way, the simplest first.
    """
    kept = store.find(key)
    if kept is not None and kept.us.keys() == set(ways):
        return kept
    choice = Choice.of(time())
    store.keep(key, choice)
    return choice


def kept_choices() -> list[Choices]:
    """Of every GPU that has a file in the user's own folder."""
    return [Choices(path) for path in sorted(own_folder().glob(f"*{_SUFFIX}"))]


def fastest(us: Mapping[str, float]) -> str:
    """The first way whose time is within 1 % of the least: a tie goes to the way that is listed before.

    Whoever lists ``EAGER`` first so uses a graph, which takes memory, only where it is faster by more than noise.
    """
    least = min(us.values())
    return next(way for way, each in us.items() if each <= _TIE * least)


def time_in_turns(
    launches: Mapping[str, Callable[[], object]],
    wait: Callable[[], object],
    *,
    rounds: int = 9,
    in_a_row: int = 4,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, float]:
    """Microseconds of each launch, the median of several rounds in which all take turns.

    In a round each is launched a few times in a row and waited for, as a decode loop launches a step behind another.
    The host's work counts as far as it keeps the device waiting.

    Args:
        launches: by name; each has run before.
        wait: returns when the device is done.
        rounds: samples of each.
        in_a_row: launches of a sample.
        clock: seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in launches}
    for _ in range(rounds):
        for name, launch in launches.items():
            wait()
            start = clock()
            for _ in range(in_a_row):
                launch()
            wait()
            samples[name].append((clock() - start) * 1e6 / in_a_row)
    return {name: median(found) for name, found in samples.items()}


def _checked(key: Key) -> dict[str, str | int]:
    if not all(isinstance(name, str) and type(value) in (str, int) for name, value in key.items()):
        raise ConfigError(f"a key has texts and whole numbers by their names, got {dict(key)!r}")
    return dict(key)


def _parsed(record: Any) -> Record | None:
    """None where it is not whole."""
    with suppress(TypeError, LookupError, ValueError, AttributeError, ConfigError):
        us = {str(way): float(each) for way, each in record["us"].items()}
        failed, versions = ({str(a): str(b) for a, b in record[name].items()} for name in ("failed", "versions"))
        if all(0 < each < float("inf") for each in us.values()):
            return _checked(record["key"]), Choice(str(record["way"]), us, failed, versions, str(record["made"]))
    return None


def _text(gpu: str, records: list[Record]) -> str:
    """The file's text, one record a line."""
    lines = [
        json.dumps(
            {"key": key, "way": choice.way, "us": choice.us}
            | {"failed": choice.failed, "versions": choice.versions, "made": choice.made}
        )
        for key, choice in records
    ]
    return f'{{\n "gpu": {json.dumps(gpu)},\n "choices": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for the other processes that change the file. The lock goes with the process that holds it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    """Another process reads the file as it was or as it is, never a part of it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".new")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
