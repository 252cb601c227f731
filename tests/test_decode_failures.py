"""What goes wrong in the decode loop, or is called wrongly: no token and no row is lost, and the loop goes on."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from decode_helpers import by_slot, eager, prefill, prompts_for
from llama_helpers import SMALL, open_cache, small_model

import vattn
from vattn.attention import get
from vattn.decode import DecodeLoop, Sampling
from vattn.errors import ConfigError, OutOfPages, OutOfSlots
from vattn.models import FusedLlama, Llama


@pytest.fixture
def model(device) -> Llama:
    return small_model().to(device)


@pytest.fixture
def fused(model) -> FusedLlama:
    return FusedLlama(model)


def test_out_of_pages_in_the_middle(device):
    """It is raised in the caller, before anything is launched; no row is lost, and the loop goes on."""
    # 128 rows to a page of 2 MiB
    wide = replace(SMALL, num_layers=4, num_kv_heads=8, num_heads=8, head_dim=64)
    model = Llama.random(wide, std=0.2).to(device)
    prompts = prompts_for(model, 4)
    expected = eager(model, prompts, 140)
    with vattn.KVCache(model.kv_layout(), 8, device, page_bytes=2 << 20) as cache:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        with DecodeLoop(FusedLlama(model), cache, ahead_tokens=8) as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 140)
            found = {slot: [] for slot in slots}

            def note(tokens):
                for each in tokens:
                    found[each.slot].append(each.token)

            for _ in range(3):
                note(loop.step())
            cache.trim()
            pool = cache._slots.backing.pool
            limit, pool.limit_bytes = pool.limit_bytes, pool.physical_bytes + pool.page_bytes
            num_refused = 0
            for _ in range(135):
                try:
                    note(loop.step())
                except OutOfPages:
                    num_refused += 1
            assert num_refused > 20  # all but one of them wait for a page at row 128
            num_launched = loop._step._num_launched
            with pytest.raises(OutOfPages):
                loop.step()
            assert loop._step._num_launched == num_launched
            cache.check_integrity()
            loop.cancel(slots[3])
            cache.release(slots[3])
            note(loop.step())  # its page is enough for the next
            pool.limit_bytes = limit
            note(loop.run())
        for i in range(3):
            assert tuple(found[slots[i]]) == expected[i]
        assert tuple(found[slots[3]]) == expected[3][: len(found[slots[3]])]
        assert 90 < len(found[slots[3]]) < 140


@pytest.mark.parametrize("bound", ["cache", "model", "memory"])
def test_exactly_as_much_as_there_is_room_for(bound, model):
    """The last row of the cache, of the model's context, of the memory: used, and nothing past it asked for."""
    prompt = [3, 5, 7, 9]
    (expected,) = eager(model, [prompt], 61)
    length, page_bytes = 64, 16384 if model.device.type == "cpu" else 2 << 20  # 64 rows of 256 bytes on the CPU
    options = {"memory_limit": 2 * page_bytes} if bound == "memory" else {}
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
                assert cache.stats().num_map == 2  # the loop's slot and this one, a page each


def test_run_keeps_its_tokens_when_pages_run_out(fused, model):
    prompts = [[3, 5, 7], [4, 6, 8]]
    expected = eager(model, prompts, 100)
    page_bytes = 4096 if model.device.type == "cpu" else 2 << 20
    with vattn.KVCache(model.kv_layout(), 4, model.device, page_bytes=page_bytes) as cache:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        with DecodeLoop(fused, cache, ahead_tokens=0) as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 100)
            require, num_calls = loop._mapper.require, 0

            def refuse(*arguments):
                nonlocal num_calls
                num_calls += 1
                if num_calls in (30, 31):
                    raise OutOfPages("no page, says the test", asked_bytes=1, free_bytes=0, limit_bytes=0)
                require(*arguments)

            loop._mapper.require = refuse
            with pytest.raises(OutOfPages):
                loop.run()
            found = by_slot(loop.run())
            assert [tuple(found[slot]) for slot in slots] == expected


@pytest.mark.parametrize("where", ["before launch", "after launch", "leave", "drain"])
def test_ctrl_c(where, fused, model, monkeypatch):
    """Wherever it comes, no token is lost or told twice, and the loop goes on."""
    prompts = [[3, 5, 7], [4, 6, 8, 10]]
    expected = eager(model, prompts, 30)
    with open_cache(model, 4) as cache, DecodeLoop(fused, cache) as loop:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        loop.start(slots[0], prompts[0][-1], 30)
        found = [each for _ in range(3) for each in loop.step()]
        owner, name = {
            "before launch": (loop._step._graphs, "launch"),
            "after launch": (loop._step._graphs, "launch"),
            "leave": (cache._slots, "finish_deferred"),
            "drain": (loop, "_report"),
        }[where]
        original, num_calls = getattr(owner, name), 0

        def interrupt(*arguments, **options):
            nonlocal num_calls
            num_calls += 1
            if num_calls == 1 and where != "after launch":
                signal.raise_signal(signal.SIGINT)
            result = original(*arguments, **options)
            if num_calls == 1 and where == "after launch":
                signal.raise_signal(signal.SIGINT)
            return result

        monkeypatch.setattr(owner, name, interrupt)
        interrupted = False
        for _ in range(3):
            try:
                found += loop.step()
            except KeyboardInterrupt:
                interrupted = True
        assert interrupted
        monkeypatch.undo()
        loop.start(slots[1], prompts[1][-1], 30)
        tokens = by_slot(found + loop.run())
        assert [tuple(tokens[slot]) for slot in slots] == expected
        cache.check_integrity()


def test_ctrl_c_at_every_step(fused, model, monkeypatch):
    """Steps that nobody came to read do not pile up beyond the ring that they answer in."""
    prompts = [[3, 5, 7], [4, 6, 8, 10]]
    expected = eager(model, prompts, 40)
    with open_cache(model, 4) as cache, DecodeLoop(fused, cache) as loop:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        for slot, prompt in zip(slots, prompts, strict=True):
            loop.start(slot, prompt[-1], 40)
        launch = loop._step._graphs.launch

        def interrupt(bucket):
            launch(bucket)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(loop._step._graphs, "launch", interrupt)
        found, num_interrupted = [], 0
        for _ in range(25):
            try:
                found += loop.step()
            except KeyboardInterrupt:
                num_interrupted += 1
        assert num_interrupted == 25
        monkeypatch.undo()
        tokens = by_slot(found + loop.run())
        assert [tuple(tokens[slot]) for slot in slots] == expected


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


def test_a_start_that_fails_leaves_the_slot_as_it_was(fused, model, monkeypatch):
    prompt = [3, 5, 7]
    (expected,) = eager(model, [prompt], 10)
    with open_cache(model, 3) as cache, DecodeLoop(fused, cache) as loop:
        slot = prefill(model, cache, prompt)
        monkeypatch.setattr(loop._step, "upload", lambda array: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.start(slot, 7, 10)
        monkeypatch.undo()
        assert cache.seq_len(slot) == 2
        assert loop.slots == ()
        loop.start_batch((slot, 7, 10, None, {1000 % 128, 127} - set(expected)) for _ in range(1))
        assert tuple(by_slot(loop.run())[slot]) == expected


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


def test_a_nan_stays_with_its_sequence(fused, model):
    prompts = prompts_for(model, 5)
    expected = eager(model, prompts, 30)
    with open_cache(model, 7) as cache:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        with DecodeLoop(fused, cache) as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 30)
            tokens = [each for _ in range(4) for each in loop.step()]
            tokens += loop.drain()
            for layer in range(model.config.num_layers):
                for rows in cache.rows(slots[2], layer):
                    rows[:] = float("nan")
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            tokens += loop.run()
        found = by_slot(tokens)
        for i in (0, 1, 3, 4):
            assert tuple(found[slots[i]]) == expected[i]
        assert len(found[slots[2]]) == 30
        assert all(0 <= token < model.config.vocab_size for token in found[slots[2]])


def test_wrong_arguments_change_nothing(fused, model):
    with open_cache(model, 4) as cache, DecodeLoop(fused, cache, max_batch=2, max_stop_tokens=2) as loop:
        slot = prefill(model, cache, [1, 2, 3])
        before = cache.stats()
        for arguments, message in (
            ((loop._scratch, 1, 1), "own"),
            ((7, 1, 1), "slot"),
            ((2, 1, 1), "holds no sequence"),
            ((slot, 128, 1), "vocabulary"),
            ((slot, -1, 1), "vocabulary"),
            ((slot, 1.0, 1), "vocabulary"),
            ((slot, 1, 0), "max_new_tokens"),
            ((slot, 1, 511), "exceed the context"),
            ((slot, 1, 1, {"temperature": 1}), "Sampling"),
            ((slot, 1, 1, Sampling(temperature=-1)), "temperature"),
            ((slot, 1, 1, Sampling(top_p=0)), "top_p"),
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
            loop.start_batch([(slot, 1, 1, None, ()), (slot, 1, 1, None, ())])
        with pytest.raises(ConfigError, match="a sequence is"):
            loop.start_batch([(slot, 1, 1)])
        with pytest.raises(ConfigError, match="own"):
            loop.release(loop._scratch)
        assert cache.stats() == before
        assert loop.slots == ()
        loop.start(slot, 1, 5)
        with pytest.raises(ConfigError, match="already"):
            loop.start(slot, 1, 5)
        others = [prefill(model, cache, [1, 2]) for _ in range(2)]
        with pytest.raises(ConfigError, match="max_batch"):
            loop.start_batch([(other, 1, 1, None, ()) for other in others])
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


def test_two_threads_at_once(fused, model):
    """Refused, and nothing is lost: what the first thread does goes on as if nobody had come."""
    prompts = prompts_for(model, 3)
    expected = eager(model, prompts, 60)
    with open_cache(model) as cache:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        with DecodeLoop(fused, cache) as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 60)
            refused, done = [], threading.Event()

            def meddle():
                while not done.is_set():
                    try:
                        loop.cancel(99)  # of no slot: without effect, if it is let in
                    except ConfigError as error:
                        refused.append(str(error))
                    time.sleep(0)

            other = threading.Thread(target=meddle)
            tokens = []
            other.start()
            try:
                while loop.slots:
                    try:
                        tokens += loop.step()
                    except ConfigError as error:
                        refused.append(str(error))
            finally:
                done.set()
                other.join()
            tokens += loop.drain()
    assert refused
    assert all("another thread" in each for each in refused)
    found = by_slot(tokens)
    assert [tuple(found[slot]) for slot in slots] == expected


@pytest.mark.gpu
def test_release_keeps_the_pages_for_the_caller_s_own_work(device):
    """On the caller's stream, behind something long, and announced to nobody; the next sequence takes the memory."""
    if device != "cuda":
        pytest.skip("needs streams")
    model = small_model().to(device)
    prompt = prompts_for(model, 5)[-1]
    with open_cache(model) as cache:
        slot = prefill(model, cache, prompt)
        with DecodeLoop(FusedLlama(model), cache) as loop:
            loop.start(slot, prompt[-1], 3)
            loop.run()
            rows = cache.rows(slot, 0)[0]
            expected = rows.clone()
            torch.cuda.synchronize()
            torch.cuda._sleep(1_000_000_000)  # cycles: half a second
            copied = rows.clone()
            loop.release(slot)
            with torch.cuda.stream(torch.cuda.Stream()):
                for other in (slot, *range(4)):
                    with suppress(OutOfSlots):
                        cache.ensure(cache.acquire(other), 64)
                torch.cuda.synchronize()
            assert torch.equal(copied, expected)


def test_a_model_of_another_library(model):
    with pytest.raises(ConfigError, match="own Llama"):
        FusedLlama(torch.nn.Linear(2, 2))
    with open_cache(model) as cache, pytest.raises(ConfigError, match="FusedLlama"):
        DecodeLoop(model, cache)
