"""Attention written out: the oracle that every other backend is tested against."""

from __future__ import annotations

import torch

from .base import LEFT_PADDING, SINKS, SOFTCAP, Backend
from .batch import AttentionBatch

__all__ = ["ReferenceAttention"]


class ReferenceAttention(Backend):
    """Scores, mask, softmax and weighted sum as the formula says, in float32 (float64 when the inputs are).

    Materialises the scores of one sequence at a time, ``[num_heads, query_len, seq_len]``: for tests, not for speed.
    """

    name = "reference"
    features = frozenset({LEFT_PADDING, SOFTCAP, SINKS})
    capturable = False
    optimised = False

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
        compute_dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
        for i, (slot, query_len, seq_len) in enumerate(zip(batch.slots, batch.query_lens, batch.seq_lens, strict=True)):
            tokens = slice(batch.query_starts[i], batch.query_starts[i + 1])
            group = q.shape[1] // k.shape[2]
            queries = q[tokens].to(compute_dtype)
            keys = k[slot, batch.rows[i]].to(compute_dtype).repeat_interleave(group, dim=1)
            values = v[slot, batch.rows[i]].to(compute_dtype).repeat_interleave(group, dim=1)

            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            query_rows = torch.arange(seq_len - query_len, seq_len, device=q.device)[:, None]
            key_rows = torch.arange(seq_len, device=q.device)[None, :]
            hidden = key_rows > query_rows
            if window is not None:
                hidden |= key_rows <= query_rows - window
            scores = scores.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                sink = sinks.to(compute_dtype)[:, None, None].expand(-1, query_len, 1)
                scores = torch.cat([scores, sink], dim=-1)
            probabilities = scores.softmax(dim=-1)[..., :seq_len]
            out[tokens] = torch.einsum("hqk,khd->qhd", probabilities, values).to(q.dtype)
        return out
