"""Prefill passes of the runtime's model: the K and V that they append are those of ``Llama.forward``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.llama import SMALL, hf_model_of, open_cache, random_tokens, run, same_in_vattn, small_model

from vattn.attention import AttentionBatch, DecodeBatch, PromptBatch, get
from vattn.errors import ConfigError
from vattn.kv_cache import KVCache
from vattn.memory.tensors import upload
from vattn.models import FusedLlama, Llama, fused_llama
from vattn.ops.ops_table import Ops, fused_ops

# name -> (architecture, what differs from the common small shape); windows are smaller than the prompts
FAMILY: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "biases, one KV head, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "windows": ("mistral", {"sliding_window": 16}),
    "biases of Q, K and V, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "normalised heads": ("qwen3", {"head_dim": 24}),
    "3 KV heads of 80": (
        "llama",
        {"hidden_size": 90, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 80},
    ),
}
LENGTHS = (1, 70, 33, 9)
# Each pass: how many new tokens each prompt gets; short ones beside long ones, in chunks, one token at a time.
PASSES = ([1, 40, 0, 2], [0, 1, 33, 0], [0, 29, 0, 7])


def prefill(
    fused: FusedLlama, cache: KVCache, slots: Sequence[int], chunks: Sequence[Sequence[int]], attention: str = "sdpa"
) -> None:
    """One pass, of the slots that get any tokens."""
    work = [(slot, chunk) for slot, chunk in zip(slots, chunks, strict=True) if chunk]
    used, counts = [slot for slot, _ in work], [len(chunk) for _, chunk in work]
    ends = [cache.seq_len(slot) + count for slot, count in zip(used, counts, strict=True)]
    cache.ensure_batch(used, ends)
    tokens = upload([token for _, chunk in work for token in chunk], cache.device, torch.int64)
    with cache.step(used), torch.inference_mode():
        fused.prefill(tokens, AttentionBatch.build(used, counts, ends, cache.device), cache, get(attention))


def check(model: Llama, ops: Ops | None, order: str = "token") -> None:
    fused = FusedLlama(model, ops=ops)
    prompts = [random_tokens(n, model.config.vocab_size, seed=n) for n in LENGTHS]
    with open_cache(model, 9, order) as cache:
        slots, expected = [cache.acquire(slot) for slot in (6, 0, 7, 3)], [cache.acquire() for _ in prompts]
        run(model, cache, expected, prompts)
        done = [0] * len(prompts)
        for counts in PASSES:
            prefill(fused, cache, slots, [p[n : n + c] for p, n, c in zip(prompts, done, counts, strict=True)])
            done = [n + c for n, c in zip(done, counts, strict=True)]
        assert done == [*LENGTHS]
        for slot, other in zip(slots, expected, strict=True):
            for layer in range(model.config.num_layers):
                for got, wanted in zip(cache.rows(slot, layer), cache.rows(other, layer), strict=True):
                    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5)
        cache.check_integrity()


@pytest.mark.parametrize("order", ["token", "layer"])
@pytest.mark.parametrize("name", FAMILY)
def test_rows_are_those_of_the_eager_model(name: str, order: str, device: str) -> None:
    """Several prompts in chunks, packed in passes of mixed lengths."""
    kind, changes = FAMILY[name]
    check(same_in_vattn(hf_model_of(kind, **changes)).to(device), None, order)


@pytest.mark.skipif(torch.cuda.is_available(), reason="passes run fused operations there anyway")
@pytest.mark.parametrize("name", ["biases, one KV head, tied", "normalised heads"])
def test_fused_operations_in_the_interpreter(name: str) -> None:
    kind, changes = FAMILY[name]
    check(same_in_vattn(hf_model_of(kind, **{"num_hidden_layers": 2, **changes})), fused_ops())


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [7, 700])
def test_as_good_as_eager_in_bfloat16(num_tokens: int) -> None:
    """Rows of the last layer against float32's: no further from them than twice what the eager model is."""
    model = small_model().to("cuda")
    prompts = [random_tokens(n, 128, seed=n) for n in (num_tokens // 2, num_tokens - num_tokens // 2)]

    def rows(kind: str, model: Llama) -> torch.Tensor:
        with open_cache(model, 2, max_seq_len=512) as cache:
            slots = [cache.acquire(), cache.acquire()]
            if kind == "eager":
                run(model, cache, slots, prompts)
            else:
                prefill(FusedLlama(model), cache, slots, prompts)
            found = [cache.rows(slot, layer)[i].float() for slot in slots for layer in (0, 1) for i in (0, 1)]
            return torch.cat([each.flatten().cpu() for each in found])

    exact = rows("eager", model)
    model = model.to(torch.bfloat16)
    allowed = (rows("eager", model) - exact).norm()
    assert (rows("fused", model) - exact).norm() < 2 * allowed < 0.1 * exact.norm()


def decode_batch(cache: KVCache, slots: Sequence[int], rows: Sequence[int]) -> DecodeBatch:
    slot, row = (torch.tensor(values, dtype=torch.int32, device=cache.device) for values in (slots, rows))
    return DecodeBatch(slot, row, row + 1, cache.layout.max_seq_len)


def fixed_batch(
    cache: KVCache, slots: Sequence[int], tokens: Sequence[Sequence[int]], ends: Sequence[int]
) -> PromptBatch:
    """Filled up to a multiple of 16 tokens and to seven sequences."""
    size = -(-sum(len(each) for each in tokens) // 16) * 16
    batch = PromptBatch(size, 7, cache.layout.max_seq_len, cache.device)
    spare = cache.acquire()
    cache.ensure(spare, 1)
    for _ in range(2):  # what it held before is gone
        batch.fill(slots, tokens, ends, spare)
    return batch


@pytest.mark.parametrize("together", ["", "packed", "large", "fixed", "completed"])
@pytest.mark.parametrize("name", FAMILY)
def test_prefill_then_decode(name: str, together: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runtime does with prompts: all but their last tokens by passes, those by a decode step. ``together``: in
    the same pass as the tokens of other prompts, ``completed`` by those of the same prompts."""
    if together == "large":  # as a pass of thousands of tokens is computed
        monkeypatch.setattr(fused_llama, "_LARGE", 0)
    kind, changes = FAMILY[name]
    model = same_in_vattn(hf_model_of(kind, **changes)).to(device)
    fused, vocab_size = model.runtime(), model.config.vocab_size
    prompts = [random_tokens(n, vocab_size, seed=n) for n in (50, 2, 21)]
    others = [random_tokens(n, vocab_size, seed=n) for n in (1, 40)]
    with open_cache(model, 12) as cache:
        expected = run(model, cache, [cache.acquire() for _ in prompts], prompts)
        wanted = [cache.acquire() for _ in others]
        run(model, cache, wanted, others)
        slots = [cache.acquire() for _ in prompts]
        if together != "completed":
            prefill(fused, cache, slots, [prompt[:-1] for prompt in prompts])
        cache.ensure_batch(slots, [len(prompt) for prompt in prompts])
        batch = decode_batch(cache, slots, [len(prompt) - 1 for prompt in prompts])
        residual = fused.embedding[torch.tensor([prompt[-1] for prompt in prompts], device=device)]
        other = [cache.acquire() for _ in others]
        if together:
            passing, parts = list(other), list(others)
            if together == "completed":
                passing, parts = passing + slots, parts + [prompt[:-1] for prompt in prompts]
            lengths = [len(each) for each in parts]
            cache.ensure_batch(other, lengths[: len(others)])
            tokens = torch.tensor([token for each in parts for token in each], device=device)
            packed = AttentionBatch.build(passing, lengths, lengths, cache.device)
            if together == "fixed":
                packed = fixed_batch(cache, other, others, lengths)
                tokens = packed.tokens
            with cache.step([*slots, *other]), torch.inference_mode():
                got = fused.prefill_and_decode(tokens, packed, get("sdpa"), residual, batch, get("reference"), cache)
        else:
            prefill(fused, cache, other, others)
            with cache.step(slots), torch.inference_mode():
                got = fused.decode(residual, batch, cache, get("sdpa"))
        torch.testing.assert_close(got.cpu(), expected, rtol=2e-4, atol=2e-5)
        for slot, same in zip(other, wanted, strict=True):
            for layer in range(model.config.num_layers):
                for rows, as_eager in zip(cache.rows(slot, layer), cache.rows(same, layer), strict=True):
                    torch.testing.assert_close(rows, as_eager, rtol=2e-4, atol=2e-5)
        cache.check_integrity()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash-attn-3", "torch-varlen"])
def test_a_captured_pass_of_fixed_size(backend: str) -> None:
    """One graph for passes of all sizes that it holds: chunks of prompts that have rows already, and decode rows."""
    attention = get(backend)
    if reason := attention.supports(torch.device("cuda"), torch.bfloat16, 64):
        pytest.skip(reason)
    shape = replace(SMALL, num_heads=8, num_kv_heads=2, head_dim=64)
    model = Llama.random(shape, seed=0, std=0.1).to("cuda", torch.bfloat16)
    fused, vocab_size = model.runtime(), model.config.vocab_size
    over_read = {"over_read_tokens": attention.over_read_tokens, "over_read_masked": attention.masks_over_read}
    with KVCache(model.kv_layout(), 16, "cuda", 256 << 20, **over_read) as cache, torch.inference_mode():
        spare = cache.acquire()
        cache.ensure(spare, 1)
        fixed = PromptBatch(256, 7, cache.layout.max_seq_len, cache.device)
        decode = decode_batch(cache, [spare] * 4, [0] * 4)
        residual = torch.zeros(4, model.config.hidden_size, dtype=torch.bfloat16, device="cuda")
        stream, graph, logits = torch.cuda.Stream(), torch.cuda.CUDAGraph(), None

        def launch() -> torch.Tensor:
            every = (fixed.tokens, fixed, attention, residual.clone(), decode, get("triton-decode"), cache)
            return fused.prefill_and_decode(*every)

        for seed, (computed, new) in enumerate([((0, 0), (100, 3)), ((0, 17, 96), (120, 1, 2)), ((130,), (256,))]):
            tokens = [random_tokens(before + n, vocab_size, seed=seed) for before, n in zip(computed, new, strict=True)]
            found = []
            for captured in (False, True):
                slots = [cache.acquire() for _ in tokens]
                for slot, each, before in zip(slots, tokens, computed, strict=True):
                    if before:
                        prefill(fused, cache, [slot], [each[:before]], backend)
                cache.ensure_batch(slots, [len(each) + 1 for each in tokens])
                rows = [len(each) for each in tokens]
                padded = 4 - len(slots)
                decode.slots_int32.copy_(torch.tensor(slots + [spare] * padded))
                decode.rows_int32.copy_(torch.tensor(rows + [0] * padded))
                decode.ends_int32.copy_(decode.rows_int32 + 1)
                residual.copy_(fused.embedding[torch.arange(4, device="cuda")])
                parts = [each[before:] for each, before in zip(tokens, computed, strict=True)]
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream), cache.step(slots):
                    if captured:
                        fixed.fill(slots, parts, rows, spare)
                        if logits is None:
                            launch()
                            with torch.cuda.graph(graph, stream=stream):
                                logits = launch()
                        graph.replay()
                        of_pass = logits
                    else:
                        packed = AttentionBatch.build(slots, new, rows, cache.device)
                        ids = torch.tensor([token for part in parts for token in part], device="cuda")
                        of_pass = fused.prefill_and_decode(
                            ids, packed, attention, residual.clone(), decode, get("triton-decode"), cache
                        )
                torch.cuda.synchronize()
                kept = [of_pass[: len(slots)].float().flatten()]
                kept += [cache.rows(slot, 1)[i].float().flatten() for slot in slots for i in (0, 1)]
                found.append(torch.cat(kept))
                for slot in slots:
                    cache.release(slot)
            assert all(each.isfinite().all() for each in found)
            assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()
        cache.check_integrity()


def test_what_a_pass_refuses(device: str) -> None:
    model = small_model().to(device)
    fused = FusedLlama(model, 40)
    with open_cache(model) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 64)

        def passing(num_tokens: int, end: int, starts: tuple[int, ...] | None = None) -> None:
            batch = AttentionBatch((slot,), (3,), (end,), cache.device, starts)
            fused.prefill(torch.zeros(num_tokens, dtype=torch.int64, device=device), batch, cache, get("sdpa"))

        with pytest.raises(ConfigError, match="padding"):
            passing(3, 3, (5,))
        with pytest.raises(ConfigError, match=r"3 new tokens, got a tensor of shape \[4\]"):
            passing(4, 3)
        with pytest.raises(ConfigError, match="row 40 is beyond the model's context of 40"):
            passing(3, 41)
        passing(3, 40)


def test_the_runtime_s_own_description(device: str) -> None:
    model = small_model().to(device)
    fused = model.runtime(100)
    assert (fused.device, fused.dtype, fused.max_seq_len) == (model.device, model.dtype, 100)
    assert repr(fused.kv_layout()) == repr(model.kv_layout(100))
    assert repr(fused.kv_layout(60, torch.bfloat16, "layer")) == repr(model.kv_layout(60, torch.bfloat16, "layer"))
    assert model.runtime().max_seq_len == model.config.max_position_embeddings
    assert model.runtime().ops.name == FusedLlama(model).ops.name
