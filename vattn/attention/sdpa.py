"""torch.nn.functional.scaled_dot_product_attention, mostly one sequence at a time: runs wherever torch does."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import LEFT_PADDING, Backend
from .batch import AttentionBatch

__all__ = ["SdpaAttention"]

# Queries that need an explicit mask are taken in blocks of this many, so that a 128 k context costs a mask of 64 MiB a
# query head of the group and not of 16 GiB. A block also reads only the keys that its last query sees.
MASKED_QUERY_BLOCK = 512


class SdpaAttention(Backend):
    """Reads ``k[slot, :seq_len]`` and nothing else, through a view: K and V are not gathered.

    Query heads that share a KV head are laid out as further queries where the mask allows it (decode, and every masked
    block), so K and V are not repeated for them either; torch's own ``enable_gqa`` repeats them on some paths.
    """

    name = "sdpa"
    features = frozenset({LEFT_PADDING})
    capturable = False

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`vattn.attention.AttentionBackend`."""
        assert softcap is None, "declared in features"
        assert sinks is None, "declared in features"
        # In one call where that copies nothing: the CPU's kernel takes heads of one size, as they lie.
        if q.device.type == "cpu" and k.shape[3] == v.shape[3] and (part := batch.decode_rectangle(window)) is not None:
            return folded_decode(q.unsqueeze(2), k[part].transpose(1, 2), v[part].transpose(1, 2), scale).squeeze(2)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
        for i, (slot, query_len, seq_len) in enumerate(zip(batch.slots, batch.query_lens, batch.seq_lens, strict=True)):
            start = batch.query_starts[i]
            # is_causal is aligned to the top left, so it is right only for a whole prefill.
            if 1 < query_len == seq_len and (window is None or seq_len <= window):
                tokens = slice(start, start + query_len)
                out[tokens] = _whole(q[tokens], k[slot, batch.rows[i]], v[slot, batch.rows[i]], scale)
                continue
            first_row = batch.rows[i].start
            past = seq_len - query_len
            for first in range(0, query_len, MASKED_QUERY_BLOCK):
                last = min(first + MASKED_QUERY_BLOCK, query_len)
                tokens = slice(start + first, start + last)
                oldest = max(0, past + first - window + 1) if window is not None else 0
                rows = slice(first_row + oldest, first_row + past + last)
                out[tokens] = _right_aligned(q[tokens], k[slot, rows], v[slot, rows], scale, window)
        return out


def folded_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Equally long sequences: q ``[batch, heads, 1, head_dim]``, k and v ``[batch, kv_heads, rows, head_dim]`` of any
    strides. Query heads that share a KV head become further queries."""
    batch, num_heads, _, head_dim = q.shape
    folded = q.reshape(batch, k.shape[1], -1, head_dim)
    return F.scaled_dot_product_attention(folded, k, v, scale=scale).reshape(batch, num_heads, 1, -1)


def _whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Prefill from the first row: q ``[n, heads, d]``, k and v ``[n, kv_heads, d]`` -> ``[n, heads, d]``."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _right_aligned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """The last n of m rows as queries: q ``[n, heads, d]``, k and v ``[m, kv_heads, d]`` -> ``[n, heads, v_d]``."""
    query_len, num_heads, head_dim = q.shape
    num_rows, num_kv_heads, v_head_dim = v.shape
    # [n, kv_heads, group, d] -> [kv_heads, n * group, d]: the heads of a group become neighbouring queries.
    folded = q.reshape(query_len, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    mask = None
    if query_len > 1:  # a single query sees every row it is given
        query_rows = torch.arange(num_rows - query_len, num_rows, device=q.device)[:, None]
        key_rows = torch.arange(num_rows, device=q.device)[None, :]
        mask = key_rows <= query_rows
        if window is not None:
            mask &= key_rows > query_rows - window
        mask = mask.repeat_interleave(num_heads // num_kv_heads, dim=0)
    out = F.scaled_dot_product_attention(
        folded[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=mask, scale=scale
    )
    return out[0].reshape(num_kv_heads, query_len, -1, v_head_dim).transpose(0, 1).reshape(query_len, num_heads, -1)
