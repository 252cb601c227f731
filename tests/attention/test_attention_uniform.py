"""Decode steps whose sequences are equally long, and sequences whose rows lie gigabytes apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from vattn import KVCache, KVLayout
from vattn.attention import (
    AttentionBackend,
    AttentionBatch,
    DecodeBatch,
    Needs,
    decode_backends,
    get,
    reason_against,
)

NAN = float("nan")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def test_rectangle() -> None:
    def of(slots, query_lens, seq_lens, starts=None, window=None):
        batch = AttentionBatch(tuple(slots), tuple(query_lens), tuple(seq_lens), torch.device("cpu"), starts)
        return batch.decode_rectangle(window)

    assert of([2, 3, 4], [1, 1, 1], [9, 9, 9]) == (slice(2, 5), slice(0, 9))
    assert of([2], [1], [9], window=4) == (slice(2, 3), slice(5, 9))
    assert of([2], [1], [3], window=4) == (slice(2, 3), slice(0, 3))
    assert of([2, 4], [1, 1], [9, 9]) is None
    assert of([3, 2], [1, 1], [9, 9]) is None
    assert of([2, 3], [1, 1], [9, 8]) is None
    assert of([2, 3], [1, 2], [9, 9]) is None
    assert of([2, 3], [2, 2], [9, 9]) is None
    assert of([2, 3], [1, 1], [9, 9], starts=(0, 1)) is None
    slots, rows, ends = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([2, 3], [8, 8], [9, 9]))
    assert DecodeBatch(slots, rows, ends, 16).decode_rectangle(None) is None  # the next replay has other lengths


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "v_head_dim"),
    [(4, 4, 64, 64), (12, 3, 80, 80), (7, 1, 40, 40), (8, 2, 24, 16), (6, 2, 36, 36)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdpa", "torch-varlen"])
def test_against_float64(
    name: str, heads: int, kv_heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: str
) -> None:
    """Of neighbouring slots, which are read as one rectangle."""
    needs = Needs(torch.device(device), dtype, frozenset({head_dim, v_head_dim}))
    if reason := reason_against(get(name), needs):
        pytest.skip(reason)
    torch.manual_seed(heads)
    for size, rows in ((1, 1), (3, 17), (2, 129)):
        batch = AttentionBatch.build(range(1, 1 + size), [1] * size, [rows] * size, device)
        assert batch.decode_rectangle(None) is not None
        q = torch.randn(size, heads, head_dim, device=device).to(dtype)
        memory = torch.full((size + 2, rows + 3, kv_heads, head_dim + v_head_dim), NAN, device=device, dtype=dtype)
        memory[1:-1, :rows].normal_()
        k, v = memory.split((head_dim, v_head_dim), dim=-1)
        out = get(name)(q, k, v, batch, scale=0.3)
        keys, values = (x[1:-1, :rows].double().repeat_interleave(heads // kv_heads, 2) for x in (k, v))
        weights = (torch.einsum("shd,snhd->shn", q.double(), keys) * 0.3).softmax(-1)
        wanted = torch.einsum("shn,snhd->shd", weights, values)
        assert (out.shape, out.dtype) == (wanted.shape, dtype)
        torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("backend", decode_backends(), ids=lambda backend: backend.name)
def test_sequences_far_apart(
    backend: AttentionBackend, uniform: bool, device: str, make_cache: Callable[..., KVCache]
) -> None:
    """Llama-3.1-8B's K and V for 131,072 tokens: from one slot to the next are 2**33 elements."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if reason := backend.supports(torch.device(device), dtype, 128):
        pytest.skip(reason)
    layout = KVLayout(32, 8, 128, max_seq_len=131072, dtype=dtype)
    cache = make_cache(layout, 3, device, memory_limit=2**30, over_read_tokens=backend.over_read_tokens)
    slots = [cache.acquire() for _ in range(3)]
    lengths = [40, 40, 40] if uniform else [40, 23, 37]
    cache.ensure_batch(slots, lengths)
    torch.manual_seed(4)
    for slot in slots:
        for rows in cache.rows(slot, 31):
            rows.normal_()
    assert cache.k(31).stride(0) >= 2**33
    q = torch.randn(3, 32, 128, device=device).to(dtype)
    with cache.step(slots):
        batch = AttentionBatch.build(slots, [1, 1, 1], lengths, device)
        out = backend(q, cache.k(31), cache.v(31), batch, scale=0.1)
    k, v = (
        pad_sequence([cache.rows(slot, 31)[i].float() for slot in slots], batch_first=True)  # no row that is not mapped
        for i in range(2)
    )
    wanted = get("reference")(q.float(), k, v, batch, scale=0.1)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), wanted, rtol=tolerance, atol=tolerance)
