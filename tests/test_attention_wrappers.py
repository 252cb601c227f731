"""What the FlashAttention backends hand to their kernels, with stand-ins for the kernels that run anywhere.

The stand-ins have the signatures of flash-attn 2.8.3, FlashAttention-3 and torch 2.11, and refuse keywords beyond them.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from test_attention import LENGTHS, make_case

from vattn.attention import AttentionBatch, get
from vattn.errors import ConfigError


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window_size: tuple[int, int]
) -> torch.Tensor:
    """One sequence, causal and right-aligned: q ``[n, heads, d]``, k and v ``[m, kv_heads, d]``."""
    left, right = window_size
    assert right == (-1 if left == -1 else 0)
    batch = AttentionBatch.build([0], [len(q)], [len(k)], q.device)
    return get("reference")(q, k[None], v[None], batch, scale=scale, window=None if left == -1 else left + 1)


def kvcache_2(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """q ``[batch, query_len, heads, dim]``."""
    assert causal
    assert len(q) == len(cache_seqlens) == len(cache_batch_idx)
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
    sequences = zip(q, cache_batch_idx.tolist(), cache_seqlens.tolist(), strict=True)
    return torch.stack(
        [attend(x, k_cache[slot, :n], v_cache[slot, :n], softmax_scale, window_size) for x, slot, n in sequences]
    )


def kvcache_3(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    **common: object,
) -> torch.Tensor:
    """As above, or packed q ``[tokens, heads, dim]`` with ``cu_seqlens_q``."""
    if cu_seqlens_q is None:
        assert max_seqlen_q is None
        return kvcache_2(q, k_cache, v_cache, **common)  # type: ignore[arg-type]
    lengths = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max(lengths)
    seqlens, slots = common.pop("cache_seqlens"), common.pop("cache_batch_idx")
    assert isinstance(seqlens, torch.Tensor)
    assert isinstance(slots, torch.Tensor)
    parts = zip(q.split(lengths), seqlens[:, None], slots[:, None], strict=True)
    return torch.cat(
        [
            kvcache_2(x[None], k_cache, v_cache, cache_seqlens=n, cache_batch_idx=slot, **common)[0]  # type: ignore[arg-type]
            for x, n, slot in parts
        ]
    )


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    seqused_k: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    """Packed q, flat k and v, as torch's kernel reads them."""
    assert (dropout_p, is_causal, return_debug_mask) == (0.0, True, False)
    lengths = cum_seq_q.diff().tolist()
    assert (max_q, max_k) == (max(lengths), int(seqused_k.max()))
    assert len(cum_seq_k) == len(cum_seq_q) == len(seqused_k) + 1
    assert cum_seq_q.dtype == cum_seq_k.dtype == seqused_k.dtype == torch.int32
    window_size = (window_size_left, window_size_right)
    parts = zip(query.split(lengths), cum_seq_k.tolist(), seqused_k.tolist(), strict=False)
    return torch.cat(
        [attend(x, key[first : first + n], value[first : first + n], scale, window_size) for x, first, n in parts]
    ), None


@pytest.fixture(params=["flash-attn-2", "flash-attn-3", "torch-varlen"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for module_name, function in (("flash_attn", kvcache_2), ("flash_attn_interface", kvcache_3)):
        module = ModuleType(module_name)
        module.flash_attn_with_kvcache = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module_name, module)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", varlen)
    return request.param


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("lengths", [*(name for name in LENGTHS if name != "long chunk"), "equal chunks"])
def test_kernels_are_given_the_right_rows(name: str, lengths: str, window: int | None) -> None:
    query_lens, seq_lens = LENGTHS.get(lengths, ([4, 4], [4, 31]))
    q, k, v, batch = make_case(query_lens, seq_lens, num_heads=6, num_kv_heads=2, head_dim=16)
    expected = get("reference")(q, k, v, batch, scale=0.3, window=window)
    out = get(name)(q, k, v, batch, scale=0.3, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_v_heads_of_another_size_are_refused(name: str) -> None:
    q, k, v, batch = make_case([1], [9], num_heads=2, num_kv_heads=2, head_dim=16, v_head_dim=8)
    with pytest.raises(ConfigError, match=rf"{name} needs K and V heads of one size, got 16 and 8"):
        get(name)(q, k, v, batch, scale=1.0)
