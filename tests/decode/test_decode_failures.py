"""What goes wrong in the decode loop: no token and no row is lost, and the loop goes on."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from helpers.decode import by_slot, eager, prefill, prompts_for
from helpers.failing_driver import FailingDriver
from helpers.llama import SMALL, open_cache, small_model

import vattn
from vattn.decode import DecodeLoop, Start
from vattn.driver import HostDriver
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


@pytest.mark.parametrize("mapping", ["thread", "inline"])
@pytest.mark.parametrize("ahead_tokens", [0, 64])
def test_a_shortage_that_could_not_be_undone_surfaces(mapping, ahead_tokens):
    """It is the driver's fault, not one to drain and try again for. The loop can go on if nothing was lost."""
    model, driver = small_model(), FailingDriver(HostDriver())
    (expected,) = eager(model, [[3, 5, 7]], 100)
    options = {"page_bytes": 4096, "memory_limit": 64 << 20, "driver": driver}
    with vattn.KVCache(model.kv_layout(order="layer"), 4, **options) as cache:
        slot = prefill(model, cache, [3, 5, 7])
        with DecodeLoop(FusedLlama(model), cache, mapping=mapping, ahead_tokens=ahead_tokens) as loop:
            loop.start(slot, 7, 100)
            driver.fail("create", at=2, out_of_memory=True)
            driver.fail("release")  # of the page that was created before
            tokens, raised = [], []
            while loop.slots:
                try:
                    tokens += loop.step()
                except vattn.DriverError as error:
                    raised.append(error)
        assert [error.undo_incomplete for error in raised] == [True]
        assert tuple(by_slot(tokens)[slot]) == expected
        cache.check_integrity()


def test_rows_that_a_failed_undo_lost_are_not_decoded():
    model, driver = small_model(), FailingDriver(HostDriver())
    prompts = [[3, 5, 7], list(range(1, 40))]
    expected = eager(model, prompts, 60)
    options = {"page_bytes": 4096, "memory_limit": 64 << 20, "driver": driver}
    with vattn.KVCache(model.kv_layout(), 5, **options) as cache:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        with DecodeLoop(FusedLlama(model), cache, mapping="inline") as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 60)
            tokens = [each for _ in range(3) for each in loop.step()]
            child = cache.fork(slots[1])
            driver.fail("map", times=2, out_of_memory=True)  # of the private copy, and of what was there before
            with pytest.raises(vattn.DriverError, match="INJECTED") as caught:
                cache.make_writable(slots[1], 0, 20)
            assert caught.value.undo_incomplete
            with pytest.raises(ConfigError, match=rf"slots \[{slots[1]}\]"):
                loop.step()
            tokens += loop.run()
        assert tuple(by_slot(tokens)[slots[0]]) == expected[0]
        cache.release(child)
        cache.check_integrity()


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
            "drain": (loop._progress, "report"),
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
        loop.start_batch(Start(slot, 7, 10, None, {1000 % 128, 127} - set(expected)) for _ in range(1))
        assert tuple(by_slot(loop.run())[slot]) == expected


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
        *before, last = found[slots[2]]
        assert len(before) < 30
        assert last is None  # it ends when nothing is left to choose from
        assert tuple(before) == expected[2][: len(before)]


def test_log_probabilities_that_cannot_be_computed_end_who_asked_for_them(fused, model, monkeypatch):
    """The step was launched by then: its other sequences keep their tokens and go on."""
    prompts = prompts_for(model, 3)
    expected = eager(model, prompts, 20)
    with open_cache(model, 5) as cache, DecodeLoop(fused, cache) as loop:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        for slot, prompt in zip(slots, prompts, strict=True):
            loop.start(slot, prompt[-1], 20, num_logprobs=2 if slot == slots[1] else None)
        found = [each for _ in range(4) for each in loop.step()]

        def fail(*arguments):
            raise torch.OutOfMemoryError("no room for log-probabilities")

        with monkeypatch.context() as patch:
            patch.setattr("vattn.decode.step.logprobs", fail)
            found += loop.step()
        found += loop.run()
        tokens = by_slot(found)
        assert [tuple(tokens[slots[i]]) for i in (0, 2)] == [expected[0], expected[2]]
        assert tokens[slots[1]] == [*expected[1][:4], None]
        ends = {each.slot: each for each in found if each.finish_reason is not None}
        assert ends[slots[1]].finish_reason == "error"
        assert "no room for log-probabilities" in str(ends[slots[1]].error)
        assert ends[slots[0]].error is None
        assert cache.seq_len(slots[1]) == len(prompts[1]) + 4
        loop.start(slots[1], expected[1][4], 15, num_logprobs=2)  # as if nothing had been
        assert tuple(each.token for each in loop.run()) == expected[1][5:]
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
