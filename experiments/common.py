"""What every experiment shares: timing, the card of the machine, and the records."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from table import read

FIELDS = (
    *("experiment", "case", "system", "metric", "value", "unit", "p20", "p50", "p80"),
    *("gpu", "driver", "torch", "commit", "date", "command"),
)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(p20, p50, p80), by interpolation."""
    if len(samples) == 1:
        return (samples[0],) * 3
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def time_us(function: Callable[[], Any], repeats: int, before: Callable[[], Any] | None = None) -> list[float]:
    """Host microseconds of each call. ``before`` runs ahead of each, untimed."""
    samples = []
    for _ in range(repeats):
        if before is not None:
            before()
        start = time.perf_counter()
        function()
        samples.append((time.perf_counter() - start) * 1e6)
    return samples


class Records:
    """Collects an experiment's records, shows each as it comes, and writes them at the end.

    Records of the same GPU (or of no GPU) from earlier runs are replaced; those of others stay.

    Args:
        experiment: its folder.
        quick: whether this is a quick run, whose records go to ``quick.jsonl``: not to be committed. Those of a second
            run, to see how far figures can be trusted, go to ``again.jsonl``: with VATTN_AGAIN=1 in the environment.
        parts: of the experiment, where a run may measure some only: the first words of the cases that this one
            measures. Cases that begin otherwise are not replaced.
    """

    def __init__(self, experiment: str, quick: bool = False, parts: Sequence[str] | None = None) -> None:
        self.experiment = experiment
        self.parts = parts
        again = bool(os.environ.get("VATTN_AGAIN"))
        name = "quick.jsonl" if quick else "again.jsonl" if again else "results.jsonl"
        self.path = Path(__file__).parent / experiment / name
        self.card = machine_card()
        self.records: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def drawn(self, case: str) -> random.Random:
        """For the order in which a case's systems take turns: the same every time, another in a second run."""
        return random.Random(f"{self.path.stem} {case}")

    def add(self, case: str, system: str, metric: str, unit: str, samples: Sequence[float]) -> None:
        """One record; its value is the median of the samples."""
        p20, p50, p80 = (round(value, 3) for value in percentiles(samples))
        values = (self.experiment, case, system, metric, p50, unit, p20, p50, p80)
        self.records.append({**dict(zip(FIELDS, values, strict=False)), **self.card})
        print(f"{case:48s} {system:10s} {metric:18s} {p50:12.2f} {unit}  ({p20:.2f} to {p80:.2f})", flush=True)

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """What fails in here has no record; the rest is still measured, and ``end`` says so."""
        try:
            yield
        except Exception:
            print(f"FAILED: {what}", flush=True)
            traceback.print_exc(limit=-4, file=sys.stdout)
            self.failures.append(what)

    def end(self) -> None:
        """Write the records.

        Raises:
            SystemExit: something failed.
        """
        self.write()
        if self.failures:
            raise SystemExit(f"failed: {', '.join(self.failures)}")

    def write(self) -> None:
        kept = [record for record in read(self.path) if not self._replaces(record)]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in (*kept, *self.records)))

    def _replaces(self, record: dict[str, Any]) -> bool:
        measured = self.parts is None or record["case"].split()[0] in self.parts
        return measured and record["gpu"] == self.card["gpu"]


def machine_card() -> dict[str, str]:
    """Hardware, software, commit and command of this run."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    # A copy without its history, or with another one, says which commit it is through VATTN_COMMIT, and is believed.
    told = os.environ.get("VATTN_COMMIT")
    commit = told or _output([*git, "rev-parse", "--short=12", "HEAD"])
    status = [*git, "status", "--porcelain", "--", "vattn", "models", "experiments/*.py"]
    changed = not commit or (not told and _output(status))
    has_gpu = torch.cuda.is_available()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "driver": _output(query).splitlines()[0] if has_gpu else f"Linux {platform.release()}",
        "torch": torch.__version__,
        "commit": (commit or "unknown") + ("+changes" if changed else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python", _relative(sys.argv[0], root), *sys.argv[1:]]),
    }


def _relative(path: str, root: Path) -> str:
    """As a reader would type it in the repository's root."""
    full = Path(path).resolve()
    return str(full.relative_to(root)) if full.is_relative_to(root) else path


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""
