"""Every driver call of a life of an engine, from its first page to its end, fails in turn."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache as once

import pytest
from helpers.engine import TOKENS_PER_PAGE, alone, by_sample, cache_of, ends, tokens_of
from helpers.failing_driver import FailingDriver
from helpers.llama import random_tokens, small_model

from vattn import Engine, KVCache, Request, Sampling, StepToken
from vattn.driver import HostDriver
from vattn.errors import DriverError, OutOfPages, OutOfSlots
from vattn.models import Llama

NUM_PAGES = {"token": 11, "layer": 28}


def load_of(*lengths: int) -> list[Request]:
    """With answers of these lengths."""
    return [
        Request(random_tokens(20, 128, seed=1), lengths[0]),
        Request(random_tokens(35, 128, seed=2), lengths[1], Sampling(1.0, seed=3), n=2),
        Request([5], 24, Sampling(1.0, seed=4)),
        Request(random_tokens(50, 128, seed=5), lengths[2]),
        Request(random_tokens(9, 128, seed=6), 12, priority=2),
        Request(random_tokens(9, 128, seed=7), 12),
        Request(random_tokens(3, 128, seed=8), 60),
    ]


# A page has 16 rows of all layers, or 64 of K or of V of one of the two.
LOADS = {"token": load_of(30, 20, 20), "layer": load_of(60, 40, 30)}
CALLS = ("create", "map", "set_access", "unmap", "zero", "copy")
CANCELLED = (2, 5)
LAST = 6  # runs when the engine is closed


@once
def expected(model: Llama, order: str) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(i, each.index): each.tokens for i, samples in enumerate(alone(model, LOADS[order])) for each in samples}


@dataclass
class Life:
    """Arrivals, forks, growth, a shortage of memory and so a preemption, cancellations and ``close``."""

    model: Llama
    order: str
    driver: FailingDriver = field(default_factory=lambda: FailingDriver(HostDriver()))
    tokens: list[StepToken] = field(default_factory=list)
    num_preemptions: int = 0
    num_raised: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        with cache_of(self.model, 6, NUM_PAGES[self.order], self.order, self.driver) as cache:
            engine = None
            while engine is None:
                try:
                    engine = Engine(self.model, cache, max_step_tokens=24)
                except DriverError:
                    self.raised(cache)
                    assert cache.stats().num_live_slots == 0
            self.load(engine)
            while engine is not None:
                try:
                    engine.close()
                    engine = None
                except DriverError:
                    self.raised(cache)
            cache.check_integrity()
            stats = cache.stats()
            assert stats.num_live_slots == stats.in_use_bytes == 0
            assert stats.peak_physical_bytes <= cache.memory_limit
            self.calls = self.driver.calls.copy()
            self.driver.heal()
            with Engine(self.model, cache) as engine:
                again = engine.generate([LOADS[self.order][0], LOADS[self.order][4]])
                alike = expected(self.model, self.order)
                assert tokens_of(again) == [alike[0, 0], alike[4, 0]]
        assert not self.driver.book.handles

    def load(self, engine: Engine) -> None:
        cache = engine.cache
        engine.submit(LOADS[self.order][0])
        engine.submit(LOADS[self.order][1])
        self.steps(engine, 3)
        held = cache.acquire()
        with suppress(OutOfPages, DriverError):  # others take what is free: those who run find nothing to grow into
            for num_pages in range(1, 20):
                cache.ensure(held, num_pages * TOKENS_PER_PAGE)
        for request in LOADS[self.order][2:6]:
            engine.submit(request)
        self.steps(engine, 8)
        engine.cancel(CANCELLED[0])
        self.steps(engine, 16 if self.order == "token" else 30)
        cache.release(held)
        self.steps(engine, 4)
        engine.cancel(CANCELLED[1])
        while engine.has_work:
            self.steps(engine, 1)
        assert engine.submit(LOADS[self.order][LAST]) == LAST
        self.steps(engine, 20)
        self.num_preemptions = engine.stats().num_preemptions

    def steps(self, engine: Engine, count: int) -> None:
        for _ in range(count):
            try:
                self.tokens += engine.step()
            except (OutOfPages, OutOfSlots):  # nothing of ours runs; it is tried again
                self.raised(engine.cache)
            engine.cache.check_integrity()

    def raised(self, cache: KVCache) -> None:
        cache.check_integrity()
        self.num_raised += 1
        assert self.num_raised < 60

    def check(self, num_failures: int) -> None:
        """Every sample has ended and has its tokens, but for those that the failures ended."""
        reasons, found = ends(self.tokens), by_sample(self.tokens)
        failed = {key for key, reason in reasons.items() if reason == "error"}
        for key, tokens in expected(self.model, self.order).items():
            assert found.get(key, ()) == tokens[: len(found.get(key, ()))]
            if key[0] not in (*CANCELLED, LAST):
                assert key in failed or found[key] == tokens
                assert key in reasons
        for new in self.tokens:
            assert new.error is None or isinstance(new.error, DriverError)
            assert (new.error is None) == (new.finish_reason != "error")
        if not num_failures:
            assert not failed


def calls_of_a_life(model: Llama, order: str) -> dict[str, int]:
    life = Life(model, order)
    life.run()
    life.check(0)
    assert life.num_preemptions
    assert set(CALLS) <= life.calls.keys()
    return {call: life.calls[call] for call in CALLS}


def fail_one(model: Llama, order: str, call: str, at: int, times: int, out_of_memory: bool) -> None:
    life = Life(model, order)
    life.driver.fail(call, at, times, out_of_memory)
    life.run()
    life.check(times)


@pytest.fixture(scope="module")
def model() -> Llama:
    return small_model()


@pytest.mark.parametrize("out_of_memory", [False, True])
@pytest.mark.parametrize("order", ["token", "layer"])
def test_driver_calls_failed_under_load(model: Llama, order: str, out_of_memory: bool) -> None:
    """Of each kind the first, the last, and three in a row in the middle."""
    for call, total in calls_of_a_life(model, order).items():
        for at in sorted({1, total}):
            fail_one(model, order, call, at, 1, out_of_memory)
        fail_one(model, order, call, (total + 1) // 2, 3, out_of_memory)


@pytest.mark.slow
@pytest.mark.parametrize("out_of_memory", [False, True])
@pytest.mark.parametrize("order", ["token", "layer"])
def test_every_driver_call_failed_in_turn_under_load(model: Llama, order: str, out_of_memory: bool) -> None:
    for call, total in calls_of_a_life(model, order).items():
        for at in range(1, total + 1):
            fail_one(model, order, call, at, 1, out_of_memory)
