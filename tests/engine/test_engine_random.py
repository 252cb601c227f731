"""Random arrivals, cancellations, priorities, deadlines and shortages: every token is what its request gives alone."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.engine import Fate, alone, any_request, cache_of
from helpers.llama import small_model

from vattn import Engine, KVCache
from vattn.errors import OutOfPages
from vattn.models import Llama

NUM_ON_THE_GPU = 100 if os.environ.get("VATTN_SHORT") else 1000  # under compute-sanitizer


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_random_requests(model: Llama, seed: int) -> None:
    walk(model, 100, seed)


@pytest.mark.parametrize("seed", range(3, 6))
def test_a_hundred_random_requests_in_passes_of_fixed_sizes(model: Llama, seed: int) -> None:
    """As on a GPU, where they are captured: filled up with rows that are nobody's, in tensors that are used again."""
    walk(model, 100, seed, fixed_sizes=True)


@pytest.mark.slow
def test_ten_thousand_random_requests(model: Llama) -> None:
    walk(model, 10_000, seed=99)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("seed", [7, 8])
def test_a_thousand_random_requests_on_the_gpu(seed: int) -> None:
    """Captured steps, and passes of prompts with those who decode in them."""
    walk(small_model().to("cuda"), NUM_ON_THE_GPU, seed)


def take_pages_at_random(cache: KVCache, rng: random.Random) -> list[OutOfPages]:
    """Now and then the pages that sequences are about to grow by are somebody else's for a moment. Admission leaves
    room for growth, so this alone makes preemption happen often. Returns a list of the errors to come."""
    errors: list[OutOfPages] = []
    ensure_batch = cache.ensure_batch

    def ensure_or_not(*args: Any, wait: bool = True, **options: Any) -> None:
        if wait and rng.random() < 0.05:
            errors.append(OutOfPages("the last pages are gone"))
            raise errors[-1]
        ensure_batch(*args, wait=wait, **options)

    cache.ensure_batch = ensure_or_not  # type: ignore[method-assign]
    return errors


def walk(model: Llama, num_requests: int, seed: int, fixed_sizes: bool = False) -> None:
    """Nothing is lost, nothing comes twice, nobody waits for ever, and memory stays within its limit."""
    rng = random.Random(seed)
    kinds = [any_request(rng) for _ in range(min(num_requests, 300) // 2)]
    expected = alone(model, kinds)
    order = rng.choice(("token", "layer")) if model.device.type == "cpu" else "layer"
    num_pages = (12 if order == "token" else 20) + rng.randrange(10)
    with cache_of(model, max_slots=rng.choice((4, 7)), num_pages=num_pages, order=order) as cache:
        with Engine(model, cache, max_step_tokens=rng.choice((7, 32, 256))) as engine:
            if fixed_sizes:
                cache.ensure(engine._loop.own_slot, 1)
                engine._passes._captures = True
            taken_away = take_pages_at_random(cache, rng)
            fates: dict[tuple[int, int], Fate] = {}
            open_requests: set[int] = set()
            num_open: dict[int, int] = {}  # samples, by request
            num_submitted, num_cancelled, held = 0, 0, None
            while num_submitted < num_requests or engine.has_work:
                while num_submitted < num_requests and engine.num_waiting < 30 and rng.random() < 0.6:
                    kind = rng.randrange(len(kinds))
                    options = {
                        "priority": rng.choice((0, 0, 0, 1, -3, 10)),
                        "deadline_s": rng.choice((None,) * 12 + (0.0, 0.005, 0.05, 1000.0)),
                    }
                    request_id = engine.submit(replace(kinds[kind], **options))
                    fates.update(((request_id, c.index), Fate(c)) for c in expected[kind])
                    open_requests.add(request_id)
                    num_open[request_id] = kinds[kind].n
                    num_submitted += 1
                if open_requests and rng.random() < 0.03:
                    request_id = rng.choice(sorted(open_requests))
                    engine.cancel(request_id)
                    open_requests.discard(request_id)
                    for key in [key for key in fates if key[0] == request_id]:
                        del fates[key]
                    num_cancelled += 1
                if rng.random() < 0.05:  # somebody else takes memory of the cache, or gives it back
                    if held is not None:
                        cache.release(held)
                        held = None
                    elif engine.num_running < cache.max_slots - 2:
                        held = cache.acquire()
                        rows = rng.randrange(1, cache.layout.max_seq_len)
                        while rows:  # as much of it as there is
                            with suppress(OutOfPages):
                                cache.ensure(held, rows)
                                break
                            rows //= 2
                num_taken_away = len(taken_away)
                try:
                    tokens = engine.step()
                except OutOfPages:
                    assert held is not None or len(taken_away) > num_taken_away, "nobody else holds memory"
                    if held is not None:
                        cache.release(held)
                        held = None
                    continue
                for new in tokens:
                    fates[new.request_id, new.index].add(new)  # KeyError: of a cancelled request
                    num_open[new.request_id] -= new.finish_reason is not None
                    if not num_open[new.request_id]:
                        open_requests.discard(new.request_id)
                if rng.random() < 0.05:
                    cache.check_integrity()
            assert all(fate.finish_reason for fate in fates.values())
            reasons = [fate.finish_reason for fate in fates.values()]
            assert reasons.count("length") > num_requests / 5
            assert {"stop", "length", "deadline"} == set(reasons)
            stats = engine.stats()
            assert num_cancelled
            assert not fixed_sizes or engine._passes._fixed
            assert stats.num_preemptions > num_requests / 300 or num_requests < 300
            if held is not None:
                cache.release(held)
        end = cache.stats()
        assert end.peak_physical_bytes <= cache.memory_limit
        assert end.num_live_slots == end.in_use_bytes == 0
        cache.check_integrity()
