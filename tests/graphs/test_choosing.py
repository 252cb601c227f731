"""The way that is the fastest is taken, and a simpler one where that is as fast."""

from __future__ import annotations

import time

import pytest
import torch
from helpers import graph_faults as faults

from vattn import ConfigError
from vattn.graphs import Report, Signature, make_capturable
from vattn.graphs.choosing import WAYS, measured
from vattn.tuning.choices import Choices, fastest, kept_or_timed


@pytest.mark.parametrize(
    ("times", "way"),
    [
        ({"eager": 10.0, "graph": 20.0, "indirect": 30.0}, "eager"),
        ({"eager": 30.0, "graph": 20.0, "indirect": 30.0}, "graph"),
        ({"eager": 30.0, "graph": 20.0, "indirect": 10.0}, "indirect"),
        ({"eager": 100.0, "graph": 99.5, "indirect": 99.2}, "eager"),  # within noise
        ({"eager": 103.0, "graph": 100.9, "indirect": 100.0}, "graph"),
        ({"eager": 30.0, "graph": 20.0}, "graph"),
    ],
)
def test_the_simplest_of_the_fastest_is_taken(times, way):
    assert fastest(times) == way


def test_ways_take_turns_and_what_the_way_before_left_does_not_count():
    order = []

    def call(name, seconds):
        def run():
            left = order and order[-1] != name
            order.append(name)
            time.sleep(0.02 if left else seconds)  # the first call after another way's is slow

        return run

    times = measured({"eager": call("eager", 0.001), "graph": call("graph", 0.004)})
    assert 1000 <= times["eager"] < times["graph"] < 20000
    turns = [name for at, name in enumerate(order) if not at or order[at - 1] != name]
    assert turns[:4] == ["eager", "graph", "eager", "graph"]
    assert order.count("eager") == order.count("graph") >= 9


def test_a_slow_forward_is_not_timed_for_long():
    calls = []
    begin = time.perf_counter()
    measured({"eager": lambda: calls.append(time.sleep(0.05))})
    assert len(calls) <= 20
    assert time.perf_counter() - begin < 5


def test_another_choice_is_refused():
    with pytest.raises(ConfigError, match="choice must be one of 'measured', 'eager', 'graph', 'indirect', got 'fast'"):
        make_capturable(faults.Linear(), (torch.ones(3, 8),), choice="fast")


def test_a_report_says_what_was_chosen_and_why():
    times = (("eager", 123.4), ("graph", 50.0))
    report = Report("Module", "cuda:0", num_graphs=1, signatures=(Signature("[3, 8] float32", "graph", times),))
    assert "graph for [3, 8] float32 (eager 123 µs, graph 50 µs)" in str(report)


def test_a_choice_is_timed_once_for_the_same_ways(tmp_path):
    store, timed = Choices(tmp_path / "gpu.json"), []

    def time_them():
        timed.append(1)
        return {"eager": 30.0, "graph": 20.0, "indirect": 10.0}

    first = kept_or_timed(store, {"module": "a"}, WAYS, time_them)
    assert first.way == "indirect"
    assert kept_or_timed(store, {"module": "a"}, WAYS, time_them) == first
    assert len(timed) == 1
    kept_or_timed(store, {"module": "b"}, WAYS, time_them)
    assert len(timed) == 2
    assert kept_or_timed(store, {"module": "a"}, WAYS[:2], lambda: {"eager": 3.0, "graph": 2.0}).way == "graph"
