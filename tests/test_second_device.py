"""Everything on the second GPU, while the first is current."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.decode import by_slot, eager, prefill, prompts_for
from helpers.llama import open_cache, small_model

from vattn import KVCache, KVLayout
from vattn.attention import AttentionBackend, AttentionBatch, backends, decode_backends, get
from vattn.decode.loop import DecodeLoop
from vattn.models import FusedLlama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SECOND = torch.device("cuda:1")


@pytest.fixture(autouse=True)
def first_is_current() -> Iterator[None]:
    with torch.cuda.device(0):
        yield
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backend", [*backends(), *decode_backends()], ids=lambda backend: backend.name)
def test_attention(backend: AttentionBackend) -> None:
    dtype = torch.bfloat16
    if reason := backend.supports(SECOND, dtype, 128):
        pytest.skip(reason)
    layout = KVLayout(2, 8, 128, max_seq_len=4096, dtype=dtype)
    margin = {"over_read_tokens": backend.over_read_tokens, "over_read_masked": backend.masks_over_read}
    with KVCache(layout, 3, SECOND, **margin) as cache:
        slots = [cache.acquire() for _ in range(3)]
        lengths = [900, 17, 1025]
        cache.ensure_batch(slots, lengths)
        torch.manual_seed(0)
        for slot in slots:
            for rows in cache.rows(slot, 1):
                rows.normal_()
        q = torch.randn(3, 32, 128, device=SECOND, dtype=dtype)
        with cache.step(slots):
            batch = AttentionBatch.build(slots, [1, 1, 1], lengths, SECOND)
            out = backend(q, cache.k(1), cache.v(1), batch, scale=0.1)
        for index, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            k, v = (rows[None, :length].float() for rows in cache.rows(slot, 1))
            alone = AttentionBatch.build([0], [1], [length], SECOND)
            wanted = get("reference")(q[index : index + 1].float(), k, v, alone, scale=0.1)
            torch.testing.assert_close(out[index : index + 1].float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mapping", ["thread", "inline"])
def test_decode_loop(mapping: str) -> None:
    model = small_model().to(SECOND)
    prompts = prompts_for(model, 4)
    expected = eager(model, prompts, 40)
    with open_cache(model, 6) as cache:
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        with DecodeLoop(FusedLlama(model), cache, mapping=mapping) as loop:
            for slot, prompt in zip(slots, prompts, strict=True):
                loop.start(slot, prompt[-1], 40)
            found = by_slot(loop.run())
        assert [tuple(found[slot]) for slot in slots] == expected
        cache.check_integrity()


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-OSS"])
def test_hugging_face(name: str) -> None:
    pytest.importorskip("transformers")
    from helpers.hf_models import make_model, prompt, with_cache

    from vattn.hf import VirtualCache

    model = make_model(name).to(SECOND)
    tokens = prompt(3).to(SECOND)
    wanted = model.generate(tokens, max_new_tokens=20, do_sample=False)
    with VirtualCache(model.config, max_length=64) as past:
        got = model.generate(tokens, max_new_tokens=20, do_sample=False, **with_cache(past))
        assert past.kv_cache.device == SECOND
        past.kv_cache.check_integrity()
    assert torch.equal(got, wanted)
