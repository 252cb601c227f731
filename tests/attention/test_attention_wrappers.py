"""What the FlashAttention backends hand to their kernels, with stand-ins for the kernels that run anywhere.

The stand-ins have the signatures of flash-attn 2.8.3, FlashAttention-3 and torch 2.11, and refuse keywords beyond them.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from test_attention import LENGTHS, make_case
from test_attention_features import FEATURES
from test_attention_features import LENGTHS as FEATURE_LENGTHS
from test_attention_features import make_case as make_feature_case

from vattn.attention import AttentionBatch, get
from vattn.errors import ConfigError


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window_size: tuple[int, int],
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, causal and right-aligned: q ``[n, heads, d]``, k and v ``[m, kv_heads, d]`` -> as q, ``[heads, n]``

    The logarithm of the sum of exponentials is read off a constant V under a sink of zero: the sink's share of the
    softmax is 1 / (1 + sum).
    """
    left, right = window_size
    assert right == (-1 if left == -1 else 0)
    batch = AttentionBatch.build([0], [len(q)], [len(k)], q.device)
    options = {"scale": scale, "window": None if left == -1 else left + 1, "softcap": softcap or None}
    out = get("reference")(q, k[None], v[None], batch, **options)
    ones = torch.ones_like(v[None], dtype=torch.float64)
    share = get("reference")(q.double(), k[None], ones, batch, sinks=torch.zeros(q.shape[1]), **options)[..., 0]
    return out, (share / (1 - share)).log().float().T


def kvcache_2(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_softmax_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q ``[batch, query_len, heads, dim]``; lse ``[batch, heads, query_len]``."""
    assert causal
    assert len(q) == len(cache_seqlens) == len(cache_batch_idx)
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
    starts = torch.zeros_like(cache_seqlens) if cache_leftpad is None else cache_leftpad
    assert starts.dtype == torch.int32
    sequences = zip(q, cache_batch_idx.tolist(), starts.tolist(), cache_seqlens.tolist(), strict=True)
    done = [
        attend(x, k_cache[slot, start:end], v_cache[slot, start:end], softmax_scale, window_size, softcap)
        for x, slot, start, end in sequences
    ]
    out, lse = (torch.stack(each) for each in zip(*done, strict=True))
    return (out, lse) if return_softmax_lse else out


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
    starts, with_lse = common.pop("cache_leftpad"), common.pop("return_softmax_lse")
    starts = torch.zeros_like(seqlens) if starts is None else starts
    parts = zip(q.split(lengths), seqlens[:, None], slots[:, None], starts[:, None], strict=True)
    done = [
        kvcache_2(
            x[None],
            k_cache,
            v_cache,
            cache_seqlens=n,
            cache_batch_idx=slot,
            cache_leftpad=start,
            return_softmax_lse=True,
            **common,  # type: ignore[arg-type]
        )
        for x, n, slot, start in parts
    ]
    out = torch.cat([out[0] for out, _ in done])
    return (out, torch.cat([lse[0] for _, lse in done], dim=1)) if with_lse else out


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed q, flat k and v, as torch's kernel reads them; lse ``[heads, tokens]``."""
    assert (dropout_p, is_causal, return_debug_mask) == (0.0, True, False)
    lengths = cum_seq_q.diff().tolist()
    assert (max_q, max_k) == (max(lengths), int(seqused_k.max()))
    assert len(cum_seq_k) == len(cum_seq_q) == len(seqused_k) + 1
    assert cum_seq_q.dtype == cum_seq_k.dtype == seqused_k.dtype == torch.int32
    window_size = (window_size_left, window_size_right)
    parts = zip(query.split(lengths), cum_seq_k.tolist(), seqused_k.tolist(), strict=False)
    done = [attend(x, key[first : first + n], value[first : first + n], scale, window_size) for x, first, n in parts]
    return torch.cat([out for out, _ in done]), torch.cat([lse for _, lse in done], dim=1)


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


@pytest.mark.parametrize("lengths", FEATURE_LENGTHS)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_kernels_are_given_what_they_support(name: str, features: set[str], lengths: str) -> None:
    if not features <= get(name).features:
        pytest.skip(f"{name} supports {sorted(get(name).features)}")
    q, k, v, batch, options = make_feature_case(lengths, features, torch.float32, "cpu")
    expected = get("reference")(q, k, v, batch, window=6, **options)
    torch.testing.assert_close(get(name)(q, k, v, batch, window=6, **options), expected, rtol=1e-5, atol=1e-5)


def test_v_heads_of_another_size_are_refused(name: str) -> None:
    q, k, v, batch = make_case([1], [9], num_heads=2, num_kv_heads=2, head_dim=16, v_head_dim=8)
    with pytest.raises(ConfigError, match=rf"{name} needs K and V heads of one size, got 16 and 8"):
        get(name)(q, k, v, batch, scale=1.0)
