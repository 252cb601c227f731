"""The program that drives engines in experiment 13: what it times are the requests' own tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "13_serving"))
import run
import workload

from vattn import Engine

CASE = workload.CASES["tiny"]


@pytest.fixture
def system():
    with Engine(run.make_model("tiny"), max_batch=8, memory_limit=1 << 28) as engine:
        yield run.Vattn(engine)


def test_every_request_gets_its_tokens(system):
    requests, arrivals = workload.trace(CASE), [i / 100 for i in range(CASE.requests)]
    assert requests == workload.trace(CASE)
    for times in (workload.run(system, requests), workload.run(system, requests, arrivals)):
        assert [len(each.tokens) for each in times] == [count for _, count in requests]
        assert all(each.first > 0 and min(each.gaps, default=0) >= 0 for each in times)
    begins = [each.begin for each in times]
    assert [later - begins[0] for later in begins] == pytest.approx(arrivals, abs=1e-6)
    assert not system.engine.has_work


def test_silence_ends_with_the_long_prompt(system):
    longest, beside, alone = workload.silence(system, CASE)
    assert 0 < longest[0] <= beside[0] + 1e3
    assert alone[0] > 0
    assert not system.engine.has_work  # those that were to decode on and on are cancelled


def test_steps_are_between_whole_batches(system):
    samples = workload.step_ms(system, CASE, 4, 200)
    assert 100 < len(samples) < workload.MANY_TOKENS
    assert min(samples) > 0
