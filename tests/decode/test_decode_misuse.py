"""A decode loop called wrongly, left early, or given what does not fit: refused by name, and nothing changed."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers.decode import by_slot, eager, prefill
from helpers.llama import SMALL, open_cache, small_model

import vattn
from vattn.attention import get
from vattn.decode import DecodeLoop, Sampling, Start
from vattn.errors import ConfigError, OutOfPages
from vattn.models import FusedLlama, Llama


@pytest.fixture
def model(device) -> Llama:
    return small_model().to(device)


@pytest.fixture
def fused(model) -> FusedLlama:
    return FusedLlama(model)


@pytest.mark.parametrize("bound", ["cache", "model", "memory"])
def test_exactly_as_much_as_there_is_room_for(bound, model):
    """The last row of the cache, of the model's context, of the memory: used, and nothing past it asked for."""
    prompt = [3, 5, 7, 9]
    (expected,) = eager(model, [prompt], 61)
    length, page_bytes = 64, 16384 if model.device.type == "cpu" else 2 << 20  # 64 rows of 256 bytes on the CPU
    # Where batches are filled up to a captured size, the loop's own slot takes a page too.
    num_pages = 1 if model.device.type == "cpu" else 2
    options = {"memory_limit": num_pages * page_bytes} if bound == "memory" else {}
    layout = model.kv_layout(length if bound == "cache" else 500)
    with vattn.KVCache(layout, 3, model.device, page_bytes=page_bytes, **options) as cache:
        fused = FusedLlama(model, length if bound == "model" else None)
        with DecodeLoop(fused, cache, max_batch=2) as loop:
            slot = prefill(model, cache, prompt)
            if bound != "memory":
                with pytest.raises(ConfigError, match="exceed the context"):
                    loop.start(slot, prompt[-1], 62)
            loop.start(slot, prompt[-1], 61)
            assert tuple(by_slot(loop.run())[slot]) == expected
            assert cache.seq_len(slot) == length
            if model.device.type == "cpu":
                assert cache.stats().num_map == num_pages


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_loop_alone():
    model = small_model()
    with open_cache(model, 3) as cache, DecodeLoop(FusedLlama(model), cache) as loop:
        slot = prefill(model, cache, [3, 5, 7])
        loop.start(slot, 7, 10)
        with loop._mapper._changing:  # as while the thread maps
            child = os.fork()
            if child == 0:
                try:
                    for call in (loop.step, loop.run, loop.drain, lambda: loop.cancel(slot)):
                        with pytest.raises(ConfigError, match="forked"):
                            call()
                    loop.close()
                    os._exit(0)
                finally:
                    os._exit(1)
        deadline = time.monotonic() + 30
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.01)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)
        assert len(loop.run()) == 10


def test_a_dropped_loop_ends(fused, model):
    before = threading.active_count()
    with open_cache(model, 3) as cache:
        loop = DecodeLoop(fused, cache)
        slot = prefill(model, cache, [1, 2, 3])
        loop.start(slot, 4, 10)
        loop.step()
        del loop
        gc.collect()
        assert threading.active_count() == before
        assert cache.stats().num_live_slots == 1
        cache.release(slot)


def test_a_loop_that_is_dropped_in_a_cycle_ends_without_a_word(fused, model, capfd):
    """The collector clears weak references before finalisers run."""
    before = threading.active_count()
    cycle: list[object] = []
    cycle += [cycle, DecodeLoop(fused, open_cache(model, 3))]
    del cycle
    gc.collect()
    assert threading.active_count() == before
    assert capfd.readouterr().err == ""


def test_a_loop_that_cannot_be_made_leaves_nothing(fused, model, monkeypatch, capfd):
    def fail(*arguments):
        raise RuntimeError("no books")

    before = threading.active_count()
    with open_cache(model, 3) as cache:
        with monkeypatch.context() as patch:
            patch.setattr("vattn.decode.loop.Progress", fail)
            with pytest.raises(RuntimeError, match="no books"):
                DecodeLoop(fused, cache)
        gc.collect()
        assert threading.active_count() == before
        assert cache.stats().num_live_slots == 0
    assert capfd.readouterr().err == ""


def test_weights_that_moved_and_caches_of_other_shapes(device):
    model = small_model().to(device)
    first, second = FusedLlama(model), FusedLlama(model)
    assert first.layers[0].qkv.data_ptr() == second.layers[0].qkv.data_ptr()
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.zero_()
    assert not first.layers[0].qkv[: model.config.num_heads * model.config.head_dim].any()
    assert not second.layers[0].qkv[: model.config.num_heads * model.config.head_dim].any()
    for change in ({"num_layers": 3}, {"num_kv_heads": 4}, {"head_dim": 16}):
        other = Llama.random(replace(SMALL, **change), device=device)
        with open_cache(other, 3) as cache, pytest.raises(ConfigError, match="kv_layout"):
            DecodeLoop(first, cache)
    with open_cache(model, 3) as cache:
        model.to(torch.float64)
        with pytest.raises(ConfigError, match="moved or converted"):
            DecodeLoop(first, cache)


def test_wrong_arguments_change_nothing(fused, model):
    with open_cache(model, 4) as cache, DecodeLoop(fused, cache, max_batch=2, max_stop_tokens=2) as loop:
        slot = prefill(model, cache, [1, 2, 3])
        before = cache.stats()
        for arguments, message in (
            ((loop.own_slot, 1, 1), "own"),
            ((7, 1, 1), "slot"),
            ((2, 1, 1), "holds no sequence"),
            ((slot, 128, 1), "vocabulary"),
            ((slot, -1, 1), "vocabulary"),
            ((slot, 1.0, 1), "token ids"),
            ((slot, 1, 0), "max_new_tokens"),
            ((slot, 1, 511), "exceed the context"),
            ((slot, 1, 1, {"temperature": 1}), "Sampling"),
            ((slot, 1, 1, Sampling(temperature=-1)), "temperature"),
            ((slot, 1, 1, Sampling(top_p=0)), "top_p"),
            ((slot, 1, 1, Sampling(temperature="1")), "got '1'"),
            ((slot, 1, 1, Sampling(top_k=-1)), "top_k"),
            ((slot, 1, 1, Sampling(seed=-1)), "seed"),
            ((slot, 1, 1, None, (1, 2, 3)), "stop tokens"),
            ((slot, 1, 1, None, (200,)), "vocabulary"),
            ((slot, 1, 1, None, None), "stop_tokens must be token ids"),
            (([slot], 1, 1), "slot must be an int"),
            ((slot, 1, 1, Sampling(temperature=None)), "temperature"),
            ((slot, 1, 1, Sampling(temperature=1e39)), "temperature"),
        ):
            with pytest.raises(ConfigError, match=message):
                loop.start(*arguments)
        with pytest.raises(ConfigError, match="once"):
            loop.start_batch([Start(slot, 1, 1), Start(slot, 1, 1)])
        with pytest.raises(ConfigError, match="a sequence is"):
            loop.start_batch([(slot, 1, 1)])
        with pytest.raises(ConfigError, match="own"):
            loop.release(loop.own_slot)
        assert cache.stats() == before
        assert loop.slots == ()
        loop.start(slot, 1, 5)
        with pytest.raises(ConfigError, match="already"):
            loop.start(slot, 1, 5)
        others = [prefill(model, cache, [1, 2]) for _ in range(2)]
        with pytest.raises(ConfigError, match="max_batch"):
            loop.start_batch([Start(other, 1, 1) for other in others])
        assert len(loop.run()) == 5
    for call in (loop.step, loop.run, loop.drain):
        with pytest.raises(ConfigError, match="closed"):
            call()
    loop.close()


def test_what_does_not_fit_is_refused(fused, model):
    with open_cache(model, 1) as cache, pytest.raises(ConfigError, match="at least 2"):
        DecodeLoop(fused, cache)
    with open_cache(model, 4) as cache:
        for options, message in (
            ({"max_batch": 4}, "max_batch"),
            ({"buckets": [1]}, "largest bucket"),
            ({"buckets": [0]}, "bucket"),
            ({"mapping": "later"}, "mapping"),
            ({"graphs": "often"}, "graphs"),
            ({"ahead_tokens": -1}, "ahead_tokens"),
            ({"attention": get("flash-attn-3")}, "rows past the end"),
            ({"attention": "nonsense"}, "nonsense"),
            ({"max_batch": 0}, "max_batch"),
            ({"typical_len": 0}, "typical_len"),
            ({"buckets": []}, "at least one"),
            ({"max_batch": 2, "buckets": [2, 3]}, "largest bucket"),
            ({"ahead_tokens": 2.5}, "ahead_tokens"),
            ({"max_stop_tokens": 2**100}, "at most"),
            ({"max_stop_tokens": 2**40}, r"max_batch=3 takes 1759\d{10} bytes for tables of 4 slots"),
        ):
            with pytest.raises(ConfigError, match=message):
                DecodeLoop(fused, cache, **options)
        assert cache.stats().num_live_slots == 0
        if model.device.type == "cpu":
            with pytest.raises(ConfigError, match="needs a CUDA device"):
                DecodeLoop(fused, cache, graphs="always")


def test_the_cache_may_close_first(fused, model):
    cache = open_cache(model, 3)
    loop = DecodeLoop(fused, cache)
    slot = prefill(model, cache, [1, 2, 3])
    loop.start(slot, 4, 10)
    loop.step()
    cache.close()
    with pytest.raises(ConfigError):
        loop.step()
    assert len(loop.drain()) == 1
    loop.close()
    assert loop._mapper._thread is None


@pytest.mark.parametrize("mapping", ["thread", "inline"])
@pytest.mark.parametrize("change", ["release", "take", "truncate", "truncate and grow"])
def test_a_slot_that_is_changed_behind_the_loop_s_back(change, mapping, fused, model):
    """Its sequence is dropped by name, whoever has the slot now keeps it as it is, and the others go on."""
    prompts = [[3, 5, 7], [4, 6, 8, 10]]
    expected = eager(model, prompts, 40)
    with open_cache(model, 4) as cache, DecodeLoop(fused, cache, mapping=mapping, ahead_tokens=2) as loop:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        for slot, prompt in zip(slots, prompts, strict=True):
            loop.start(slot, prompt[-1], 40)
        tokens = [each for _ in range(3) for each in loop.step()]
        changed = slots[0]
        if "truncate" in change:
            cache.truncate(changed, 1)
            if "grow" in change:
                cache.ensure(changed, 30)
        else:
            cache.release(changed)
            if change == "take":
                assert cache.acquire(changed) == changed
                cache.ensure(changed, 8)
                for tensor in cache.rows(changed, 0):
                    tensor.fill_(7.0)
        rows = None if change == "release" else cache.seq_len(changed)
        with pytest.raises(ConfigError, match=rf"slots \[{changed}\] were released or truncated"):
            loop.step()
        assert loop.slots == (slots[1],)
        tokens += loop.run()
        assert tuple(by_slot(tokens)[slots[1]]) == expected[1]
        loop.cancel(changed)
        loop.close()
        if rows is not None:
            assert cache.seq_len(changed) == rows
        if change == "take":
            assert all((tensor == 7).all() for tensor in cache.rows(changed, 0))
        cache.check_integrity()


@pytest.mark.parametrize("end", ["drain", "cancel", "close", "cancel untold", "release"])
def test_a_slot_that_is_taken_before_its_end_was_told(end, fused, model, monkeypatch):
    """All steps of its last sequence are launched; what the loop has left to do is not done to the next one."""
    (expected,) = eager(model, [[3, 5, 7]], 3)
    with open_cache(model, 3) as cache, DecodeLoop(fused, cache) as loop:
        slot = prefill(model, cache, [3, 5, 7])
        loop.start(slot, 7, 3)
        tokens = [each for _ in range(3) for each in loop.step()]
        if end == "cancel untold":
            monkeypatch.setattr(loop._progress, "report", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loop.drain()
            monkeypatch.undo()
        cache.release(slot)
        assert cache.acquire(slot) == slot
        cache.ensure(slot, 8)
        if end == "release":
            with pytest.raises(ConfigError, match="another sequence"):
                loop.release(slot)
        else:
            {"drain": lambda: tokens.extend(loop.drain()), "close": loop.close}.get(end, lambda: loop.cancel(slot))()
        assert cache.seq_len(slot) == 8
        assert tuple(each.token for each in tokens) == (expected if end == "drain" else expected[:2])
        cache.check_integrity()


def test_an_exception_in_the_block(fused, model):
    with open_cache(model, 3) as cache:
        slot = prefill(model, cache, [1, 2, 3])

        def leave_in_the_middle() -> None:
            with DecodeLoop(fused, cache) as loop:
                loop.start(slot, 4, 10)
                loop.step()
                raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            leave_in_the_middle()
        assert cache.seq_len(slot) == 2
        cache.release(slot)
        assert cache.stats().num_live_slots == 0
        cache.check_integrity()


def test_a_model_of_another_library(model):
    with pytest.raises(ConfigError, match="own Llama"):
        FusedLlama(torch.nn.Linear(2, 2))
    with open_cache(model) as cache, pytest.raises(ConfigError, match="FusedLlama"):
        DecodeLoop(model, cache)


def test_a_slot_with_tokens_that_were_not_reported_does_not_start_again(fused, model, monkeypatch):
    """``step`` had drained when it ran out of pages, so the slot has ended and nobody was told."""
    with open_cache(model) as cache, DecodeLoop(fused, cache, mapping="inline") as loop:
        ended, other = prefill(model, cache, [1, 2, 3]), prefill(model, cache, [4, 5])
        loop.start(ended, 3, 2)
        loop.start(other, 5, 9)
        loop.step()
        loop.step()

        def short(*_: object) -> None:
            raise OutOfPages("none", free_bytes=0, limit_bytes=0)

        monkeypatch.setattr(loop._mapper, "require", short)
        with pytest.raises(OutOfPages):
            loop.step()
        monkeypatch.undo()
        assert ended not in loop.slots
        rows = cache.seq_len(ended)
        with pytest.raises(ConfigError, match="not reported yet"):
            loop.start(ended, 7, 5)
        assert ended in [token.slot for token in loop.drain()]
        loop.start(ended, 7, 5)
        loop.cancel(ended)
        assert cache.seq_len(ended) == rows
