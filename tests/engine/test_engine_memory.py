"""The memory of the engine: what others hold, what can never fit, and the margin that attention reads."""

from __future__ import annotations

from contextlib import suppress

import pytest
from helpers.engine import (
    TOKENS_PER_PAGE,
    alone,
    by_sample,
    cache_of,
    requests_of,
    run_out,
    tokens_of,
)
from helpers.llama import random_tokens

from vattn import Engine, Request, Sampling
from vattn.attention.sdpa import SdpaAttention
from vattn.errors import ConfigError, OutOfPages, OutOfSlots
from vattn.models import Llama


def test_memory_held_by_others_is_waited_for(model: Llama) -> None:
    with cache_of(model, max_slots=3, num_pages=6) as cache, Engine(model, cache) as engine:
        engine.submit(Request(random_tokens(40, 128), 5))
        other = cache.acquire()
        cache.ensure(other, 4 * TOKENS_PER_PAGE)
        for _ in range(3):
            with pytest.raises(OutOfPages, match="needs 12288 bytes to begin with"):
                engine.step()
        cache.truncate(other, 0)
        more = cache.acquire()
        with pytest.raises(OutOfSlots):
            engine.step()
        assert engine.num_waiting == 1
        cache.release(other)
        run_out(engine)
        cache.release(more)


def test_a_slot_that_others_hold_is_done_without(model: Llama) -> None:
    """Those that wait for it go on when all that run end in the same step."""
    with cache_of(model, max_slots=4) as cache, Engine(model, cache) as engine:
        held = cache.acquire()  # one of the three that the engine counts on
        completions = engine.generate([Request([1 + i], 3) for i in range(8)])
        assert [len(completion.tokens) for completion in completions] == [3] * 8
        cache.release(held)


def test_a_sequence_that_others_leave_no_room_to_grow_waits(model: Llama) -> None:
    """Preempted, with nothing of ours left to run: that is said, and it goes on when there is room."""
    wanted = Request(random_tokens(10, 128), 60)
    with cache_of(model, max_slots=3, num_pages=6) as cache, Engine(model, cache) as engine:
        engine.submit(wanted)
        tokens = [new for _ in range(5) for new in engine.step()]
        other = cache.acquire()
        cache.ensure(other, 3 * TOKENS_PER_PAGE)
        with suppress(OutOfPages):
            while engine.num_running:
                tokens += engine.step()
        assert 5 < len(tokens) < 60
        with pytest.raises(OutOfPages):
            engine.step()
        assert engine.num_waiting == 1
        with pytest.raises(OutOfPages):
            engine.step()
        cache.release(other)
        tokens += run_out(engine)
        assert list(by_sample(tokens).values()) == [alone(model, [wanted])[0][0].tokens]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "empty"),
        (Request([1], 0), "max_new_tokens"),
        (Request([128]), "vocabulary"),
        (Request([1] * 500, 14), "context of 512"),
        (Request([1] * 100, 350), "need 118784 bytes .* limit is 65536"),
        (Request([1], stop_tokens=range(17)), "17 stop tokens .* 16"),
        (Request([1], n=0), "n must be"),
        (Request([1], deadline_s=-1), "deadline_s"),
        (Request([1], priority=0.5), "priority"),  # type: ignore[arg-type]
        (Request([1], allowed_tokens=5), "allowed_tokens"),  # type: ignore[arg-type]
        (Request([1], num_logprobs=21), "num_logprobs"),
        (Request([1], 3, Sampling(min_new_tokens=4)), "min_new_tokens 4 exceeds"),
    ],
)
def test_impossible_requests_are_refused_at_once(model: Llama, request_: Request, message: str) -> None:
    """What is running is untouched."""
    with cache_of(model, num_pages=16) as cache, Engine(model, cache) as engine:
        (expected,) = engine.generate([Request([3], 10)])
        running = engine.submit(Request([3], 10))
        tokens = engine.step()
        with pytest.raises(ConfigError, match=message):
            engine.submit(request_)
        with pytest.raises(ConfigError, match=message):
            engine.generate([Request([5], 3), request_])
        assert (engine.num_running, engine.num_waiting) == (1, 0)
        assert by_sample(tokens + run_out(engine)) == {(running, 0): expected.tokens}


def test_the_largest_request_that_fits_runs(model: Llama) -> None:
    """Exactly the context, and exactly the memory limit: the last new token needs no row."""
    with cache_of(model, num_pages=512 // TOKENS_PER_PAGE) as cache, Engine(model, cache) as engine:
        assert engine.longest == 513
        (completion,) = engine.generate([Request([3] * 500, 13)])
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
            Engine(model, cache, attention=OverReading())
        assert cache.stats().num_live_slots == 0
        with Engine(model, cache) as engine:
            expected = tokens_of(engine.generate(requests_of(4)))
    with cache_of(model, over_read_tokens=40) as cache:
        with Engine(model, cache) as engine:
            assert engine.attention.name == "sdpa"  # what is chosen need not use the margin
        with Engine(model, cache, attention=OverReading()) as engine:
            assert tokens_of(engine.generate(requests_of(4))) == expected
            cache.check_integrity()
    with Engine(model, attention=OverReading(), memory_limit=64 << 20) as engine:
        assert engine.cache.over_read_tokens == 40


def test_the_margin_counts_as_memory(model: Llama) -> None:
    """472 tokens fit in 30 pages, and with 40 more mapped behind them in 32."""
    for num_pages, fits in ((32, True), (31, False)):
        with (
            cache_of(model, max_slots=2, num_pages=num_pages, over_read_tokens=40) as cache,
            Engine(model, cache, attention=OverReading()) as engine,
        ):
            request = Request([3] * 470, 3)
            if fits:
                assert len(engine.generate([request])[0].tokens) == 3
            else:
                with pytest.raises(ConfigError, match="need 131072 bytes"):
                    engine.submit(request)
