"""The Llama model against transformers' own, in every way of feeding it tokens."""

from __future__ import annotations

import pytest
import torch
from helpers.llama import (
    SHAPES,
    SMOLLM2_SHAPE,
    hf_llama,
    hf_model_of,
    open_cache,
    random_tokens,
    run,
    same_in_vattn,
    small_model,
)

from vattn.attention import AttentionBatch, get
from vattn.errors import ConfigError
from vattn.memory.tensors import upload
from vattn.models.config import LlamaConfig
from vattn.models.llama import Llama


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.mark.parametrize("order", ["token", "layer"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_logits_equal_transformers(shape: str, order: str) -> None:
    """A whole prompt, the prompt in chunks, and token by token, each against one forward pass of transformers."""
    hf_model = hf_llama(**SHAPES[shape])
    tokens = random_tokens(150, hf_model.config.vocab_size)
    with torch.no_grad():
        expected = hf_model(torch.tensor([tokens])).logits[0]
    model = same_in_vattn(hf_model)
    with open_cache(model, order=order) as cache:
        for sizes in ([150], [40, 1, 64, 45], [1] * 150):
            slot = cache.acquire()
            parts = torch.tensor(tokens).split(sizes)
            got = torch.cat([run(model, cache, [slot], [part.tolist()], all_logits=True) for part in parts])
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)
            cache.check_integrity()


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_a_batch_equals_one_at_a_time(attention: str) -> None:
    """Mixed lengths in one pass, slots in any order, prefill beside decode."""
    model = small_model()
    prompts = [random_tokens(n, 128, seed=n) for n in (1, 37, 5, 90)]
    with open_cache(model) as cache:
        alone = []
        for prompt in prompts:
            slot = cache.acquire()
            alone.append(run(model, cache, [slot], [prompt])[0])
            cache.release(slot)
        slots = [cache.acquire(slot) for slot in (6, 0, 7, 3)]
        together = run(model, cache, slots, prompts, attention=attention)
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)

        late = cache.acquire()  # a prefill in the same pass as three decodes
        mixed = run(
            model, cache, [slots[2], late, slots[0], slots[3]], [[11], prompts[1], [12], [13]], attention=attention
        )
        torch.testing.assert_close(mixed[1], alone[1], rtol=1e-4, atol=1e-5)
        again = cache.acquire()
        whole = run(model, cache, [again], [[*prompts[3], 13]], attention=attention)
        torch.testing.assert_close(mixed[3], whole[0], rtol=1e-4, atol=1e-5)
        cache.check_integrity()


def test_last_logits_are_those_of_all_logits() -> None:
    model = small_model()
    chunks = [random_tokens(n, 128, seed=n) for n in (3, 8)]
    with open_cache(model) as cache:
        every = run(model, cache, [cache.acquire(), cache.acquire()], chunks, all_logits=True)
        last = run(model, cache, [cache.acquire(), cache.acquire()], chunks)
    assert every.shape == (11, 128)
    torch.testing.assert_close(last, every[[2, 10]])


def test_rows_of_padding_are_refused() -> None:
    """They would move every row that is written."""
    model = small_model()
    with open_cache(model) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 8)
        batch = AttentionBatch((slot,), (3,), (3,), model.device, starts=(5,))
        with pytest.raises(ConfigError, match="padding"):
            model(torch.tensor([1, 2, 3]), batch, cache, get("sdpa"))


def test_forked_sequences_go_their_own_ways() -> None:
    """A child that shares its parent's pages continues as if it had computed the prefix itself."""
    model = small_model()
    prompt = random_tokens(70, 128)
    with open_cache(model) as cache:
        parent = cache.acquire()
        run(model, cache, [parent], [prompt])
        child = cache.fork(parent)
        shared = run(model, cache, [child, parent], [[5], [6]])
        for row, token in ((0, 5), (1, 6)):
            alone = run(model, cache, [cache.acquire()], [[*prompt, token]])
            torch.testing.assert_close(shared[row], alone[0], rtol=1e-4, atol=1e-5)
        cache.check_integrity()


def test_random_weights_follow_the_seed() -> None:
    first, same, other = (small_model(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    assert not any(parameter.requires_grad for parameter in small_model().parameters())


def test_layout_follows_the_model() -> None:
    with torch.device("meta"):
        model = Llama(SMOLLM2_SHAPE)
    layout = model.kv_layout(dtype=torch.bfloat16)
    assert (layout.num_layers, layout.max_seq_len, layout.bytes_per_token) == (30, 8192, 30 * 2 * 3 * 64 * 2)
    assert model.kv_layout(100, order="layer").max_seq_len == 100
    assert model.streamed_weight_bytes() == 134_515_008 * 4
    untied = small_model()
    all_weights = sum(parameter.nbytes for parameter in untied.parameters())
    assert untied.streamed_weight_bytes() == all_weights - 128 * 32 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 7}, "even head_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"rope_divisors": (1.0,)}, "rotary divisors"),
    ],
)
def test_impossible_configs(change: dict[str, object], message: str) -> None:
    shape = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**{**shape, **change})  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("order", ["token", "layer"])
def test_smollm2_shape_on_the_gpu(order: str) -> None:
    """Random weights of SmolLM2's shape in float32: GPU pages and SDPA against host pages and the reference."""
    on_host = Llama.random(SMOLLM2_SHAPE, seed=0)
    prompts = [random_tokens(n, 49152, seed=n) for n in (1, 19, 150, 64)]
    with open_cache(on_host, max_seq_len=256) as cache:
        slots = [cache.acquire() for _ in prompts]
        expected = [run(on_host, cache, slots, prompts, attention="reference")]
        chosen = [expected[0].argmax(-1)]
        for _ in range(6):
            expected.append(run(on_host, cache, slots, chosen[-1][:, None].tolist(), attention="reference"))
            chosen.append(expected[-1].argmax(-1))

    on_gpu = on_host.to("cuda")
    with open_cache(on_gpu, order=order, max_seq_len=256) as cache:
        slots = [cache.acquire(slot) for slot in (5, 0, 7, 2)]
        for step, logits in enumerate(expected):
            chunks = prompts if step == 0 else chosen[step - 1][:, None].tolist()
            torch.testing.assert_close(run(on_gpu, cache, slots, chunks), logits, rtol=1e-3, atol=1e-3)
        cache.check_integrity()


@pytest.mark.gpu
@pytest.mark.unsanitized
@pytest.mark.parametrize("name", ["torch-varlen", "flash-attn-2", "flash-attn-3"])
def test_a_pass_does_not_wait_for_the_gpu(name: str) -> None:
    """So that the host can map the next pass's pages meanwhile. The GPU is kept busy and must still be at the end."""
    backend, device = get(name), torch.device("cuda")
    if reason := backend.supports(device, torch.bfloat16, 64):
        pytest.skip(reason)
    model = same_in_vattn(hf_model_of("llama", head_dim=64)).to(device, torch.bfloat16)
    with open_cache(model, attention=backend) as cache, torch.inference_mode():
        slots = [cache.acquire(), cache.acquire()]

        def forward(counts: list[int]) -> torch.Tensor:
            ends = [cache.seq_len(slot) + count for slot, count in zip(slots, counts, strict=True)]
            cache.ensure_batch(slots, ends)
            batch = AttentionBatch.build(slots, counts, ends, device)
            tokens = upload(random_tokens(sum(counts), 100), device, torch.int64)
            with cache.step(slots):
                return model(tokens, batch, cache, backend)

        forward([9, 30])  # loads kernels
        forward([1, 1])
        torch.cuda.synchronize()
        for counts in ([20, 5], [1, 1]):
            busy = torch.cuda.Event()
            torch.cuda._sleep(2_000_000_000)  # cycles: about a second
            busy.record()
            logits = forward(counts)
            assert not busy.query(), f"the pass of {counts} tokens waited for the GPU"
            assert logits.isfinite().all()
