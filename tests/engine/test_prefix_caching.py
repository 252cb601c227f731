"""Prompts begin with rows that are there already, and nothing but the time shows it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from helpers.engine import PAGE_BYTES, TOKENS_PER_PAGE, Faulty, any_sampling, by_sample, cache_of, run_out, tokens_of
from helpers.llama import random_tokens

from vattn import Completion, ConfigError, Engine, KVCache, OutOfPages, OutOfSlots, Request, Sampling
from vattn.models import Llama


@pytest.fixture
def plain(model: Llama) -> Iterator[Engine]:
    """What requests give where nothing is shared."""
    with Engine(model, memory_limit=64 << 20, prefix_caching=False) as engine:
        yield engine
        stats = engine.stats()
        assert (stats.num_prefix_queries, stats.num_prefix_hits, stats.index_bytes) == (0, 0, 0)
        assert engine.cache.stats().num_stored_slots == 0


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random_tokens(length, 128, seed=seed))


def hits(engine: Engine) -> int:
    return engine.stats().num_prefix_hits


# -- what is shared --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["token", "layer"])
def test_a_conversation_goes_on_where_it_ended(model: Llama, plain: Engine, order: str) -> None:
    with cache_of(model, num_pages=200, order=order) as cache, Engine(model, cache) as engine:
        history = text(50)
        for turn in range(4):
            request = Request(history, 20, Sampling(0.8, seed=turn))
            before, calls = engine.stats(), cache.stats().num_map
            (answer,) = engine.generate([request])
            assert answer.tokens == plain.generate([request])[0].tokens
            stats = engine.stats()
            known = len(history) - 1 if not turn else 9  # what was said since, and the last token of the answer
            assert stats.num_prefill_tokens - before.num_prefill_tokens == known
            assert stats.num_prefix_hits - before.num_prefix_hits == len(history) - 1 - known
            assert stats.num_prefix_queries - before.num_prefix_queries == len(history) - 1
            assert cache.stats().num_stored_slots == 1  # in one and the same slot
            if turn:  # which only grows
                lanes = 1 if order == "token" else 4
                rows = TOKENS_PER_PAGE if order == "token" else TOKENS_PER_PAGE * 4
                assert cache.stats().num_map - calls <= lanes * (30 // rows + 2)
            history += answer.tokens + text(9, seed=turn)
        assert engine.stats().index_bytes == cache.stats().index_bytes == cache.stats().physical_bytes > 0
        cache.check_integrity()


def test_a_prompt_that_many_begin_with_is_computed_once(model: Llama, plain: Engine) -> None:
    system = text(130)
    requests = [Request(system + text(5 + i, seed=i), 10) for i in range(6)]
    with cache_of(model, max_slots=9, num_pages=300) as cache, Engine(model, cache, max_step_tokens=32) as engine:
        assert tokens_of(engine.generate(requests)) == tokens_of(plain.generate(requests))
        assert engine.stats().num_prefill_tokens == 130 + sum(5 + i - 1 for i in range(6))
        assert hits(engine) == 5 * 130
        assert cache.stats().index_bytes < 2 * 6 * 130 * cache.layout.bytes_per_token / 3


def test_two_that_share_more_wait_for_each_other_too(model: Llama, plain: Engine) -> None:
    system, topic = (
        text(96),
        text(60, seed=1),
    )  # three passes: nobody comes when a few rows of it are still to be computed
    prompts = [system + text(30, seed=2), *(system + topic + text(20, seed=3 + i) for i in range(3))]
    with cache_of(model, max_slots=9, num_pages=300) as cache, Engine(model, cache, max_step_tokens=32) as engine:
        requests = [Request(prompt, 10) for prompt in prompts]
        assert tokens_of(engine.generate(requests)) == tokens_of(plain.generate(requests))
        assert engine.stats().num_prefill_tokens == 96 + 29 + 60 + 3 * 19


def test_the_same_prompt_again_only_decodes(model: Llama, plain: Engine) -> None:
    requests = [Request(text(70), 30, Sampling(1.0, seed=i), n=2) for i in range(3)]
    with cache_of(model, max_slots=9, num_pages=300) as cache, Engine(model, cache) as engine:
        for request in requests:
            assert tokens_of(engine.generate([request])) == tokens_of(plain.generate([request]))
        assert engine.stats().num_prefill_tokens == 69
        assert tokens_of(engine.generate(requests)) == tokens_of(plain.generate(requests))
        assert engine.stats().num_prefill_tokens == 69


def test_tokens_tell_how_much_was_there(model: Llama) -> None:
    with cache_of(model, max_slots=5, num_pages=200) as cache, Engine(model, cache) as engine:
        for known in (0, 99):
            engine.submit(Request(text(100), 3))
            assert {new.num_cached for new in run_out(engine)} == {known}


def test_who_runs_is_shared_with_while_it_decodes(model: Llama, plain: Engine) -> None:
    first, second = Request(text(70), 60), Request(text(60) + text(9, seed=1), 10)
    with cache_of(model, num_pages=100) as cache, Engine(model, cache) as engine:
        ids = [engine.submit(first)]
        tokens = [new for _ in range(5) for new in engine.step()]
        assert engine.num_running == 1
        assert tokens
        ids.append(engine.submit(second))
        tokens += run_out(engine)
        expected = tokens_of(plain.generate([first, second]))
        assert by_sample(tokens) == {(request_id, 0): each for request_id, each in zip(ids, expected, strict=True)}
        assert hits(engine) == 60


def test_few_tokens_in_common_are_not_worth_it(model: Llama) -> None:
    with cache_of(model, num_pages=100) as cache, Engine(model, cache) as engine:
        engine.generate([Request(text(15) + text(20, seed=i), 5) for i in range(3)])
        assert hits(engine) == 0
        assert engine.stats().num_prefill_tokens == engine.stats().num_prefix_queries == 3 * 34


# -- what is not -----------------------------------------------------------------------------------------------------
def test_tenants_share_nothing(model: Llama, plain: Engine) -> None:
    """Neither rows of one that has ended nor of one that runs, nor a place in the queue behind its prompt."""
    prompt = text(100)
    for salts in (("a", "b", None), (None, "a", "")):
        with cache_of(model, max_slots=9, num_pages=200) as cache, Engine(model, cache, max_step_tokens=32) as engine:
            requests = [Request(prompt, 10, cache_salt=salt) for salt in salts]
            expected = tokens_of(plain.generate(requests))
            for submitted in ([requests[0]], requests[1:], requests[2:]):
                before = hits(engine)
                tokens_of(engine.generate(submitted))
            assert before == 0
            assert hits(engine) == 99
            assert tokens_of(engine.generate(requests)) == expected
            assert cache.stats().shared_bytes == 0


@pytest.mark.parametrize("salt", [3, b"a", ["a"]])
def test_a_salt_is_a_string(model: Llama, cache: KVCache, salt: object) -> None:
    with Engine(model, cache) as engine, pytest.raises(ConfigError, match="cache_salt"):
        engine.submit(Request([1], cache_salt=salt))  # type: ignore[arg-type]


def test_without_it_nothing_is_stored(model: Llama, plain: Engine) -> None:
    requests = [Request(text(100), 10) for _ in range(3)]
    with cache_of(model, num_pages=100) as cache, Engine(model, cache, prefix_caching=False) as engine:
        assert tokens_of(engine.generate(requests)) == tokens_of(plain.generate(requests))
        stats = engine.stats()
        assert (stats.num_prefill_tokens, stats.num_prefix_queries, stats.index_bytes) == (3 * 99, 0, 0)


def test_what_went_wrong_is_not_stored(model: Llama) -> None:
    def refuse(answer: object) -> None:
        raise ZeroDivisionError

    nothing = Sampling(logit_bias=dict.fromkeys(range(128), float("-inf")))
    with cache_of(model, num_pages=100) as cache, Engine(model, cache) as engine:
        for request in (Request(text(60), 5, allowed_tokens=refuse), Request(text(60), 5, nothing)):
            (completion,) = engine.generate([request])
            assert completion.finish_reason == "error"
            assert cache.stats().num_stored_slots == 0
        assert hits(engine) == 0


def test_a_failed_pass_is_not_stored_nor_those_failed_that_waited_for_it(model: Llama, plain: Engine) -> None:
    faulty = Faulty(model)
    requests = [Request(text(100) + text(5, seed=i), 5) for i in range(3)]
    left = [2]

    def fail_once(tokens: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise ZeroDivisionError

    faulty.on_prefill = fail_once
    with cache_of(model, num_pages=100) as cache, Engine(faulty, cache, max_step_tokens=32) as engine:
        first, *others = engine.generate(requests)
        assert isinstance(first.error, ZeroDivisionError)
        assert tokens_of(others) == tokens_of(plain.generate(requests[1:]))
        assert hits(engine) == 100


@pytest.mark.parametrize("how", ["release", "truncate", "acquire"])
def test_a_slot_that_was_changed_behind_our_back_is_not_stored(model: Llama, how: str) -> None:
    with cache_of(model, num_pages=100) as cache, Engine(model, cache) as engine:
        request_id = engine.submit(Request(text(60), 50))
        for _ in range(4):
            engine.step()
        (slot,) = engine._loop.slots
        if how == "truncate":
            cache.truncate(slot, 3)
        else:
            cache.release(slot)
        if how == "acquire":
            cache.acquire(slot)
        tokens = run_out(engine)
        assert [each.finish_reason for each in tokens if each.request_id == request_id][-1] == "error"
        assert cache.stats().num_stored_slots == 0
        (again,) = engine.generate([Request(text(60), 3)])
        assert again.finish_reason == "length"
        assert hits(engine) == 0
        if how != "release":
            cache.release(slot)


def test_rows_behind_the_common_ones_are_not_read(model: Llama, plain: Engine) -> None:
    """In the slot of another sequence that goes on, or of which a fork was made: NaN would spread."""
    for order in ("token", "layer"):
        for tail in (3, 40):  # which is resumed and which is forked
            with cache_of(model, num_pages=200, order=order) as cache, Engine(model, cache) as engine:
                (first,) = engine.generate([Request(text(70), tail + 1)])
                (slot,) = cache.stored()[1].nonzero()[0].tolist()
                whole = cache.stored()[1][slot]
                assert whole == 70 + tail
                for layer in range(2):
                    for view in (cache.k(layer), cache.v(layer)):
                        pages = -(-int(whole) // TOKENS_PER_PAGE) * TOKENS_PER_PAGE
                        view[slot, 70:pages] = torch.nan
                request = Request((*text(70), first.tokens[0] ^ 1, *text(20, seed=2)), 60)
                assert tokens_of(engine.generate([request])) == tokens_of(plain.generate([request]))
                assert hits(engine) == 70
                assert cache.stats().num_stored_slots == (1 if tail == 3 else 2)


# -- coming, going, and shortage -------------------------------------------------------------------------------------
def test_who_is_cancelled_leaves_what_was_computed(model: Llama, plain: Engine) -> None:
    with cache_of(model, num_pages=100) as cache, Engine(model, cache, max_step_tokens=32) as engine:
        request = Request(text(130), 10)
        request_id = engine.submit(request)
        engine.step(), engine.step()
        engine.cancel(request_id)
        assert tokens_of(engine.generate([request])) == tokens_of(plain.generate([request]))
        assert hits(engine) == 64


def test_those_who_wait_for_a_prompt_go_on_without_it(model: Llama, plain: Engine) -> None:
    requests = [Request(text(130) + text(3, seed=i), 10) for i in range(3)]
    with cache_of(model, num_pages=100) as cache, Engine(model, cache, max_step_tokens=32) as engine:
        ids = [engine.submit(request) for request in requests]
        engine.step()
        engine.cancel(ids[0])
        tokens = run_out(engine)
        expected = tokens_of(plain.generate(requests[1:]))
        assert by_sample(tokens) == {(request_id, 0): each for request_id, each in zip(ids[1:], expected, strict=True)}
        assert engine.stats().num_prefill_tokens == 130 + 2 * 2


def test_the_preempted_find_their_rows_again(model: Llama, plain: Engine) -> None:
    """One sequence gives way to others and comes back: most of it is still there."""
    with cache_of(model, max_slots=9, num_pages=36) as cache, Engine(model, cache) as engine:
        requests = [Request(text(20, seed=i), 150) for i in range(4)]
        engine._scheduler._share = 0.1  # as if all answers so far had been short: too many are let in
        engine._scheduler._variance = 0.0
        assert tokens_of(engine.generate(requests)) == tokens_of(plain.generate(requests))
        assert engine.stats().num_preemptions > 0
        assert hits(engine) > 0


def test_a_prefix_is_given_up_while_its_forks_go_on(model: Llama, plain: Engine) -> None:
    """Pages for one long request come from what is stored, but for those that a fork has."""
    with cache_of(model, max_slots=9, num_pages=30) as cache, Engine(model, cache) as engine:
        engine.generate([Request(text(100), 60)])
        requests = [Request(text(100) + text(9, seed=1), 50), Request(text(200, seed=2), 40)]
        assert tokens_of(engine.generate(requests)) == tokens_of(plain.generate(requests))
        assert hits(engine) == 99 + 1
        assert cache.stats().num_oom == engine.stats().num_preemptions == 0
        cache.check_integrity()


def test_what_is_stored_is_in_nobodys_way(model: Llama, plain: Engine) -> None:
    """The cache is full of it, and somebody else takes all slots and all memory."""
    with cache_of(model, max_slots=5, num_pages=40) as cache, Engine(model, cache) as engine:
        requests = [Request(text(90, seed=i), 20) for i in range(5)]
        expected = tokens_of(plain.generate(requests))
        assert tokens_of(engine.generate(requests)) == expected
        assert cache.stats().num_stored_slots == 4
        mine = [cache.acquire() for _ in range(4)]
        with pytest.raises(OutOfSlots):
            cache.acquire()
        assert cache.stats().num_stored_slots == 0
        cache.ensure_batch(mine[:2], [19 * TOKENS_PER_PAGE] * 2)
        for slot in mine:
            cache.release(slot)
        before = hits(engine)
        assert tokens_of(engine.generate(requests)) == expected
        assert hits(engine) == before
        cache.check_integrity()


def test_close_leaves_nothing_stored(model: Llama) -> None:
    with cache_of(model, num_pages=100) as cache:
        with Engine(model, cache) as engine, Engine(model, cache, max_batch=1) as other:
            engine.generate([Request(text(60), 5)])
            other.generate([Request(text(60), 5)])
            assert (hits(engine), hits(other)) == (0, 0)  # each has an index of its own
            assert cache.stats().num_stored_slots == 2
            other.close()
            assert cache.stats().num_stored_slots == 1
            engine.generate([Request(text(60), 5)])
            assert hits(engine) == 59
            engine.submit(Request(text(60), 5))
            engine.step()
        stats = cache.stats()
        assert (stats.num_stored_slots, stats.index_bytes, stats.in_use_bytes) == (0, 0, 0)


# -- at random -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_random_loads_give_the_same_tokens(model: Llama, plain: Engine, seed: int) -> None:
    walk(model, plain, 60, seed)


@pytest.mark.parametrize("seed", range(3))
def test_random_loads_over_pages_of_several_sizes_give_the_same_tokens(model: Llama, plain: Engine, seed: int) -> None:
    walk(model, plain, 40, seed, longer=4, max_page_bytes=8 * PAGE_BYTES)


@pytest.mark.slow
def test_a_long_random_load_gives_the_same_tokens(model: Llama, plain: Engine) -> None:
    for seed in (100, 101):
        walk(model, plain, 250, seed)
        walk(model, plain, 80, seed, longer=4, max_page_bytes=8 * PAGE_BYTES)


def walk(
    model: Llama, plain: Engine, num_requests: int, seed: int, longer: int = 1, max_page_bytes: int = PAGE_BYTES
) -> None:
    """Prompts with a past in common, some with what was answered; two tenants; shortage, cancellations, others.

    Args:
        longer: factor on the lengths of prompts and on memory.
    """
    rng = random.Random(seed)
    order = rng.choice(("token", "layer")) if longer == 1 else "token"  # with many pages to a sequence
    num_pages = longer * ((16 if order == "token" else 24) + rng.randrange(30))
    known: dict[tuple[object, ...], list[Completion]] = {}
    histories: list[tuple[int, ...]] = [text(longer * rng.randrange(20, 60), seed=i) for i in range(3)]

    def any_request() -> Request:
        history = rng.choice(histories)
        prompt = history[: rng.choice((len(history), rng.randrange(1, len(history) + 1)))]
        prompt = (prompt + text(longer * rng.randrange(12), seed=rng.randrange(5)))[: longer * 90]
        options = {"n": rng.choice((1, 1, 1, 3)), "cache_salt": rng.choice(("a", "a", "b"))}
        return Request(prompt, rng.randrange(1, 40), any_sampling(rng), (7, 9, 11), **options)  # type: ignore[arg-type]

    def expected(request: Request) -> list[Completion]:
        key = (request.prompt_tokens, request.max_new_tokens, repr(request.sampling), request.n)
        if key not in known:
            known[key] = plain.generate([replace(request, deadline_s=None)])
        return known[key]

    with cache_of(model, rng.choice((4, 7, 12)), num_pages, order, max_page_bytes=max_page_bytes) as cache:
        with Engine(model, cache, max_step_tokens=rng.choice((7, 32, 256)) if longer == 1 else 256) as engine:
            requests: dict[int, Request] = {}
            answers: dict[tuple[int, int], list[int]] = {}
            ends: dict[tuple[int, int], str] = {}
            num_submitted, held, largest = 0, None, 0
            while num_submitted < num_requests or engine.has_work:
                while num_submitted < num_requests and engine.num_waiting < 12 and rng.random() < 0.5:
                    request = replace(any_request(), deadline_s=rng.choice((None,) * 9 + (0.0,)))
                    requests[engine.submit(request)] = request
                    num_submitted += 1
                if requests and rng.random() < 0.05:
                    gone = rng.choice(sorted(requests))
                    engine.cancel(gone)
                    del requests[gone]
                if rng.random() < 0.05:  # somebody else takes memory and a slot, or gives them back
                    if held is not None:
                        cache.release(held)
                        held = None
                    else:
                        with suppress(OutOfSlots, OutOfPages):
                            held = cache.acquire()
                            cache.ensure(held, rng.randrange(1, longer * 100))
                try:
                    tokens = engine.step()
                except (OutOfPages, OutOfSlots):
                    assert held is not None, "nobody else holds memory or slots"
                    cache.release(held)
                    held = None
                    continue
                for new in tokens:
                    key = new.request_id, new.index
                    if new.token is not None:
                        answers.setdefault(key, []).append(new.token)
                    if new.finish_reason is not None:
                        ends[key] = new.finish_reason
                        whole = tuple(requests[key[0]].prompt_tokens) + tuple(answers.get(key, ()))
                        if rng.random() < 0.5:
                            histories[rng.randrange(3)] = whole[: longer * 80]
                if rng.random() < 0.2:
                    largest = max([largest, *(page.size for page in cache._slots.pool.pages)])
                    cache.check_integrity()
                    engine._samples._prefixes._index.check_integrity()
            for request_id, request in requests.items():
                for index, completion in enumerate(expected(request)):
                    key = request_id, index
                    if ends[key] == "deadline":
                        assert tuple(answers.get(key, ())) == completion.tokens[: len(answers.get(key, ()))]
                    else:
                        assert (tuple(answers[key]), ends[key]) == (completion.tokens, completion.finish_reason)
            assert hits(engine) > 0
            assert (largest > 1) == (max_page_bytes > PAGE_BYTES)
            if held is not None:
                cache.release(held)
        cache.check_integrity()
        assert cache.stats().in_use_bytes == 0
        assert PAGE_BYTES * num_pages >= cache.stats().peak_physical_bytes


def test_only_those_are_given_a_slot_that_the_next_pass_has_room_for(model: Llama, plain: Engine) -> None:
    """What a stored prefix takes to be shared is not done for all who wait before the first of them is computed."""
    system = text(130)
    requests = [Request(system + text(31, seed=1 + i), 4) for i in range(12)]
    with cache_of(model, max_slots=16, num_pages=600) as cache, Engine(model, cache, max_step_tokens=32) as engine:
        engine.generate([Request(system + text(9), 1)])
        answers: dict[int, list[int | None]] = {engine.submit(request): [] for request in requests}
        forks = []
        while engine.has_work:
            before = hits(engine)
            for token in engine.step():
                answers[token.request_id].append(token.token)
            forks.append((hits(engine) - before) // 130)
        # A pass takes 32 tokens, and each of them has 30 of its own.
        assert forks[0] == max(forks) == 3
        assert sum(forks) == 12
        assert engine.stats().num_prefill_tokens == 130 + 8 + 12 * 30
        assert [tuple(answer) for answer in answers.values()] == tokens_of(plain.generate(requests))
