"""Decode steps whose sequences are equally long, and sequences whose rows lie gigabytes apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from vattn import KVCache, KVLayout
from vattn.attention import AttentionBackend, AttentionBatch, DecodeBatch, decode_backends, get, uniform_decode

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
def test_against_float64(
    heads: int, kv_heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(heads)
    decode = uniform_decode(torch.device(device), dtype, head_dim, v_head_dim)
    on_gpu = device == "cuda"
    if head_dim != v_head_dim or (on_gpu and (dtype == torch.float32 or head_dim % 8)):
        assert decode is None
        return
    for batch, rows in ((1, 1), (3, 17), (2, 129)):
        q = torch.randn(batch, 1, heads, head_dim, device=device).to(dtype).transpose(1, 2)
        memory = torch.full((batch, rows + 3, kv_heads, head_dim + v_head_dim + 8), NAN, device=device, dtype=dtype)
        memory[:, :rows].normal_()
        k = memory[:, :rows, :, :head_dim].transpose(1, 2)
        v = memory[:, :rows, :, head_dim : head_dim + v_head_dim].transpose(1, 2)
        for scale in (None, 0.3):
            out = decode(q, k, v, scale)
            keys, values = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            scores = q.double() @ keys.transpose(2, 3) * (head_dim**-0.5 if scale is None else scale)
            assert out.shape == (batch, heads, 1, v_head_dim)
            assert out.dtype == dtype
            torch.testing.assert_close(
                out.double(), scores.softmax(-1) @ values, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )


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
