"""Decode attention of a QKV product: rotary embedding, the append of K and V, and attention in one kernel."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError
from ..ops.rope_append import require_angles
from ..ops.triton_support import require_triton
from .base import AttentionBackend
from .batch import AttentionBatch
from .triton_decode import TritonDecodeAttention

__all__ = ["rope_attention", "rope_decode"]

# From so many sequences on, one kernel takes less time than two: an 8B step at 1,024 tokens gains 2.6 % on an H200 at
# 8, and loses 0.8 % at 2, where each of many splits would rotate the same queries. One sequence gains 1.5 % by early
# reads, and nothing without them.
MIN_SEQUENCES = 4


def rope_attention(
    parts: list[tuple[AttentionBatch, AttentionBackend]], early: bool = False
) -> TritonDecodeAttention | None:
    """What ``rope_decode`` computes a pass with, where it can and takes less time than ``rope_append`` and attention.

    Args:
        parts: (batch, attention) of all tokens in order.
        early: the caller can promise what ``rope_decode`` asks of early reads.
    """
    batch, attention = parts[0]
    if len(parts) != 1 or not isinstance(attention, TritonDecodeAttention):
        return None
    gains = batch.batch_size >= MIN_SEQUENCES or (early and attention.pdl and batch.batch_size == 1)
    return attention if gains else None


def rope_decode(
    attention: TritonDecodeAttention,
    qkv: torch.Tensor,
    table: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    batch: AttentionBatch,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    early: bool = False,
) -> torch.Tensor:
    """``rope_append`` and then ``attention``, as one kernel, with a second one that combines where it does.

    Args:
        attention: its tiles, splits and workspaces.
        qkv, table, q_norm, k_norm, eps, norm_offset, interleaved: as for ``rope_append``; the last axis of ``qkv``
            is contiguous.
        k, v, batch, scale, window, softcap, sinks: as for ``attention``; heads of K and V are equally large.
        early: read the first block of older rows before the kernel before this one has ended. That one must have
            begun after all writes to the cache's older rows, to the batch's tensors and to ``table`` had ended.

    Returns:
        ``[batch_size, num_heads, head_dim]`` in the cache's dtype.

    Raises:
        ConfigError: a sequence has several new tokens; tensors and angles as for ``rope_append``.
    """
    from .rope_decode_kernels import rope_decode_kernel

    if batch.max_query_len != 1:
        raise ConfigError(f"rope_decode computes one new token of each sequence, got up to {batch.max_query_len}")
    require_triton(qkv, k, v)
    head_dim = k.shape[3]
    require_angles(table, qkv.shape[-2], head_dim)
    num_heads = qkv.shape[-1] // head_dim - 2 * k.shape[2]
    cos, sin = table if isinstance(table, tuple) else table.unbind(1)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    out = qkv.new_empty(batch.batch_size, num_heads, head_dim, dtype=k.dtype)
    own = {
        "qkv_ptr": qkv,
        "cos_ptr": cos,
        "sin_ptr": sin,
        "q_norm_ptr": qkv if q_norm is None else q_norm,
        "k_norm_ptr": qkv if k_norm is None else k_norm,
        "qkv_stride": qkv.stride(-2),
        "qkv_split_stride": qkv.stride(0) if qkv.dim() == 3 else 0,
        "angles_stride": cos.stride(0),
        "angle_stride": cos.stride(1),
        "eps": eps,
        "offset": norm_offset,
        "HALF": cos.shape[1],
        "BY_ROW": not isinstance(table, tuple),
        "INTERLEAVED": interleaved,
        "QKV_SPLITS": qkv.shape[0] if qkv.dim() == 3 else 1,
        "Q_NORM": q_norm is not None,
        "K_NORM": k_norm is not None,
        "EARLY": early,
    }
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    attention.launch(rope_decode_kernel, own, k, v, batch, out, new_rows=1, **options)
    return out
