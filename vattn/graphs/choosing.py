"""Which way to run a forward is the fastest: measured, as a caller sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

from ..tuning.choices import EAGER

__all__ = ["CHOICES", "WAYS", "measured"]

# From the simplest on.
WAYS = (EAGER, "graph", "indirect")
CHOICES = ("measured", *WAYS)
# In a turn, each way is called once untimed, as the way before may have left something to undo, and then timed: once
# where a call takes longer than SLOW. Turns end after SECONDS.
TURNS, CALLS_A_TURN, SLOW, SECONDS = 15, 4, 0.01, 0.5


def measured(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The median microseconds of each call. They take turns, so that a GPU that slows down does so for all.

    Args:
        calls: each returns when its work is done.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = perf_counter() + SECONDS
    for _ in range(TURNS):
        for name, call in calls.items():
            took = _seconds(call)
            samples[name] += [_seconds(call) * 1e6 for _ in range(1 if took > SLOW else CALLS_A_TURN)]
        if perf_counter() > end:
            break
    return {name: median(found) for name, found in samples.items()}


def _seconds(call: Callable[[], object]) -> float:
    begin = perf_counter()
    call()
    return perf_counter() - begin
