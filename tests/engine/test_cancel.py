"""Cancelling: what it costs, and tokens that are on their way out meanwhile."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
from helpers.engine import TOKENS_PER_PAGE, by_sample, cache_of, run_out
from helpers.llama import random_tokens

from vattn import Engine, KVCache, Request
from vattn.errors import OutOfPages
from vattn.models import Llama


def num_instructions(call: Callable[[], object]) -> int:
    """Instructions of Python that a call takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        frame.f_trace_opcodes = True
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_cancellation_costs_what_its_request_has(model: Llama) -> None:
    """It walked over the tokens of all others that nobody had collected yet."""
    with cache_of(model, max_slots=9, num_pages=200) as cache, Engine(model, cache) as engine:
        others = [engine.submit(Request([3 + i], 100)) for i in range(6)]
        doomed = [engine.submit(Request([9], 90)) for _ in range(12)]  # the last ones wait for a slot
        engine.step()
        costs = []
        for i in range(0, 12, 2):
            costs.append(num_instructions(lambda i=i: engine.cancel(doomed[-1 - i])))  # type: ignore[misc]
            engine.generate([Request([5], 15)])  # keeps fifteen tokens of each of the others
        assert max(costs) < 1.2 * min(costs)
        assert sorted(by_sample(run_out(engine))) == [(each, 0) for each in (*others, *doomed[::2])]


def test_cancelling_all_of_many_costs_as_much_for_each(model: Llama) -> None:
    def cost_of_each(count: int, n: int) -> float:
        with cache_of(model, max_slots=9, num_pages=200) as cache, Engine(model, cache) as engine:
            ids = [engine.submit(Request([3, 5, 7], 9, n=n)) for _ in range(count)]
            engine.step()
            return num_instructions(lambda: [engine.cancel(each) for each in ids]) / (count * n)

    assert cost_of_each(800, 1) < 1.2 * cost_of_each(200, 1)
    assert cost_of_each(1, 800) < 1.2 * cost_of_each(1, 200)


def test_close_with_tokens_that_nobody_collected(model: Llama) -> None:
    def cost(num_ends: int) -> float:
        def leave(answer: object) -> None:
            raise SystemExit

        with cache_of(model) as cache:
            engine = Engine(model, cache)
            engine.submit(Request([5], 9, allowed_tokens=leave))
            for _ in range(num_ends):  # their ends are there to report when the step raises
                engine.submit(Request([3], 9, deadline_s=0.0))
            with pytest.raises(SystemExit):
                run_out(engine)
            for _ in range(num_ends):
                engine.submit(Request([3], 9))
            return num_instructions(engine.close) / num_ends

    assert cost(400) < 1.5 * cost(40)


def test_a_handler_that_cancels_and_raises(model: Llama, cache: KVCache) -> None:
    """The step's tokens come with the next one, less those of the request that the handler cancelled."""
    with Engine(model, cache) as engine:
        doomed, other = (engine.submit(Request([3 + i], 30)) for i in range(2))

        def handler(*_: object) -> None:
            engine.cancel(doomed)
            raise KeyboardInterrupt

        def interrupt(answer: object) -> Any:
            if len(answer) == 3:  # type: ignore[arg-type]
                signal.raise_signal(signal.SIGINT)
            return [True] * 128

        caller = engine.submit(Request([9], 30, allowed_tokens=interrupt))
        before = signal.signal(signal.SIGINT, handler)
        tokens = []
        try:
            with suppress(KeyboardInterrupt):
                while engine.has_work:
                    tokens += engine.step()
        finally:
            signal.signal(signal.SIGINT, before)
        late = run_out(engine)
        assert {new.request_id for new in late} == {other, caller}
        found = by_sample(tokens + late)
        assert 3 <= len(found.pop((doomed, 0))) < 30
        assert {key: len(each) for key, each in found.items()} == {(other, 0): 30, (caller, 0): 30}


def test_tokens_that_are_kept_do_not_wait_for_memory(model: Llama) -> None:
    """Those of steps of ``generate`` are handed out though nothing of the engine can run."""
    with cache_of(model, max_slots=3, num_pages=6) as cache, Engine(model, cache) as engine:
        first = engine.submit(Request(random_tokens(10, 128), 4))
        assert len(engine.generate([Request([5], 8)])[0].tokens) == 8
        waiting = engine.submit(Request(random_tokens(60, 128), 4))
        held = cache.acquire()
        cache.ensure(held, 4 * TOKENS_PER_PAGE)
        tokens = engine.step()
        assert [new.request_id for new in tokens] == [first] * 4
        with pytest.raises(OutOfPages):
            engine.step()
        engine.cancel(waiting)
        with suppress(OutOfPages):
            engine.step()
        assert not engine.has_work
        cache.release(held)
