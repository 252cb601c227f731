"""The fused step's logits in bfloat16: as good as eager bfloat16, both against float32. With every kind of kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.llama import random_tokens, run

from vattn import KVCache
from vattn.attention import DecodeBatch, TritonDecodeAttention, bind, get
from vattn.models import FusedLlama, Llama, LlamaConfig
from vattn.models.fused_llama import products
from vattn.ops.ops_table import LinearTable, Ops, fused_ops, reference_ops
from vattn.ops.skinny_linear import LinearConfig

pytestmark = pytest.mark.gpu
CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=1100,  # no whole number of tiles
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
PROMPT, STEPS = 40, 12


def tables(config: LlamaConfig) -> dict[str, Ops]:
    """A skinny kernel for every product, cut in different ways, with and without dependent launch."""
    found = {"reference": reference_ops(), "cublas": fused_ops()}
    for name, dot, splits, pdl in (
        ("multiply-add", False, 2, False),
        ("multiply-add, dependent", False, 1, True),
        ("tensor cores", True, 4, False),
        ("tensor cores, dependent", True, 2, True),
    ):
        entries = {}
        for outputs, inputs, kind in products(config):
            parts = splits if kind == "plain" else 1
            tile = LinearConfig(32, 64, parts, 4, 3) if dot else LinearConfig(4, 256, parts, 4, 1, dot=False)
            entries[outputs, inputs, kind == "swiglu"] = {8: tile}
        found[name] = fused_ops(LinearTable(entries, pdl))
    return found


@torch.inference_mode()
def forced(model: Llama, ops: Ops | None, tokens: list[list[int]], attention: str = "triton-decode") -> torch.Tensor:
    """Logits of a fixed text after a prompt of each sequence: ``[steps, batch, vocab]``; eager without ``ops``."""
    batch = len(tokens)
    backend = get(attention)
    with KVCache(
        model.kv_layout(128),
        batch,
        model.device,
        memory_limit=1 << 28,
        over_read_tokens=backend.over_read_tokens,
        over_read_masked=backend.masks_over_read,
    ) as cache:
        slots = [cache.acquire() for _ in tokens][::-1]
        prompts = [row[: PROMPT + i] for i, row in enumerate(tokens)]  # of different lengths
        run(model, cache, slots, prompts)
        logits = []
        if ops is None:
            for step in range(STEPS):
                news = [[row[len(p) + step]] for row, p in zip(tokens, prompts, strict=True)]
                logits.append(run(model, cache, slots, news))
            return torch.stack(logits)
        fused = FusedLlama(model, 128, ops=ops)
        cache.ensure_batch(slots, [len(prompt) + STEPS for prompt in prompts])
        index = torch.tensor(slots, dtype=torch.int32, device="cuda")
        rows = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device="cuda")
        ends = rows + 1
        decode_batch = DecodeBatch(index, rows, ends, 128)
        if isinstance(backend, TritonDecodeAttention):
            backend = replace(backend, pdl=ops.name == "fused", splits=3)
        backend = bind(backend)
        for step in range(STEPS):
            new = torch.tensor([row[len(p) + step] for row, p in zip(tokens, prompts, strict=True)], device="cuda")
            logits.append(fused.decode(fused.embedding[new], decode_batch, cache, backend).float().cpu())
            rows += 1
            ends += 1
        return torch.stack(logits)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_within_twice_the_error_of_eager(batch):
    tokens = [random_tokens(PROMPT + 8 + STEPS, CONFIG.vocab_size, seed) for seed in range(batch)]
    exact = forced(Llama.random(CONFIG, std=0.06, device="cuda"), None, tokens)
    model = Llama.random(CONFIG, std=0.06, device="cuda").to(torch.bfloat16)
    allowed = (forced(model, None, tokens).float() - exact).abs()
    top = exact.topk(2).values
    clear = top[..., 0] - top[..., 1] > 2 * allowed.max()
    assert clear.any()
    for name, ops in tables(CONFIG).items():
        if name.startswith("multiply") and batch > 1:
            continue
        got = forced(model, ops, tokens)
        error = (got - exact).abs()
        assert error.max() <= 2 * allowed.max(), name
        assert error.mean() <= 1.5 * allowed.mean(), name
        assert torch.equal(got.argmax(-1)[clear], exact.argmax(-1)[clear]), name


@pytest.mark.parametrize("attention", ["triton-decode", "flash-attn-2", "flash-attn-3", "torch-varlen"])
def test_every_attention(attention):
    if reason := get(attention).supports(torch.device("cuda"), torch.bfloat16, 64):
        pytest.skip(reason)
    tokens = [random_tokens(PROMPT + 8 + STEPS, CONFIG.vocab_size, seed) for seed in range(4)]
    exact = forced(Llama.random(CONFIG, std=0.06, device="cuda"), None, tokens)
    model = Llama.random(CONFIG, std=0.06, device="cuda").to(torch.bfloat16)
    allowed = (forced(model, None, tokens).float() - exact).abs()
    top = exact.topk(2).values
    clear = top[..., 0] - top[..., 1] > 2 * allowed.max()
    assert clear.any()
    got = forced(model, fused_ops(), tokens, attention)
    error = (got - exact).abs()
    assert error.max() <= 2 * allowed.max()
    assert error.mean() <= 1.5 * allowed.mean()
    assert torch.equal(got.argmax(-1)[clear], exact.argmax(-1)[clear])
