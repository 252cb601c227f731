"""What used to go wrong: one request's fault was everybody's, prompts silenced those who decode, threads mixed up."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.engine import Faulty, alone, by_sample, cache_of, ends, requests_of, run_out, tokens_of
from helpers.llama import SMALL, open_cache, random_tokens

from vattn import Engine, KVCache, Request, Sampling
from vattn.errors import ConfigError, DriverError, OutOfPages
from vattn.models import Llama


# -- one request's fault ---------------------------------------------------------------------------------------------
def test_one_bad_request_leaves_the_others(model: Llama, cache: KVCache) -> None:
    wanted = requests_of(3, max_new_tokens=8)
    expected = [c.tokens for (c,) in alone(model, wanted)]
    with Engine(model, cache) as engine:
        ids = [engine.submit(request) for request in wanted]
        tokens = engine.step()
        for bad in (Request([1], stop_tokens=5), Request([1], "8"), Request("text"), Request([10**9]), 7):  # type: ignore[arg-type]
            with pytest.raises(ConfigError):
                engine.submit(bad)  # type: ignore[arg-type]
            with pytest.raises(ConfigError):
                engine.generate([Request([5], 2), bad])  # type: ignore[list-item]
            tokens += engine.step()
        small = engine.submit(Request(np.array([3] * 100, np.int8), np.int8(100)))  # type: ignore[arg-type]
        found = by_sample(tokens + run_out(engine))
        assert [found[i, 0] for i in ids] == expected
        assert len(found[small, 0]) == 100


@pytest.mark.parametrize("how", ["raises", "nonsense", "shape", "nothing"])
def test_a_callback_that_fails_ends_its_own_sample(model: Llama, cache: KVCache, how: str) -> None:
    def allowed(answer: Any) -> Any:
        if len(answer) < 3:
            return np.ones(128, bool)
        return {
            "raises": lambda: 1 / 0,
            "nonsense": lambda: "x",
            "shape": lambda: [True],
            "nothing": lambda: [False] * 128,
        }[how]()

    wanted = requests_of(3, max_new_tokens=8)
    with Engine(model, cache) as engine:
        *others, bad = engine.generate([*wanted, replace(wanted[1], allowed_tokens=allowed)])
        assert tokens_of(others) == [c.tokens for (c,) in alone(model, wanted)]
        assert (bad.tokens, bad.finish_reason) == (others[1].tokens[:3], "error")
        assert isinstance(bad.error, ZeroDivisionError if how == "raises" else ConfigError)


def test_an_answer_with_no_token_left_to_choose_ends(model: Llama, cache: KVCache) -> None:
    only_five = np.arange(128) == 5
    sampling = Sampling(logit_bias={5: float("-inf")})
    with Engine(model, cache) as engine:
        good, bad = engine.generate(
            [Request([3], 5), Request([3], 5, sampling, allowed_tokens=lambda answer: only_five)]
        )
        assert (len(good.tokens), bad.tokens, bad.finish_reason) == (5, (), "error")
        assert "no token could be chosen" in str(bad.error)


def test_a_model_that_raises_in_a_pass_ends_those_of_the_pass(model: Llama, cache: KVCache) -> None:
    wanted = requests_of(3, max_new_tokens=20)
    expected = [c.tokens for (c,) in alone(model, wanted)]
    faulty = Faulty(model)
    with Engine(faulty, cache) as engine:
        ids = [engine.submit(request) for request in wanted]
        tokens = [new for _ in range(4) for new in engine.step()]
        assert len(by_sample(tokens)) == 3

        def refuse(packed: tuple[int, ...]) -> None:
            if 99 in packed:
                raise RuntimeError("no 99 today")

        faulty.on_prefill = refuse
        bad = engine.submit(Request([99, 1, 2], 5, n=2))
        tokens += run_out(engine)
        faulty.on_prefill = None
        assert [new.finish_reason for new in tokens if new.request_id == bad] == ["error", "error"]
        assert all("no 99 today" in str(new.error) for new in tokens if new.request_id == bad)
        found = by_sample(tokens)
        assert [found[i, 0] for i in ids] == expected
        assert len(engine.generate([Request([99, 1, 2], 5)])[0].tokens) == 5  # and it goes on


def test_a_model_that_raises_in_a_decode_step_ends_those_of_the_step(model: Llama, cache: KVCache) -> None:
    faulty = Faulty(model)
    with Engine(faulty, cache) as engine:
        running = [engine.submit(request) for request in requests_of(2, max_new_tokens=20)]
        tokens = [new for _ in range(5) for new in engine.step()]
        waiting = [engine.submit(request) for request in requests_of(4, max_new_tokens=6)]

        def refuse() -> None:
            raise RuntimeError("not now")

        faulty.on_decode = refuse
        tokens += engine.step()
        faulty.on_decode = None
        tokens += run_out(engine)
        reasons = ends(tokens)
        # The first of those that waited has a prompt of one token: nothing to compute before it decodes.
        assert {reasons[each, 0] for each in (*running, waiting[0])} == {"error"}
        assert {reasons[each, 0] for each in waiting[1:]} == {"length"}
        found = by_sample(tokens)
        expected = [c.tokens for (c,) in alone(model, requests_of(4, max_new_tokens=6))]
        assert [found[each, 0] for each in waiting[1:]] == expected[1:]


@pytest.mark.parametrize("where", ["prefill", "decode"])
@pytest.mark.parametrize("at_call", [0, 3])
def test_what_is_no_error_of_a_request_comes_out_of_the_step(
    model: Llama, cache: KVCache, where: str, at_call: int
) -> None:
    """A KeyboardInterrupt out of the model, say: nothing was launched, and the same goes on with the next step."""
    wanted = [Request(random_tokens(n, 128, seed=n), 10) for n in (40, 3)]
    faulty = Faulty(model)
    calls = iter(range(1000))

    def interrupt(*_: object) -> None:
        if next(calls) == at_call:
            raise KeyboardInterrupt

    setattr(faulty, f"on_{where}", interrupt)
    with Engine(faulty, cache, max_step_tokens=10) as engine:
        for request in wanted:
            engine.submit(request)
        tokens, interrupted = [], 0
        while engine.has_work:
            try:
                tokens += engine.step()
            except KeyboardInterrupt:
                interrupted += 1
        assert interrupted == 1
        assert sorted(by_sample(tokens).items()) == [((i, 0), c.tokens) for i, (c,) in enumerate(alone(model, wanted))]


def test_what_a_callback_raises_that_is_no_error_comes_out_of_the_step(model: Llama, cache: KVCache) -> None:
    """The prompt was to be computed in the pass of its first token: it is computed in the next one."""
    wanted = Request(random_tokens(40, 128), 8)
    calls = iter(range(1000))

    def interrupt(answer: Any) -> None:
        if next(calls) == 0:
            raise KeyboardInterrupt

    with Engine(model, cache) as engine:
        engine.submit(replace(wanted, allowed_tokens=interrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert by_sample(run_out(engine)) == {(0, 0): alone(model, [wanted])[0][0].tokens}


def test_a_slot_that_cannot_be_cut_after_a_pass_that_was_not_launched(
    model: Llama, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows past the end are to be wiped and that fails: the sequence is computed again."""
    wanted = [Request(random_tokens(n, 128, seed=n), 20) for n in (3, 17)]
    faulty, step, failures = Faulty(model), cache.step, []

    def refuse(packed: tuple[int, ...]) -> None:
        if not failures:
            monkeypatch.setattr(cache, "step", no_page)
            raise DriverError("launch", "INJECTED")

    def no_page(slots: Any, **versions: Any) -> Any:
        monkeypatch.setattr(cache, "step", step)
        failures.append(slots)
        raise OutOfPages("no page to copy what is shared past the end to")

    with Engine(faulty, cache) as engine:
        engine.submit(wanted[0])
        tokens = engine.step()
        engine.submit(wanted[1])
        faulty.on_prefill = refuse
        tokens += run_out(engine)
        assert len(failures) == 1
        assert by_sample(tokens) == {(i, 0): c.tokens for i, (c,) in enumerate(alone(model, wanted))}


# -- who waits for whom ----------------------------------------------------------------------------------------------
def test_an_arrival_a_step_leaves_those_who_decode_their_tokens(model: Llama, cache: KVCache) -> None:
    """Prompts went first: with one arrival a step nobody decoded, 0 tokens in 400 steps."""
    with Engine(model, cache) as engine:
        first = engine.submit(Request([3, 5, 7], 300))
        count = 0
        for i in range(200):
            engine.submit(Request(random_tokens(20, 128, seed=i), 3))
            count += sum(new.request_id == first for new in engine.step())
        assert count >= 195
        for request_id in range(1, 201):
            engine.cancel(request_id)
        engine.cancel(first)


def test_a_preempted_request_comes_back_when_it_fits(model: Llama) -> None:
    """A 4-token request waited for a sequence to end, 3,844 steps, with 96 % of memory idle."""
    with cache_of(model, max_slots=4, num_pages=40) as cache, Engine(model, cache) as engine:
        long = engine.submit(Request([3, 5, 7], 400))
        for _ in range(5):
            engine.step()
        wanted = Request([4, 6], 4)
        short = engine.submit(wanted)
        tokens = [new for _ in range(3) for new in engine.step()]
        engine._samples.preempt(OutOfPages("as if there were no page for a moment"))
        assert (engine.num_running, engine.num_waiting, engine.stats().num_preemptions) == (1, 1, 1)
        for _ in range(6):
            tokens += engine.step()
        assert ends(tokens) == {(short, 0): "length"}
        assert by_sample(tokens)[short, 0] == alone(model, [wanted])[0][0].tokens
        engine.cancel(long)


def test_nobody_waits_for_ever_under_a_stream_of_more_important_ones(
    model: Llama, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second of the test's clock a step; ten seconds are worth a level of priority."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Engine(model, cache, max_batch=2) as engine:
        for i in range(2):
            engine.submit(Request([i], 4, priority=3))
        engine.step()
        humble = engine.submit(Request([3, 5], 5, priority=-2))
        served_at = None
        for step in range(400):
            now[0] += 1.0
            engine.submit(Request([step % 128], 4, priority=3))
            if any(new.request_id == humble for new in engine.step()):
                served_at = step
                break
        assert served_at is not None
        assert 45 <= served_at <= 120
        for request_id in range(500):
            engine.cancel(request_id)


def test_a_prompt_is_not_written_to_somebody_else_s_slot(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache, max_step_tokens=8) as engine:
        engine.submit(Request(random_tokens(60, 128), 5))
        engine.step()
        (sample,) = engine._scheduler.running
        slot = sample.slot
        cache.release(slot)
        assert cache.acquire(slot) == slot
        cache.ensure(slot, 64)
        for tensor in cache.rows(slot, 0):
            tensor.fill_(7.0)
        (end,) = run_out(engine)
        assert end.finish_reason == "error"
        assert all((tensor == 7).all() for tensor in cache.rows(slot, 0))
        cache.release(slot)


# -- the cache under it ----------------------------------------------------------------------------------------------
def test_a_cache_that_is_closed_under_it(model: Llama) -> None:
    """Every request ends with an error: nothing waits for ever."""
    cache = cache_of(model)
    with Engine(model, cache) as engine:
        for request in requests_of(8, max_new_tokens=30):
            engine.submit(request)
        tokens = [new for _ in range(4) for new in engine.step()]
        cache.close()
        tokens += run_out(engine)
        assert list(ends(tokens).values()) == ["error"] * 8
        assert "closed" in str(tokens[-1].error)
        engine.submit(Request([1], 2))
        assert [new.finish_reason for new in run_out(engine)] == ["error"]
        assert engine.stats().kv_usage == 0.0


def test_a_cache_that_does_not_fit_the_model(model: Llama) -> None:
    """Said at once, and not by the first step."""
    other = Llama.random(replace(SMALL, num_kv_heads=4))
    with open_cache(other, 4) as cache:
        with pytest.raises(ConfigError, match=r"open the cache with model.kv_layout"):
            Engine(model, cache)
        assert cache.stats().num_live_slots == 0


@pytest.mark.parametrize("change", ["release", "take", "truncate"])
@pytest.mark.parametrize("phase", ["decoding", "prefilling"])
def test_a_slot_that_is_changed_behind_its_back(model: Llama, cache: KVCache, change: str, phase: str) -> None:
    """That sample ends with an error, the others go on, and whoever has the slot keeps it."""
    wanted = [Request(random_tokens(n, 128, seed=n), 20) for n in (3, 60, 9)]
    expected = [c.tokens for (c,) in alone(model, wanted)]
    with Engine(model, cache, max_step_tokens=8) as engine:
        ids = [engine.submit(request) for request in wanted]
        tokens = [new for _ in range(4) for new in engine.step()]
        victim = 0 if phase == "decoding" else 1
        samples = {sample.request_id: sample for sample in engine._scheduler.running}
        slot = samples[ids[victim]].slot
        if change == "truncate":
            cache.truncate(slot, 1)
        else:
            cache.release(slot)
        if change == "take":
            assert cache.acquire(slot) == slot
        tokens += run_out(engine)
        reasons = ends(tokens)
        found = by_sample(tokens)
        others = [i for i in range(3) if i != victim]
        assert [found[ids[i], 0] for i in others] == [expected[i] for i in others]
        assert reasons[ids[victim], 0] == "error"
        if change != "release" and slot in cache._slots.with_state(1):
            cache.release(slot)


@pytest.mark.parametrize("change", ["take", "truncate"])
def test_a_slot_that_is_changed_between_the_start_and_the_launch(model: Llama, cache: KVCache, change: str) -> None:
    """A prompt whose pass is not launched is not taken for what somebody else has made of its slot."""
    wanted = [Request(random_tokens(n, 128, seed=n), 20) for n in (3, 40)]
    with Engine(model, cache) as engine:
        engine.submit(wanted[0])
        tokens = engine.step()
        slots: list[int] = []

        def change_slot(answer: Any) -> None:
            if slots:
                return
            slots.extend(sample.slot for sample in engine._scheduler.running if sample.request_id == 1)
            if change == "truncate":
                cache.truncate(slots[0], 3)
            else:
                cache.release(slots[0])
                cache.acquire(slots[0])
                cache.ensure(slots[0], 64)
            for tensor in cache.rows(slots[0], 0):
                tensor.fill_(7.0)

        engine.submit(replace(wanted[1], allowed_tokens=change_slot))
        tokens += run_out(engine)
        assert by_sample(tokens)[0, 0] == alone(model, wanted[:1])[0][0].tokens
        assert ends(tokens) == {(0, 0): "length", (1, 0): "error"}
        assert cache.seq_len(slots[0]) == (3 if change == "truncate" else 64)
        assert all((tensor == 7).all() for tensor in cache.rows(slots[0], 0))
        cache.release(slots[0])


def test_a_slot_that_is_taken_right_before_it_decodes(
    model: Llama, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread may do it: whoever has the slot by then does not decode, and the other request goes on."""
    wanted = [Request(random_tokens(n, 128, seed=n), 20) for n in (3, 40)]
    with Engine(model, cache) as engine:
        start_batch, taken = engine._loop.start_batch, []

        def start(starts: Any, versions: Any = None) -> None:
            if not taken:
                taken.append(starts[-1].slot)
                rows = cache.seq_len(taken[0])
                cache.release(taken[0])
                assert cache.acquire(taken[0]) == taken[0]
                cache.ensure(taken[0], rows)
            start_batch(starts, versions)

        monkeypatch.setattr(engine._loop, "start_batch", start)
        for request in wanted:
            engine.submit(request)
        tokens = run_out(engine)
        reasons = {request_id: reason for (request_id, _), reason in ends(tokens).items()}
        assert sorted(reasons.values()) == ["error", "length"]
        (other,) = (request_id for request_id, reason in reasons.items() if reason == "length")
        assert by_sample(tokens)[other, 0] == alone(model, [wanted[other]])[0][0].tokens
        assert taken[0] not in engine._loop.slots
        cache.release(taken[0])
        cache.check_integrity()


@pytest.mark.parametrize("phase", ["decoding", "prefilling"])
@pytest.mark.parametrize("length", [1, 9])
def test_a_slot_that_is_released_behind_its_back_and_taken_by_the_next_request(
    model: Llama, cache: KVCache, phase: str, length: int
) -> None:
    """Whoever lost it ends with an error, and only that one."""
    lost, late = Request(random_tokens(3 if phase == "decoding" else 60, 128), 30), Request([5] * length, 10)
    with Engine(model, cache, max_step_tokens=8) as engine:
        engine.submit(lost)
        tokens = engine.step() + engine.step()
        held = [cache.acquire() for _ in range(3)]
        (sample,) = engine._scheduler.running
        cache.release(sample.slot)
        engine.submit(late)
        tokens += engine.step()
        tokens += run_out(engine)
        assert ends(tokens) == {(0, 0): "error", (1, 0): "length"}
        assert by_sample(tokens)[1, 0] == alone(model, [late])[0][0].tokens
        for slot in held:
            cache.release(slot)


def test_a_slot_that_somebody_grows_while_its_prompt_is_computed(model: Llama, cache: KVCache) -> None:
    """The rows are not the prompt's: that sample ends with an error."""
    wanted = [Request(random_tokens(n, 128, seed=n), 20) for n in (3, 60)]
    expected = [c.tokens for (c,) in alone(model, wanted)]
    with Engine(model, cache, max_step_tokens=8) as engine:
        ids = [engine.submit(request) for request in wanted]
        tokens = [new for _ in range(3) for new in engine.step()]
        (slot,) = (sample.slot for sample in engine._scheduler.running if sample.request_id == ids[1])
        cache.ensure(slot, 70)
        tokens += run_out(engine)
        assert by_sample(tokens)[ids[0], 0] == expected[0]
        assert ends(tokens)[ids[1], 0] == "error"


def test_whoever_takes_the_engine_s_own_slot_keeps_it(model: Llama) -> None:
    with cache_of(model) as cache:
        with Engine(model, cache) as engine:
            slot = engine._loop.own_slot
            cache.release(slot)
            assert cache.acquire(slot) == slot
        assert cache.stats().num_live_slots == 1
        cache.release(slot)
