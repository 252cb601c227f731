"""FlashAttention-2 from the package flash-attn: its kernel for KV caches, which splits long contexts over the GPU."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from .base import HALF, LEFT_PADDING, SINKS, SOFTCAP, Backend, apply_sinks, require_equal_head_dims
from .batch import AttentionBatch

__all__ = ["FlashAttention2"]


class FlashAttention2(Backend):
    """``flash_attn.flash_attn_with_kvcache``: one call per group of sequences with equally many new tokens.

    The kernel takes ``q`` as ``[batch, query_len, heads, head_dim]`` without varying lengths, so a decode step is one
    call and a mixed prefill one for each distinct length. Its loads are predicated on ``cache_seqlens``.
    """

    name = "flash-attn-2"
    features = frozenset({LEFT_PADDING, SOFTCAP, SINKS})
    mixed_head_dims = False
    dtypes = HALF
    min_capability = (8, 0)
    # It pads other head sizes by copying K and V: the whole range of addresses.
    head_dim_multiple, max_head_dim = 8, 256

    def unavailable(self) -> str | None:
        return _unavailable()

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
        from flash_attn import flash_attn_with_kvcache

        require_equal_head_dims(self, k, v)
        # The heuristic for the number of splits looks at the view's length, not at the sequences'.
        k, v = k[:, : batch.max_end], v[:, : batch.max_end]
        window_size = (-1, -1) if window is None else (window - 1, 0)

        def attend(
            queries: torch.Tensor, slots: torch.Tensor, ends: torch.Tensor, starts: torch.Tensor | None
        ) -> torch.Tensor:
            out = flash_attn_with_kvcache(
                queries,
                k,
                v,
                cache_seqlens=ends,  # counted from row 0, also where a sequence starts later
                cache_batch_idx=slots,
                cache_leftpad=starts,
                softmax_scale=scale,
                causal=True,
                window_size=window_size,
                softcap=softcap or 0.0,
                return_softmax_lse=sinks is not None,
            )
            if sinks is None:
                return out.squeeze(1) if out.shape[1] == 1 else out.flatten(0, 1)
            out, lse = out  # [sequences, heads, queries]
            return apply_sinks(out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1), sinks)

        if batch.is_uniform:
            queries = q.unsqueeze(1) if batch.max_query_len == 1 else q.unflatten(0, (batch.batch_size, -1))
            return attend(queries, batch.slots_int32, batch.ends_int32, batch.starts_int32)
        out = torch.empty_like(q)
        for group in batch.groups_by_query_len:
            queries = q[group.tokens].unflatten(0, (-1, group.query_len))
            out[group.tokens] = attend(queries, group.slots, group.ends, group.starts)
        return out


@cache
def _unavailable() -> str | None:
    """Why the package cannot be used; imports it, which takes a second, so only where the rest fits."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install flash-attn"
    try:
        from flash_attn import flash_attn_with_kvcache  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or without its kernels
        return f"flash-attn cannot be imported: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
