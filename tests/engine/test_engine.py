"""The engine on the real cache: what requests give, alone and together, in chunks, in steps, forked and preempted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.decode import eager
from helpers.engine import (
    PAGE_BYTES,
    alone,
    by_sample,
    cache_of,
    ends,
    requests_of,
    run_out,
    tokens_of,
)
from helpers.llama import random_tokens, small_model

import vattn
from vattn import Completion, Engine, KVCache, Request, Sampling
from vattn.attention.sdpa import SdpaAttention
from vattn.errors import ConfigError, OutOfSlots
from vattn.models import FusedLlama, Llama


@pytest.fixture
def engine(model: Llama, cache: KVCache) -> Iterator[Engine]:
    with Engine(model, cache) as engine:
        yield engine


def test_greedy_equals_the_model_s_own_forward(model: Llama, engine: Engine) -> None:
    prompts = [random_tokens(n, 128, seed=n) for n in (1, 2, 16, 17, 50)]
    completions = engine.generate([Request(prompt, 20) for prompt in prompts])
    assert tokens_of(completions) == eager(model, prompts, 20)
    assert {c.finish_reason for c in completions} == {"length"}
    assert [(c.request_id, c.index, c.error) for c in completions] == [(i, 0, None) for i in range(5)]


def test_it_opens_a_cache_of_its_own_and_closes_it(model: Llama) -> None:
    with Engine(model, max_batch=3, memory_limit=64 << 20) as engine:
        assert (engine.cache.max_slots, engine.cache.memory_limit) == (1 + 4 * 3, 64 << 20)  # 9 for what is stored
        assert tokens_of(engine.generate([Request([3, 5, 7], 10)])) == eager(model, [[3, 5, 7]], 10)
        cache = engine.cache
    engine.close()
    with pytest.raises(ConfigError, match="closed"):
        cache.acquire()


def test_a_model_and_its_runtime_are_the_same(model: Llama, cache: KVCache) -> None:
    with Engine(FusedLlama(model), cache) as engine:
        assert tokens_of(engine.generate([Request([3, 5, 7], 10)])) == eager(model, [[3, 5, 7]], 10)


def test_tokens_do_not_depend_on_the_batch(model: Llama, engine: Engine) -> None:
    wanted = requests_of(7)
    assert tokens_of(engine.generate(wanted)) == [c.tokens for (c,) in alone(model, wanted)]


@pytest.mark.parametrize("max_step_tokens", [1, 16, 1000])
def test_prompts_are_computed_in_chunks(model: Llama, cache: KVCache, max_step_tokens: int) -> None:
    wanted = [Request(random_tokens(n, 128, seed=n), 10) for n in (100, 3, 41)]
    with Engine(model, cache, max_step_tokens=max_step_tokens) as engine:
        assert tokens_of(engine.generate(wanted)) == [c.tokens for (c,) in alone(model, wanted)]
        assert engine.stats().num_prefill_tokens == 99 + 2 + 40  # the last token of a prompt is decoded


def test_no_step_computes_more_than_its_budget(model: Llama, cache: KVCache) -> None:
    """So nobody waits longer for a token than a chunk takes: a prompt that comes silences nobody."""
    with Engine(model, cache, max_step_tokens=16) as engine:
        first = engine.submit(Request([5, 6, 7], 60))
        while not engine.step():
            pass
        engine.submit(Request(random_tokens(400, 128), 3))
        for _ in range(24):
            before = engine.stats().num_prefill_tokens
            assert [new.request_id for new in engine.step()] == [first]
            assert 0 < engine.stats().num_prefill_tokens - before <= 16
        run_out(engine)


def test_short_prompts_share_a_pass(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache, max_step_tokens=64) as engine:
        for i in range(4):
            engine.submit(Request(random_tokens(11, 128, seed=i), 2))
        engine.step()
        assert engine.stats().num_prefill_tokens == 40


def test_requests_wait_for_slots_in_arrival_order(cache: KVCache, engine: Engine) -> None:
    ids = [engine.submit(request) for request in requests_of(10, max_new_tokens=5)]
    first_seen: list[int] = []
    while engine.has_work:
        new = engine.step()
        first_seen += [t.request_id for t in new if t.request_id not in first_seen]
        assert engine.num_running <= cache.max_slots - 1
        cache.check_integrity()
    assert first_seen == ids


def test_a_higher_priority_goes_first(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache, max_batch=1) as engine:
        ids = [engine.submit(Request([5], 2, priority=priority)) for priority in (0, 5, -1, 5)]
        order = list(ends(run_out(engine)))
    assert [key[0] for key in order] == [ids[1], ids[3], ids[0], ids[2]]


@pytest.mark.parametrize("order", ["token", "layer"])
def test_preemption_changes_no_token(model: Llama, order: str) -> None:
    """Samples that use all of their tokens after many that used few: admission did not expect it."""
    wanted = requests_of(6, max_new_tokens=60)
    expected = [c.tokens for (c,) in alone(model, wanted)]
    num_pages = 14 if order == "token" else 20
    with cache_of(model, max_slots=7, num_pages=num_pages, order=order) as tight, Engine(model, tight) as engine:
        engine._scheduler._share = 0.1
        ids = [engine.submit(request) for request in wanted]
        tokens = []
        while engine.has_work:
            tokens += engine.step()
            tight.check_integrity()
        found = by_sample(tokens)
        assert [found[i, 0] for i in ids] == expected
        assert engine.stats().num_preemptions > 0
        stats = tight.stats()
        assert stats.peak_physical_bytes <= tight.memory_limit


def test_admission_leaves_room_for_growth(model: Llama) -> None:
    """The same shortage, with nothing known of others: nobody is computed twice."""
    wanted = requests_of(6, max_new_tokens=60)
    with cache_of(model, max_slots=7, num_pages=14) as tight, Engine(model, tight) as engine:
        assert tokens_of(engine.generate(wanted)) == [c.tokens for (c,) in alone(model, wanted)]
        stats = engine.stats()
        assert stats.num_preemptions == 0
        assert stats.num_prefill_tokens == sum(len(request.prompt_tokens) - 1 for request in wanted)


def test_stop_tokens_end_a_request(model: Llama, engine: Engine) -> None:
    (free,) = engine.generate([Request([5, 6, 7], 30)])
    stop = free.tokens[10]
    unused = next(token for token in range(128) if token not in free.tokens)
    expected = free.tokens[: free.tokens.index(stop) + 1]
    (stopped,) = engine.generate([Request([5, 6, 7], 30, stop_tokens={stop, unused})])
    assert (stopped.tokens, stopped.finish_reason) == (expected, "stop")
    (last,) = engine.generate([Request([5, 6, 7], len(expected), stop_tokens={stop})])
    assert last.finish_reason == "stop"  # at the length too: the stop token is what ended it


def test_steps_stream_one_token_per_request(engine: Engine) -> None:
    for request in requests_of(3, max_new_tokens=4):
        engine.submit(request)
    steps = []
    while engine.has_work:
        steps.append(engine.step())
    steps = [step for step in steps if step]
    # Whose prompt is completed by a pass decodes in it already.
    assert [len(step) for step in steps] == [3, 3, 3, 3]
    assert [t.finish_reason for t in steps[-1]] == ["length"] * 3
    assert [t.finish_reason for t in steps[-2]] == [None] * 3
    assert not any(t.finish_reason for step in steps[:-2] for t in step)
    assert engine.step() == []
    stats = engine.stats()
    assert (stats.num_prefill_tokens, stats.num_decode_tokens) == (0 + 7 + 14, 12)


def test_samples_of_one_prompt(model: Llama) -> None:
    """Computed once, forked, and each its own: the first as without the others, every one as by itself."""
    request = Request(random_tokens(50, 128), 20, Sampling(1.0, seed=7), n=5)
    with cache_of(model, max_slots=8) as cache, Engine(model, cache) as engine:
        completions = engine.generate([request, Request([5], 3)])
        assert [(c.request_id, c.index) for c in completions] == [*((0, i) for i in range(5)), (1, 0)]
        assert len(set(tokens_of(completions))) == 6
        assert engine.stats().num_prefill_tokens == 49
        assert engine.generate([replace(request, n=1)])[0].tokens == completions[0].tokens
        for completion in completions[:5]:
            sampling = request.sampling.for_sample(completion.index)
            assert engine.generate([replace(request, n=1, sampling=sampling)])[0].tokens == completion.tokens
        with cache_of(model, max_slots=3) as narrow, Engine(model, narrow) as other:  # two at a time
            assert tokens_of(other.generate([request])) == tokens_of(completions[:5])
        cache.check_integrity()


def test_samples_share_the_pages_of_their_prompt(model: Llama) -> None:
    request = Request(random_tokens(161, 128), 10, Sampling(1.0), n=4)
    with cache_of(model, max_slots=6) as cache, Engine(model, cache) as engine:
        engine.generate([request])
        assert cache.stats().peak_physical_bytes <= (10 + 4 * 3) * PAGE_BYTES  # 4 x 13 without


def test_log_probabilities(model: Llama, engine: Engine) -> None:
    """Of the model's own distribution, whatever the penalties and the temperature."""
    sampling = Sampling(1.5, seed=3, repetition_penalty=1.5, logit_bias={5: 4.0})
    (answer,) = engine.generate([Request([3, 5, 7], 6, sampling, num_logprobs=3)])
    with cache_of(model) as other:
        slot = other.acquire()
        from helpers.llama import run

        chunk = [3, 5, 7]
        for token, logprob, top in zip(answer.tokens, answer.logprobs, answer.top_logprobs, strict=True):
            logs = run(model, other, [slot], [chunk])[0].double().log_softmax(-1)
            assert logprob == pytest.approx(logs[token].item(), abs=1e-4)
            best = logs.topk(3)
            assert [each for each, _ in top] == best.indices.tolist()
            assert [log for _, log in top] == pytest.approx(best.values.tolist(), abs=1e-4)
            chunk = [token]
    (plain, none) = engine.generate([Request([3], 2), Request([3], 2, num_logprobs=0)])
    assert (plain.logprobs, plain.top_logprobs) == ((), ())
    assert len(none.logprobs) == 2
    assert none.top_logprobs == ((), ())


def test_log_probabilities_that_cannot_be_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    (wanted,) = engine.generate([Request([3, 5], 6)])

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no room for log-probabilities")

    monkeypatch.setattr("vattn.decode.step.logprobs", fail)
    asked, other = engine.generate([Request([3, 5, 7], 6, num_logprobs=1), Request([3, 5], 6)])
    assert (asked.finish_reason, str(asked.error)) == ("error", "no room for log-probabilities")
    assert (other.finish_reason, other.tokens) == ("length", wanted.tokens)


@pytest.mark.parametrize("kind", ["bools", "torch", "bits"])
def test_allowed_tokens(engine: Engine, kind: str) -> None:
    """Called before each token with the answer so far; nothing else is chosen, and others are not held up."""
    seen: list[tuple[int, ...]] = []

    def even_after_odd(answer: tuple[int, ...]) -> object:
        seen.append(tuple(answer))
        mask = np.arange(128) % 2 == len(answer) % 2
        if kind == "bits":
            return np.packbits(mask, bitorder="little").view(np.int32)
        return mask if kind == "bools" else torch.from_numpy(mask)

    free = Request([3, 5, 7], 12, Sampling(1.0, seed=1))
    masked, plain = engine.generate([replace(free, allowed_tokens=even_after_odd), free])
    assert [token % 2 for token in masked.tokens] == [0, 1] * 6
    assert seen == [masked.tokens[:i] for i in range(12)]
    assert plain.tokens == engine.generate([free])[0].tokens


def test_deadlines(model: Llama, engine: Engine) -> None:
    request = Request([3, 5, 7], 400)
    (late,) = engine.generate([replace(request, deadline_s=0)])
    assert (late.tokens, late.finish_reason) == ((), "deadline")
    (whole,) = engine.generate([request])
    (cut,) = engine.generate([replace(request, deadline_s=0.05)])
    assert cut.finish_reason == "deadline"
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < 400
    assert engine.generate([replace(request, deadline_s=1e6)]) == [Completion(3, 0, whole.tokens, "length")]


def test_generate_returns_its_own_and_leaves_the_others(model: Llama, engine: Engine) -> None:
    """What was submitted before runs on beside it; its tokens come with the next ``step``, none lost."""
    wanted = requests_of(4, max_new_tokens=6)
    expected = [c.tokens for (c,) in alone(model, wanted)]
    first = engine.submit(wanted[0])
    tokens = engine.step()
    late = engine.submit(wanted[1])
    mine = engine.generate(wanted[2:])
    assert tokens_of(mine) == expected[2:]
    assert engine.generate([]) == []
    tokens += run_out(engine)
    assert by_sample(tokens) == {(first, 0): expected[0], (late, 0): expected[1]}
    assert list(ends(tokens)) == [(first, 0), (late, 0)]


def test_a_generate_that_raises_drops_its_own_only(model: Llama) -> None:
    """There is no slot for it: it is dropped, and what waited before still waits."""
    with cache_of(model, max_slots=2) as cache, Engine(model, cache) as engine:
        other = cache.acquire()
        waiting = engine.submit(Request([1, 2], 3))
        with pytest.raises(OutOfSlots):
            engine.generate([Request([5], 3)])
        assert engine.num_waiting == 1
        cache.release(other)
        assert {key: len(found) for key, found in by_sample(run_out(engine)).items()} == {(waiting, 0): 3}


def test_cancel(model: Llama, engine: Engine) -> None:
    wanted = requests_of(5, max_new_tokens=6)
    expected = [c.tokens for (c,) in alone(model, wanted)]
    ids = [engine.submit(request) for request in wanted]  # the last waits for a slot
    tokens = engine.step()
    engine.cancel(ids[1])
    engine.cancel(ids[4])
    engine.cancel(12345)
    assert (engine.num_running, engine.num_waiting) == (3, 0)
    engine.generate([Request([5], 2)])  # some steps, whose tokens of the others are kept
    engine.cancel(ids[0])
    tokens += run_out(engine)
    engine.cancel(ids[2])  # has ended: no effect
    found = by_sample(tokens)
    for one in (0, 1):
        assert found.pop((ids[one], 0)) == expected[one][:1]  # reported before it was cancelled
    assert found == {(ids[2], 0): expected[2], (ids[3], 0): expected[3]}


def test_the_first_token_comes_after_its_step(engine: Engine) -> None:
    """Not when that began, which is when a request has its slot."""
    engine.generate([Request([3, 5, 7], 1)])
    stats = engine.stats()
    assert stats.num_steps == 1
    assert stats.first_token_s.sum > stats.queue_s.sum


def test_stats(model: Llama, cache: KVCache, engine: Engine) -> None:
    empty = engine.stats()
    assert (empty.num_waiting, empty.num_running, empty.num_steps, empty.kv_usage) == (0, 0, 0, 0.0)
    assert empty.first_token_s.quantile(0.5) == 0.0
    for request in requests_of(6, max_new_tokens=8):
        engine.submit(request)
    assert engine.stats().num_waiting == 6
    engine.step()
    under_way = engine.stats()
    assert (under_way.num_waiting, under_way.num_running) == (2, 4)
    assert under_way.kv_usage == cache.stats().in_use_bytes / cache.memory_limit > 0
    run_out(engine)
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_decode_tokens) == (0, 0, 48)
    assert (stats.first_token_s.count, stats.between_tokens_s.count, stats.queue_s.count) == (6, 42, 6)
    assert stats.first_token_s.sum >= stats.queue_s.sum > 0
    assert 0 < stats.between_tokens_s.quantile(0.5) <= stats.between_tokens_s.quantile(0.99) < 60
    assert stats.tokens_per_s > 0
    assert sum(stats.first_token_s.counts) == 6
    with pytest.raises(AttributeError):
        stats.num_steps = 0  # type: ignore[misc]


def test_the_public_names() -> None:
    for name in ("Engine", "AsyncEngine", "EngineStats", "Request", "Sampling", "StepToken", "Completion", "QueueFull"):
        assert getattr(vattn, name).__name__ == name
        assert name in dir(vattn)


def test_what_no_engine_can_be_made_of(model: Llama, cache: KVCache) -> None:
    other = small_model()
    for arguments, options, message in (
        ((torch.nn.Linear(2, 2), cache), {}, "a Linear"),
        ((model, "cpu"), {}, "a str as cache"),
        ((model, cache), {"memory_limit": 1 << 20}, "the one given has its own"),
        ((model, cache), {"max_batch": 5}, "max_batch"),
        ((model, cache), {"max_batch": 0}, "max_batch"),
        ((model, cache), {"max_step_tokens": 0}, "max_step_tokens"),
        ((model, cache), {"max_waiting": 0}, "max_waiting"),
        ((model, cache), {"attention": "nonesuch"}, "unknown attention"),
        ((model, cache), {"attention": 3}, "attention must be a backend or its name, .* got 3"),
        ((model, cache), {"attention": SdpaAttention}, "attention must be a backend or its name"),
        ((model, cache), {"prefix_caching": "no"}, "prefix_caching must be True or False, got 'no'"),
        ((model, cache), {"prefix_caching": 0}, "prefix_caching must be True or False"),
        ((model, cache), {"graphs": "sometimes"}, "graphs must be one of always, measure"),
        ((Llama, cache), {}, "not the class Llama"),
        ((model,), {"memory_limit": 1}, "page"),
        ((model,), {"max_batch": 10**9}, r"max_batch=1000000000 takes \d{13} bytes .* bytes free"),
    ):
        with pytest.raises(ConfigError, match=message):
            Engine(*arguments, **options)
        assert cache.stats().num_live_slots == 0
    assert math.isfinite(other.embed_tokens.weight.sum())
