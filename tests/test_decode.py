"""The decode loop against the eager engine: on the CPU with eager operations, on a GPU with captured graphs."""

from __future__ import annotations

import gc
import random
import signal
import threading
from dataclasses import replace

import pytest
import torch
from decode_helpers import by_slot, eager, prefill, prompts_for
from llama_helpers import SMALL, hf_model_of, open_cache, run, same_in_vattn, small_model

import vattn
from vattn.attention import get
from vattn.decode import DecodedToken, DecodeLoop, Sampling
from vattn.errors import ConfigError, OutOfPages
from vattn.models import FusedLlama, Llama
from vattn.models.fused_llama import products
from vattn.ops.bundle import fused_ops, reference_ops

FAMILY = {
    "llama": ("llama", {}),
    "biases, one KV head": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral, window 16": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
}


@pytest.fixture
def model(device) -> Llama:
    return small_model().to(device)


@pytest.fixture
def fused(model) -> FusedLlama:
    return FusedLlama(model)


@pytest.mark.parametrize("mapping", ["thread", "inline"])
@pytest.mark.parametrize("name", FAMILY)
def test_token_for_token(name, mapping, device):
    kind, changes = FAMILY[name]
    model = same_in_vattn(hf_model_of(kind, **changes)).to(device)
    prompts = prompts_for(model, 6)
    expected = eager(model, prompts, 40)
    with open_cache(model, 9) as cache:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        with DecodeLoop(FusedLlama(model), cache, max_batch=7, mapping=mapping) as loop:
            loop.start_batch([(slot, prompt[-1], 40, None, ()) for slot, prompt in zip(slots, prompts, strict=True)])
            assert set(loop.slots) == set(slots)
            tokens = loop.run()
            assert loop.slots == ()
        found = by_slot(tokens)
        assert [tuple(found[slot]) for slot in slots] == expected
        assert [each.finish_reason for each in tokens[-6:]] == ["length"] * 6
        assert not any(each.finish_reason for each in tokens[:-6])
        for slot, prompt in zip(slots, prompts, strict=True):
            assert cache.seq_len(slot) == len(prompt) + 39  # all but the newest token
        cache.check_integrity()
    assert len({token for tokens in expected for token in tokens}) > 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="the loop runs fused operations there anyway")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fused_operations_in_the_interpreter(name):
    kind, changes = FAMILY[name]
    model = same_in_vattn(hf_model_of(kind, num_hidden_layers=2, **changes))
    prompts = prompts_for(model, 3)
    expected = eager(model, prompts, 5)
    with open_cache(model, 5) as cache:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        with DecodeLoop(FusedLlama(model, ops=fused_ops()), cache, max_batch=4, buckets=[4]) as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 5)
            found = by_slot(loop.run())
        assert [tuple(found[slot]) for slot in slots] == expected


def test_merged_weights_are_the_model_s_own(device):
    model = same_in_vattn(hf_model_of("qwen2")).to(device)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    prompt = prompts_for(model, 3)[2]
    with open_cache(model) as cache:
        expected = run(model, cache, [cache.acquire()], [prompt])
        fused = FusedLlama(model)
        torch.testing.assert_close(run(model, cache, [cache.acquire()], [prompt]), expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    layer, attention = fused.layers[1], model.layers[1].self_attn
    assert layer.qkv.data_ptr() == attention.q_proj.weight.data_ptr()
    assert layer.qkv[-1].data_ptr() == attention.v_proj.weight[-1].data_ptr()
    assert layer.gate_up[-1].data_ptr() == model.layers[1].mlp.up_proj.weight[-1].data_ptr()
    shapes = {(outputs, inputs) for outputs, inputs, _ in products(model.config)}
    weights = (layer.qkv, layer.o, layer.gate_up, layer.down, model.output_weight)
    assert {(weight.shape[0], weight.shape[1]) for weight in weights} == shapes


def test_sequences_come_and_go(fused, model):
    """Random arrivals, cancellations, ends and new lives of slots between steps, in a cache that runs out of pages."""
    walk(fused, model, num_events=400, seed=3)


@pytest.mark.gpu
@pytest.mark.slow
def test_ten_thousand_events():
    model = small_model().to("cuda")
    walk(FusedLlama(model), model, num_events=10_000, seed=4)


def walk(fused: FusedLlama, model: Llama, num_events: int, seed: int) -> None:
    rng = random.Random(seed)
    prompts = prompts_for(model, 12)
    expected = eager(model, prompts, 60)
    on_cpu = model.device.type == "cpu"
    # On the CPU a page of 4 KiB holds 16 rows; there are not enough for nine long sequences.
    cache = vattn.KVCache(
        model.kv_layout(160),
        12,
        model.device,
        memory_limit=24 * 4096 if on_cpu else 10 << 21,
        page_bytes=4096 if on_cpu else None,
    )
    seen = {"started": 0, "ended": 0, "cancelled": 0, "refused": 0, "stopped": 0}
    with cache, DecodeLoop(fused, cache, max_batch=9, ahead_tokens=20) as loop:
        running: dict[int, tuple[int, int, int | None, list[int]]] = {}  # slot -> prompt, tokens to come, stop, so far

        def note(tokens: list[DecodedToken]) -> None:
            for each in tokens:
                prompt, count, stop, found = running[each.slot]
                found.append(each.token)
                assert each.token == expected[prompt][len(found) - 1]
                reason = "stop" if each.token == stop else "length" if len(found) == count else None
                assert each.finish_reason == reason
                if reason:
                    seen["stopped" if reason == "stop" else "ended"] += 1
                    assert cache.seq_len(each.slot) == len(prompts[prompt]) - 1 + len(found)
                    cache.release(each.slot)
                    del running[each.slot]

        while seen["started"] + seen["cancelled"] < num_events:
            event = rng.random()
            if event < 0.3 and len(running) < 9:
                prompt, count = rng.randrange(12), rng.randrange(1, 61)
                stop = rng.choice(expected[prompt]) if rng.random() < 0.3 else None
                slot = rng.choice([slot for slot in range(12) if slot not in running and slot != loop._scratch])
                try:
                    slot = cache.acquire(slot)
                    if len(prompts[prompt]) > 1:
                        run(model, cache, [slot], [prompts[prompt][:-1]])
                    loop.start(slot, prompts[prompt][-1], count, stop_tokens=() if stop is None else (stop,))
                except OutOfPages:
                    cache.release(slot)
                    seen["refused"] += 1
                    continue
                running[slot] = (prompt, count, stop, [])
                seen["started"] += 1
            elif event < 0.4 and running:
                slot = rng.choice(list(running))
                loop.cancel(slot)
                prompt, _, _, found = running.pop(slot)
                assert cache.seq_len(slot) == len(prompts[prompt]) - 1 + len(found)
                cache.release(slot)
                seen["cancelled"] += 1
            elif event < 0.43:
                note(loop.drain())
            try:
                note(loop.step())
            except OutOfPages:
                seen["refused"] += 1
                loop.cancel(slot := rng.choice(list(running)))
                cache.release(slot)
                del running[slot]
            if rng.random() < 0.05:
                cache.check_integrity()
        while running:
            slot = next(iter(running))
            loop.cancel(slot)
            cache.release(slot)
            del running[slot]
        assert loop.run() == []
        cache.check_integrity()
        assert cache.stats().num_live_slots == 1
    assert min(seen[key] for key in ("ended", "cancelled", "stopped")) > num_events / 50
    assert seen["refused"] or not on_cpu


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
            num_launched = loop._num_launched
            with pytest.raises(OutOfPages):
                loop.step()
            assert loop._num_launched == num_launched
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


def test_cancelled_before_it_was_told(fused, model):
    """Tokens that a refused step kept back are dropped with their sequence, and their rows too."""
    prompt = [3, 5, 7]
    (expected,) = eager(model, [prompt], 30)
    for num_steps, count in ((4, 30), (4, 4)):  # going on, or ended already
        with open_cache(model, 3) as cache, DecodeLoop(fused, cache, ahead_tokens=0) as loop:
            slot = prefill(model, cache, prompt)
            loop.start(slot, prompt[-1], count)
            told = [each for _ in range(num_steps) for each in loop.step()]
            loop._drain(0)
            loop.cancel(slot)
            assert loop.drain() == []
            assert cache.seq_len(slot) == 2 + len(told) == 5
            loop.start(slot, told[-1].token, 10)
            assert tuple(by_slot(told + loop.run())[slot]) == expected[:13]


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
            "before launch": (loop._graphs, "launch"),
            "after launch": (loop._graphs, "launch"),
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


def test_a_start_that_fails_leaves_the_slot_as_it_was(fused, model, monkeypatch):
    prompt = [3, 5, 7]
    (expected,) = eager(model, [prompt], 10)
    with open_cache(model, 3) as cache, DecodeLoop(fused, cache) as loop:
        slot = prefill(model, cache, prompt)
        monkeypatch.setattr(loop, "_upload", lambda array: 1 / 0)
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


def test_the_loop_releases_slots(fused, model):
    with open_cache(model, 3) as cache, DecodeLoop(fused, cache) as loop:
        slots = [prefill(model, cache, [1, 2, 3]) for _ in range(2)]
        loop.start(slots[0], 4, 3)
        loop.run()
        loop.start(slots[1], 4, 30)
        loop.step()
        for slot in slots:
            loop.release(slot)
        assert loop.run() == []
        assert prefill(model, cache, [1, 2, 3], slots[0]) == slots[0]


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


def test_a_seed_determines_the_tokens(fused, model):
    """Whatever else is in the batch, and whichever slot it is; at one bucket, whose kernels are the same."""
    prompt = prompts_for(model, 4)[3]

    def sample(seed: int, others: int, options: dict[str, float]) -> tuple[int, ...]:
        with open_cache(model, 8) as cache, DecodeLoop(fused, cache, buckets=[7]) as loop:
            for i in range(others):
                slot = prefill(model, cache, [i + 1, i + 2])
                loop.start(slot, 3, 50, Sampling(temperature=0.9, seed=99 + i))
            slot = prefill(model, cache, prompt)
            for _ in range(others):
                loop.step()
            loop.start(slot, prompt[-1], 40, Sampling(seed=seed, **options))
            return tuple(by_slot(loop.run())[slot])

    for options in ({"temperature": 1.0}, {"temperature": 0.8, "top_k": 20}, {"temperature": 1.3, "top_p": 0.9}):
        first = sample(5, 0, options)
        assert sample(5, 0, options) == sample(5, 3, options) == first
        assert sample(6, 0, options) != first
    assert sample(7, 2, {"temperature": 1.0, "top_k": 1}) == sample(8, 0, {}) == eager(model, [prompt], 40)[0]


def test_a_slot_goes_on_and_is_forked(fused, model):
    prompt = prompts_for(model, 6)[5]
    (expected,) = eager(model, [prompt], 60)
    with open_cache(model, 6) as cache, DecodeLoop(fused, cache) as loop:
        slot = prefill(model, cache, prompt)
        loop.start(slot, prompt[-1], 20)
        found = by_slot(loop.run())[slot]
        child, other = cache.fork(slot), cache.fork(slot, len(prompt) - 1)
        loop.start_batch(
            [(slot, found[-1], 40, None, ()), (child, found[-1], 10, None, ()), (other, prompt[-1], 60, None, ())]
        )
        rest = by_slot(loop.run())
        assert tuple(found + rest[slot]) == expected
        assert tuple(found + rest[child]) == expected[:30]
        assert tuple(rest[other]) == expected
        cache.check_integrity()


def test_cancelled_and_started_again_at_once(fused, model):
    """What an old life of a slot still has under way is not taken for the new one's."""
    prompts = prompts_for(model, 3)
    expected = eager(model, prompts, 20)
    with open_cache(model, 3) as cache, DecodeLoop(fused, cache) as loop:
        slot = prefill(model, cache, prompts[1])
        loop.start(slot, prompts[1][-1], 20)
        assert loop.step() == []
        assert loop.step() == [DecodedToken(slot, expected[1][0])]
        loop.cancel(slot)
        loop.cancel(slot)
        cache.release(slot)
        assert prefill(model, cache, prompts[2], slot) == slot
        loop.start(slot, prompts[2][-1], 20)
        assert tuple(by_slot(loop.run())[slot]) == expected[2]


def test_stop_tokens(fused, model):
    prompt = prompts_for(model, 3)[2]
    (expected,) = eager(model, [prompt], 30)
    stop = expected[11]
    first = expected.index(stop)
    with open_cache(model, 3) as cache, DecodeLoop(fused, cache) as loop:
        slot = prefill(model, cache, prompt)
        unused = next(t for t in range(SMALL.vocab_size) if t not in expected)
        loop.start(slot, prompt[-1], 30, stop_tokens=[unused, stop])
        tokens = loop.run()
        assert tuple(each.token for each in tokens) == expected[: first + 1]
        assert [each.finish_reason for each in tokens] == [None] * first + ["stop"]
        assert cache.seq_len(slot) == len(prompt) + first


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
        ):
            with pytest.raises(ConfigError, match=message):
                loop.start(*arguments)
        with pytest.raises(ConfigError, match="once"):
            loop.start_batch([(slot, 1, 1, None, ()), (slot, 1, 1, None, ())])
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


@pytest.mark.gpu
def test_reference_operations_in_no_graph():
    """The eager operations on the GPU give the same tokens as the fused ones in graphs."""
    model = small_model().to("cuda")
    prompts = prompts_for(model, 5)
    expected = eager(model, prompts, 30)
    for ops, graphs in ((reference_ops(), "never"), (fused_ops(), "never"), (fused_ops(), "measure")):
        with open_cache(model, 7) as cache, DecodeLoop(FusedLlama(model, ops=ops), cache, graphs=graphs) as loop:
            slots = [prefill(model, cache, prompt) for prompt in prompts]
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 30)
            found = by_slot(loop.run())
            assert [tuple(found[slot]) for slot in slots] == expected
            if graphs == "measure":
                assert all(report.graph_us and report.eager_us for report in loop.graphs)
                assert all(report.captured == (report.graph_us < report.eager_us) for report in loop.graphs)
