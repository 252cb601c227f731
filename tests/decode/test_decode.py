"""The decode loop against the model's own forward: on the CPU with eager operations, on a GPU with captured graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.decode import by_slot, eager, prefill, prompts_for, walk
from helpers.llama import SMALL, hf_model_of, open_cache, run, same_in_vattn, small_model

import vattn
from vattn.decode import DecodedToken, DecodeLoop, Sampling, Start
from vattn.errors import ConfigError
from vattn.models import FusedLlama, Llama
from vattn.models.fused_llama import products
from vattn.ops.ops_table import fused_ops, reference_ops

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
            loop.start_batch([Start(slot, prompt[-1], 40) for slot, prompt in zip(slots, prompts, strict=True)])
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


@pytest.mark.parametrize("steps_ahead", [1, 3, 16])
def test_sequences_come_and_go(fused, model, steps_ahead):
    """Random arrivals, cancellations, ends and new lives of slots between steps, in a cache that runs out of pages."""
    walk(fused, model, num_events=400, seed=3, steps_ahead=steps_ahead)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.unsanitized
def test_ten_thousand_events():
    model = small_model().to("cuda")
    walk(FusedLlama(model), model, num_events=10_000, seed=4)


@pytest.mark.parametrize("steps_ahead", [1, 2, 5, 11])
def test_steps_are_reported_so_many_later(fused, model, steps_ahead):
    prompt = [3, 5, 7]
    (expected,) = eager(model, [prompt], 30)
    with open_cache(model, 3) as cache, DecodeLoop(fused, cache, steps_ahead=steps_ahead) as loop:
        slot = prefill(model, cache, prompt)
        loop.start(slot, 7, 12)
        counts = [len(loop.step()) for _ in range(12)]
        assert counts == [0] * steps_ahead + [1] * (12 - steps_ahead)
        assert [each.token for each in loop.step()] == list(expected[12 - steps_ahead : 12])  # nothing to launch
        assert loop.slots == ()
        # What stops is seen late; the slot has its own rows and no more.
        cache.truncate(slot, 2)
        loop.start(slot, 7, 30, stop_tokens=[expected[9]])
        length = expected.index(expected[9]) + 1
        assert tuple(by_slot(loop.run())[slot]) == expected[:length]
        assert cache.seq_len(slot) == 2 + length
        cache.check_integrity()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts pages of 16 rows")
@pytest.mark.parametrize("steps_ahead", [1, 16])
def test_pages_of_a_sequence_whose_end_was_not_read_yet(fused, model, steps_ahead):
    prompts = [list(range(1, 14)), list(range(2, 31))]
    expected = eager(model, prompts, 12)
    cache = vattn.KVCache(model.kv_layout(160), 3, "cpu", memory_limit=4 * 4096, page_bytes=4096)
    with cache, DecodeLoop(fused, cache, ahead_tokens=0, mapping="inline", steps_ahead=steps_ahead) as loop:
        first, second = [prefill(model, cache, prompt) for prompt in prompts]
        stop = expected[0][1]
        loop.start(first, prompts[0][-1], 12, stop_tokens=[stop])
        loop.start(second, prompts[1][-1], 12)
        # The fifth step needs a fourth and a fifth page, were the first sequence not at its end.
        found = by_slot(loop.run())
        assert tuple(found[first]) == expected[0][: expected[0].index(stop) + 1]
        assert tuple(found[second]) == expected[1]
        assert cache.stats().num_oom == (steps_ahead > 1)
        cache.check_integrity()


@pytest.mark.parametrize("wrong", [0, 17, -1, 1.5, True, "2"])
def test_steps_ahead_that_there_are_not(fused, model, wrong):
    with open_cache(model, 3) as cache:
        with pytest.raises(ConfigError, match="steps_ahead"):
            DecodeLoop(fused, cache, steps_ahead=wrong)
        assert cache.stats().num_live_slots == 0


def test_cancelled_before_it_was_told(fused, model):
    """Tokens that a refused step kept back are dropped with their sequence, and their rows too."""
    prompt = [3, 5, 7]
    (expected,) = eager(model, [prompt], 30)
    for num_steps, count in ((4, 30), (4, 4)):  # going on, or ended already
        with open_cache(model, 3) as cache, DecodeLoop(fused, cache, ahead_tokens=0) as loop:
            slot = prefill(model, cache, prompt)
            loop.start(slot, prompt[-1], count)
            told = [each for _ in range(num_steps) for each in loop.step()]
            loop._pipeline.drain(0)
            loop.cancel(slot)
            assert loop.drain() == []
            assert cache.seq_len(slot) == 2 + len(told) == 5
            loop.start(slot, told[-1].token, 10)
            assert tuple(by_slot(told + loop.run())[slot]) == expected[:13]


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


def test_a_slot_is_in_one_loop_only(fused, model):
    prompt = [3, 5, 7]
    (expected,) = eager(model, [prompt], 10)
    with open_cache(model, 5) as cache, DecodeLoop(fused, cache) as first, DecodeLoop(fused, cache) as second:
        slot = prefill(model, cache, prompt)
        first.start(slot, 7, 10)
        first.step()
        with pytest.raises(ConfigError, match=f"slot {slot} belongs to another DecodeLoop"):
            second.start(slot, 7, 10)
        with pytest.raises(ConfigError, match=f"slot {first.own_slot} belongs to another"):
            second.start(first.own_slot, 7, 10)
        assert tuple(by_slot(first.run())[slot]) == expected
        cache.truncate(slot, 2)
        second.start(slot, 7, 10)  # which has ended there
        assert tuple(by_slot(second.run())[slot]) == expected


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

    for options in (
        {"temperature": np.float32(1.0)},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.9},
    ):
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
        loop.start_batch([Start(slot, found[-1], 40), Start(child, found[-1], 10), Start(other, prompt[-1], 60)])
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


@pytest.mark.gpu
def test_reference_operations_in_no_graph():
    """The eager operations on the GPU give the same tokens as the fused ones in graphs."""
    model = small_model().to("cuda")
    prompts = prompts_for(model, 5)
    expected = eager(model, prompts, 30)
    for ops in (reference_ops(), fused_ops()):
        with open_cache(model, 7) as cache, DecodeLoop(FusedLlama(model, ops=ops), cache, graphs="never") as loop:
            slots = [prefill(model, cache, prompt) for prompt in prompts]
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 30)
            found = by_slot(loop.run())
            assert [tuple(found[slot]) for slot in slots] == expected
