"""Decode steps on a host whose cores are all busy, with one or more steps under way. See README.md; needs a GPU."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
from decoding import SHAPES, Setting, decoding, random_models, step_ms

NEEDS = ("cuda",)
STEPS = 400
LENGTH = 1024
BATCHES = (1, 16, 64)
SYSTEMS = {
    "vattn": {},
    "vattn-2-ahead": {"steps_ahead": 2},
    "vattn-16-ahead": {"steps_ahead": 16},
    "vattn-16-ahead-4-a-launch": {"steps_ahead": 16, "steps_per_launch": 4},
    "vattn-16-ahead-8-a-launch": {"steps_ahead": 16, "steps_per_launch": 8},
    "vattn-measured-16-ahead-8-a-launch": {"steps_ahead": 16, "steps_per_launch": 8, "graphs": "measure"},
}
ENDLESS = "print(flush=True)\nwhile True: pass"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE) for _ in range(processes)]
    try:
        for each in running:
            assert each.stdout is not None
            each.stdout.readline()
        yield
    finally:
        for each in running:
            each.kill()
        for each in running:
            each.communicate()


def level(times: list[float]) -> list[float]:
    """Without the growth that longer sequences bring: a line through the faster nine tenths."""
    index = np.arange(len(times))
    middle = np.array(times) <= np.quantile(times, 0.9)
    slope, _ = np.polyfit(index[middle], np.array(times)[middle], 1)
    return (np.array(times) - slope * (index - index.mean())).tolist()


def each_step(launches: list[float], per_launch: int) -> list[float]:
    """Of several steps to a launch, all but one take an equal share of the median launch, and one the rest: nothing
    waits for the host between them."""
    share = median(launches) / per_launch
    return [ms for launch in launches for ms in (*[share] * (per_launch - 1), launch - share * (per_launch - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the 1B shape only")
    options = parser.parse_args()
    records = Records("04_decode", options.quick, ["busy"])
    for name, model, ops in random_models(["1B"] if options.quick else SHAPES):
        for batch in BATCHES:
            for host, processes in (("idle", 0), ("busy", len(os.sched_getaffinity(0)))):
                for system, changed in SYSTEMS.items():
                    with (
                        decoding(model, batch, LENGTH, Setting(ops, **changed), steps=STEPS) as loop,
                        busy(processes),
                    ):
                        per_launch = changed.get("steps_per_launch", 1)
                        times = each_step(level(step_ms(loop, STEPS, per_launch)), per_launch)
                    case = f"busy {name} B={batch} L={LENGTH} host={host}"
                    records.add(case, system, "step", "ms", times)
                    records.add(case, system, "step_p99", "ms", [float(np.quantile(times, 0.99))])
                    records.add(case, system, "step_max", "ms", [max(times)])
                    gc.collect()
    records.end()


if __name__ == "__main__":
    main()
