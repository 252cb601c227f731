"""When the next step is launched: late in a pass of prompts, and never so late that the device waits for long."""

from dataclasses import replace

import pytest
from helpers.llama import SMALL

from vattn import Engine, Request
from vattn.engine.pace import Pace
from vattn.models import Llama


class Clock:
    """Seconds that the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(pace: Pace, clock: Clock, rows: int, took_s: float, too_late: bool = False) -> float:
    """A pass of so many rows is launched and takes so long; seconds that its successor is to wait after its start."""
    pace.launched(rows, too_late)
    early = pace.early_s()
    clock.now += took_s
    return max(0.0, early)


def test_waits_for_most_of_a_pass_of_a_size_that_it_knows(clock: Clock) -> None:
    pace = Pace(clock)
    assert run(pace, clock, 1024, 0.025) == 0  # nothing is known of it
    assert run(pace, clock, 1024, 0.025) == pytest.approx(0.019)
    assert run(pace, clock, 512, 0.014) == 0  # of other ones neither
    assert run(pace, clock, 512, 0.014) == pytest.approx(0.008)


def test_waits_for_no_step_that_only_decodes(clock: Clock) -> None:
    pace = Pace(clock)
    for _ in range(3):
        assert run(pace, clock, 0, 0.05) == 0


def test_takes_the_least_time_of_a_size(clock: Clock) -> None:
    """A pass that took longer once, as when it was captured, is forgotten. (Its successor waits no longer than it runs:
    the runner looks.)"""
    pace = Pace(clock)
    run(pace, clock, 1024, 2.0)
    assert run(pace, clock, 1024, 0.025) == pytest.approx(1.994)
    assert run(pace, clock, 1024, 0.5) == pytest.approx(0.019)
    assert run(pace, clock, 1024, 0.025) == pytest.approx(0.025 * 1.05 - 0.006)


def test_follows_passes_that_become_slower(clock: Clock) -> None:
    pace = Pace(clock)
    run(pace, clock, 1024, 0.02)
    waits = [run(pace, clock, 1024, 0.04) for _ in range(30)]
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(0.034)


def test_comes_earlier_where_the_device_had_to_wait(clock: Clock) -> None:
    pace = Pace(clock)
    run(pace, clock, 1024, 0.04)
    before = run(pace, clock, 1024, 0.05)  # the host took more than the margin
    after = run(pace, clock, 1024, 0.05, too_late=True)
    assert after < before
    assert after == pytest.approx(0.04 * 0.8 - 0.006)


def test_the_first_time_of_a_size_may_have_been_too_late(clock: Clock) -> None:
    """A pause of the caller there is not learnt for long."""
    pace = Pace(clock)
    run(pace, clock, 1024, 3.0)
    assert run(pace, clock, 1024, 0.025) == pytest.approx(2.994)
    assert run(pace, clock, 1024, 0.025, too_late=True) == pytest.approx(0.025 * 0.8 - 0.006)


def test_does_not_come_earlier_for_what_it_did_not_wait_for(clock: Clock) -> None:
    """The caller of a step may come late by itself."""
    pace = Pace(clock)
    pace.launched(1024)
    clock.now += 0.04
    pace.launched(1024, too_late=True)
    assert pace.early_s() == pytest.approx(0.034)


@pytest.mark.parametrize(
    ("prompts", "expected"), [((2500,), 1024), ((900, 900), 1024), ((1300, 1300), 2048), ((500,) * 5, 4096)], ids=str
)
def test_several_long_prompts_are_computed_in_larger_passes(prompts: tuple[int, ...], expected: int) -> None:
    """With the budgets of a GPU, and 12 sequences that wait for the pass."""
    model = Llama.random(replace(SMALL, max_position_embeddings=4096, num_layers=1))
    with Engine(model, max_batch=20, memory_limit=1 << 28, prefix_caching=False) as engine:
        engine._runner._busy_budget, engine._runner._idle_budget = 1024, 8192
        for _ in range(12):
            engine.submit(Request([3], 64))
        while engine.num_waiting or engine.stats().num_decode_tokens < 12:
            engine.step()
        before = engine.stats().num_prefill_tokens
        for length in prompts:
            engine.submit(Request([5] * (length + 1), 1))
        engine.step()
        assert engine.stats().num_prefill_tokens - before == min(expected, sum(prompts))


def test_while_a_pass_runs_slots_are_given_to_those_who_wait_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shared prefix takes to be mapped is done beside the GPU; the pass is launched when its time has come."""
    model = Llama.random(replace(SMALL, max_position_embeddings=1024, num_layers=1))
    system = [7, 3] * 100
    with Engine(model, max_batch=8, memory_limit=1 << 28, max_step_tokens=512) as engine:
        engine.generate([Request([*system, 5], 1)])
        engine.submit(Request([3], 64))
        while not engine.stats().num_running or engine.num_waiting:
            engine.step()
        for i in range(3):
            engine.submit(Request([*system, 9 + i, 4], 2))
        runner, before = engine._runner, engine.stats()
        with monkeypatch.context() as running:
            running.setattr(type(runner), "_is_busy", True)
            running.setattr(runner._pace, "early_s", lambda: 0.01)
            for placed in (1, 2, 3, 3):
                assert engine.step() == []
                now = engine.stats()
                assert now.num_running == 1 + placed
                assert now.num_prefix_hits - before.num_prefix_hits == placed * len(system)
                assert (now.num_steps, now.num_prefill_tokens) == (before.num_steps, before.num_prefill_tokens)
        while engine.has_work:
            engine.step()
        assert engine.stats().num_prefill_tokens - before.num_prefill_tokens == 3


def test_an_idle_gpu_does_not_wait_for_the_slots_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Llama.random(replace(SMALL, max_position_embeddings=1024, num_layers=1))
    with Engine(model, max_batch=8, memory_limit=1 << 28, max_step_tokens=512, prefix_caching=False) as engine:
        for i in range(6):
            engine.submit(Request([5 + i] * 61, 2))
        asked = []
        monkeypatch.setattr(engine._runner._admission, "_is_starved", lambda rows, s: asked.append(rows) or rows >= 180)
        engine.step()
        assert asked == [60, 120, 180]
        assert engine.stats().num_prefill_tokens == 180
        assert (engine.stats().num_running, engine.num_waiting) == (3, 3)
        answers = [token for _ in iter(lambda: engine.has_work, False) for token in engine.step()]
        assert sum(token.finish_reason is not None for token in answers) == 6
