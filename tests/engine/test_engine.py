"""The engine on the real cache: admission, waiting, preemption, stopping, and slots given back whatever happens."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from helpers.llama import random_tokens, run, small_model

from vattn.attention.sdpa import SdpaAttention
from vattn.engine.engine import Engine, Request
from vattn.errors import ConfigError, OutOfPages, OutOfSlots
from vattn.kv_cache import KVCache
from vattn.models.llama import Llama

PAGE_BYTES = 4096  # 16 tokens of the small model
TOKENS_PER_PAGE = 16


@pytest.fixture(scope="module")
def model() -> Llama:
    return small_model()


def cache_of(model: Llama, max_slots: int = 4, num_pages: int = 64, order: str = "token") -> KVCache:
    return KVCache(
        model.kv_layout(order=order), max_slots, "cpu", memory_limit=num_pages * PAGE_BYTES, page_bytes=PAGE_BYTES
    )


@pytest.fixture
def cache(model: Llama) -> Iterator[KVCache]:
    with cache_of(model) as cache:
        yield cache
        cache.check_integrity()
        assert cache.stats().num_live_slots == 0


def requests(count: int, max_new_tokens: int = 40, **settings: object) -> list[Request]:
    """Prompts of 1, 8, 15, … tokens; every other one sampled."""
    return [
        Request(random_tokens(1 + 7 * i, 128, seed=i), max_new_tokens, temperature=1.0 * (i % 2), seed=i, **settings)  # type: ignore[arg-type]
        for i in range(count)
    ]


def by_hand(model: Llama, cache: KVCache, request: Request) -> tuple[int, ...]:
    """Greedy, without the engine."""
    slot = cache.acquire()
    tokens: list[int] = []
    chunk = list(request.prompt_tokens)
    for _ in range(request.max_new_tokens):
        chunk = [int(run(model, cache, [slot], [chunk]).argmax())]
        tokens += chunk
    cache.release(slot)
    return tuple(tokens)


def test_greedy_equals_a_loop_by_hand(model: Llama, cache: KVCache) -> None:
    wanted = [Request(random_tokens(n, 128, seed=n), 20) for n in (1, 16, 17, 50)]
    completions = Engine(model, cache).generate(wanted)
    assert [c.tokens for c in completions] == [by_hand(model, cache, request) for request in wanted]
    assert {c.finish_reason for c in completions} == {"length"}


def test_tokens_do_not_depend_on_the_batch(model: Llama, cache: KVCache) -> None:
    together = Engine(model, cache).generate(requests(4))
    alone = [Engine(model, cache).generate([request])[0].tokens for request in requests(4)]
    assert [c.tokens for c in together] == alone


def test_long_prompts_are_computed_in_chunks(model: Llama, cache: KVCache) -> None:
    wanted = [Request(random_tokens(n, 128, seed=n), 10) for n in (100, 3, 41)]
    whole = Engine(model, cache).generate(wanted)
    engine = Engine(model, cache, max_prefill_tokens=16)
    assert [c.tokens for c in engine.generate(wanted)] == [c.tokens for c in whole]
    assert engine.stats.num_prefill_tokens == 144


def test_requests_wait_for_slots_in_arrival_order(model: Llama, cache: KVCache) -> None:
    engine = Engine(model, cache)
    ids = [engine.submit(request) for request in requests(10, max_new_tokens=5)]
    first_seen: list[int] = []
    while engine.has_work:
        new = engine.step()
        first_seen += [t.request_id for t in new if t.request_id not in first_seen]
        assert engine.num_running <= cache.max_slots
        cache.check_integrity()
    assert first_seen == ids


@pytest.mark.parametrize("order", ["token", "layer"])
def test_preemption_changes_no_token(model: Llama, order: str) -> None:
    wanted = requests(6, max_new_tokens=60)
    with cache_of(model, max_slots=6, num_pages=400, order=order) as unlimited:
        engine = Engine(model, unlimited)
        expected = engine.generate(wanted)
        assert engine.stats.num_preemptions == 0
    num_pages = 10 if order == "token" else 24  # the longest request alone takes 6, or 4 lanes of 2
    with cache_of(model, max_slots=6, num_pages=num_pages, order=order) as tight:
        engine = Engine(model, tight)
        for request in wanted:
            engine.submit(request)
        tokens: dict[int, list[int]] = {i: [] for i in range(6)}
        while engine.has_work:
            for new in engine.step():
                tokens[new.request_id].append(new.token)
            tight.check_integrity()
        assert engine.stats.num_preemptions > 0
        assert [tuple(tokens[i]) for i in range(6)] == [c.tokens for c in expected]
        stats = tight.stats()
        assert stats.peak_physical_bytes <= tight.memory_limit
        assert stats.in_use_bytes == stats.num_live_slots == 0


def test_stop_tokens_end_a_request(model: Llama, cache: KVCache) -> None:
    free = Engine(model, cache).generate([Request([5, 6, 7], 30)])[0]
    stop = free.tokens[10]
    unused = next(token for token in range(128) if token not in free.tokens)
    expected = free.tokens[: free.tokens.index(stop) + 1]
    stopped = Engine(model, cache).generate([Request([5, 6, 7], 30, stop_tokens={stop, unused})])[0]
    assert (stopped.tokens, stopped.finish_reason) == (expected, "stop")
    last = Engine(model, cache).generate([Request([5, 6, 7], 11, stop_tokens={stop})])[0]
    assert last.finish_reason == "stop"  # at the length too: the stop token is what ended it


def test_steps_stream_one_token_per_request(model: Llama, cache: KVCache) -> None:
    engine = Engine(model, cache)
    for request in requests(3, max_new_tokens=4):
        engine.submit(request)
    steps = []
    while engine.has_work:
        steps.append(engine.step())
    assert [len(step) for step in steps] == [3, 3, 3, 3]
    assert [t.finish_reason for t in steps[-1]] == ["length"] * 3
    assert not any(t.finish_reason for step in steps[:-1] for t in step)
    assert engine.step() == []
    assert (engine.stats.num_prefill_tokens, engine.stats.num_decode_tokens) == (1 + 8 + 15, 9)


def test_the_observer_sees_finished_sequences_in_their_slots(model: Llama, cache: KVCache) -> None:
    live: list[int] = []
    Engine(model, cache, on_step=lambda: live.append(cache.stats().num_live_slots)).generate(requests(3, 2))
    assert live == [3, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at_call", [0, 1, 5])
def test_exceptions_release_every_slot(model: Llama, cache: KVCache, error: type[BaseException], at_call: int) -> None:
    calls = iter(range(1000))

    class Failing(Llama):
        def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
            if next(calls) == at_call:
                raise error("from the model")
            return super().forward(*args, **kwargs)  # type: ignore[arg-type]

    failing = Failing(model.config)
    failing.load_state_dict(model.state_dict())
    engine = Engine(failing, cache)
    with pytest.raises(error):
        engine.generate(requests(7))
    assert cache.stats().num_live_slots == 0
    assert not engine.has_work
    cache.check_integrity()
    again = engine.generate(requests(2))  # and the engine goes on working
    assert [c.tokens for c in again] == [c.tokens for c in Engine(model, cache).generate(requests(2))]


def test_memory_held_by_others_is_waited_for(model: Llama) -> None:
    with cache_of(model, max_slots=2, num_pages=6) as cache:
        engine = Engine(model, cache)
        engine.submit(Request(random_tokens(40, 128), 5))
        other = cache.acquire()
        cache.ensure(other, 4 * TOKENS_PER_PAGE)
        with pytest.raises(OutOfPages):
            engine.step()
        cache.truncate(other, 0)
        more = cache.acquire()
        with pytest.raises(OutOfSlots):
            engine.step()
        assert engine.num_waiting == 1
        cache.release(other)
        while engine.has_work:
            engine.step()
        cache.release(more)
        assert cache.stats().num_live_slots == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "empty"),
        (Request([1], 0), "max_new_tokens"),
        (Request([1], temperature=-1), "temperature"),
        (Request([1], top_p=0), "top_p"),
        (Request([1], seed=-1), "seed"),
        (Request([128]), "vocabulary"),
        (Request([1] * 500, 14), "context of 512"),
        (Request([1] * 100, 350), "need 118784 bytes .* limit is 65536"),
    ],
)
def test_impossible_requests_are_refused_at_once(model: Llama, request_: Request, message: str) -> None:
    with cache_of(model, num_pages=16) as cache:
        engine = Engine(model, cache)
        with pytest.raises(ConfigError, match=message):
            engine.submit(request_)
        assert not engine.has_work


def test_the_largest_request_that_fits_runs(model: Llama) -> None:
    """Exactly the context, and exactly the memory limit: the last new token needs no row."""
    with cache_of(model, num_pages=512 // TOKENS_PER_PAGE) as cache:
        completion = Engine(model, cache).generate([Request([3] * 500, 13)])[0]
        assert len(completion.tokens) == 13
        assert cache.stats().peak_physical_bytes == cache.memory_limit


class OverReading(SdpaAttention):
    """Says that it reads past the end, as a fast kernel might."""

    name = "over-reading"
    over_read_tokens = 40
    masks_over_read = False


def test_attention_that_reads_further_than_the_cache_allows(model: Llama) -> None:
    with cache_of(model) as cache:
        with pytest.raises(ConfigError, match=r"'over-reading' reads up to 40 rows .* keeps 0 mapped"):
            Engine(model, cache, OverReading())
        expected = Engine(model, cache).generate(requests(4))
    with KVCache(
        model.kv_layout(), 4, "cpu", memory_limit=64 * PAGE_BYTES, page_bytes=PAGE_BYTES, over_read_tokens=40
    ) as cache:
        assert Engine(model, cache).attention.name == "sdpa"  # what is chosen need not use the margin
        engine = Engine(model, cache, OverReading())
        assert [c.tokens for c in engine.generate(requests(4))] == [c.tokens for c in expected]
        cache.check_integrity()


def test_the_margin_counts_as_memory(model: Llama) -> None:
    """472 tokens fit in 30 pages, and with 40 more mapped behind them in 32."""
    for num_pages, fits in ((32, True), (31, False)):
        with KVCache(
            model.kv_layout(), 1, "cpu", memory_limit=num_pages * PAGE_BYTES, page_bytes=PAGE_BYTES, over_read_tokens=40
        ) as cache:
            engine = Engine(model, cache, OverReading())
            request = Request([3] * 470, 3)
            if fits:
                assert len(engine.generate([request])[0].tokens) == 3
            else:
                with pytest.raises(ConfigError, match="need 131072 bytes"):
                    engine.submit(request)


def test_generate_returns_its_own_and_leaves_the_others(model: Llama, cache: KVCache) -> None:
    """What was submitted before runs on beside it; its tokens come with the next ``step``, none lost."""
    wanted = requests(4, max_new_tokens=6)
    expected = [c.tokens for c in Engine(model, cache).generate(wanted)]
    engine = Engine(model, cache)
    first = engine.submit(wanted[0])
    tokens = {first: [new.token for new in engine.step()]}
    late = engine.submit(wanted[1])
    tokens[late] = []
    mine = engine.generate(wanted[2:])
    assert [c.tokens for c in mine] == expected[2:]
    assert engine.generate([]) == []
    ended = []
    while engine.has_work:
        for new in engine.step():
            tokens[new.request_id].append(new.token)
            ended += [new.request_id] if new.finish_reason else []
    assert [tuple(tokens[i]) for i in (first, late)] == expected[:2]
    assert ended == [first, late]


def test_a_wrong_request_in_generate_leaves_the_others(model: Llama, cache: KVCache) -> None:
    wanted = requests(3, max_new_tokens=6)
    expected = [c.tokens for c in Engine(model, cache).generate(wanted)]
    engine = Engine(model, cache)
    ids = [engine.submit(request) for request in wanted]
    tokens = {new.request_id: [new.token] for new in engine.step()}
    with pytest.raises(ConfigError, match="999 is not in"):
        engine.generate([Request([5], 3), Request([999], 3)])
    assert engine.num_running + engine.num_waiting == 3
    while engine.has_work:
        for new in engine.step():
            tokens[new.request_id].append(new.token)
    assert [tuple(tokens[i]) for i in ids] == expected


def test_an_interrupted_generate_drops_its_own_only(model: Llama) -> None:
    """There is no slot for it: it is dropped, and what waited before still waits."""
    with cache_of(model, max_slots=1) as cache:
        engine = Engine(model, cache)
        other = cache.acquire()
        waiting = engine.submit(Request([1, 2], 3))
        with pytest.raises(OutOfSlots):
            engine.generate([Request([5], 3)])
        assert engine.num_waiting == 1
        cache.release(other)
        tokens = []
        while engine.has_work:
            tokens += engine.step()
        assert {new.request_id for new in tokens} == {waiting}
        assert len(tokens) == 3


def test_cancel(model: Llama, cache: KVCache) -> None:
    expected = [c.tokens for c in Engine(model, cache).generate(requests(5, max_new_tokens=6))]
    engine = Engine(model, cache)
    ids = [engine.submit(request) for request in requests(5, max_new_tokens=6)]  # the last waits for a slot
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    for new in engine.step():
        tokens[new.request_id].append(new.token)
    engine.cancel(ids[1])
    engine.cancel(ids[4])
    engine.cancel(12345)
    assert (engine.num_running, engine.num_waiting) == (3, 0)
    engine.generate([Request([5], 2)])  # a step or two, whose tokens of the others are kept
    engine.cancel(ids[0])
    while engine.has_work:
        for new in engine.step():
            tokens[new.request_id].append(new.token)
    engine.cancel(ids[2])  # has ended: no effect
    assert [len(tokens[i]) for i in ids] == [1, 1, 6, 6, 0]
    assert [tuple(tokens[i]) for i in ids[2:4]] == expected[2:4]


def test_a_request_may_be_cancelled_by_the_observer_of_its_last_step(model: Llama, cache: KVCache) -> None:
    ids: list[int] = []
    engine = Engine(model, cache, on_step=lambda: engine.cancel(ids[0]))
    ids += [engine.submit(request) for request in requests(2, max_new_tokens=1)]
    assert {token.request_id for token in engine.step()} >= {ids[1]}
    assert not engine.has_work
    assert cache.stats().num_live_slots == 0


def test_ctrl_c_during_a_release_leaves_the_engine_and_other_slots_alone(
    model: Llama, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, cache)
    end = cache._slots.end

    def interrupted(slot: int) -> None:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        end(slot)

    monkeypatch.setattr(cache._slots, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests(1, max_new_tokens=2))
    assert not engine.has_work
    others = cache.acquire()
    cache.ensure(others, 5)
    engine.abort()
    assert cache.seq_len(others) == 5
    cache.release(others)
    assert len(engine.generate(requests(2, max_new_tokens=2))) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_same_tokens_on_the_gpu(model: Llama) -> None:
    with cache_of(model) as cache:
        expected = [c.tokens for c in Engine(model, cache).generate(requests(4))]
    on_gpu = small_model().to("cuda")
    with KVCache(on_gpu.kv_layout(), 3, "cuda") as cache:
        assert [c.tokens for c in Engine(on_gpu, cache).generate(requests(4))] == expected
        cache.check_integrity()
