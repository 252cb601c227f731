"""Attention of decode steps over a paged cache: FlashAttention-2 and -3 with their block tables, and a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from paged import PagedKVCache, PagedStep

from vattn.attention import DecodeBatch, get


class _Paged:
    """What the three have in common. One new token of each sequence; see ``vattn.attention.AttentionBackend``.

    Args:
        cache: whose K and V are given.
        steps: of ``paged.paged_ops``.
    """

    features: frozenset[str] = frozenset()
    over_read_tokens = 0
    masks_over_read = True
    name = ""

    def __init__(self, cache: PagedKVCache, steps: dict[int, PagedStep]) -> None:
        self.cache, self.steps = cache, steps

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def page_table(self, batch: DecodeBatch) -> torch.Tensor:
        """``[batch, max_blocks]`` int32, looked up at the step's first layer."""
        return self.steps[batch.batch_size].page_table


class PagedReference(_Paged):
    """Gathers each sequence and asks the float32 reference."""

    name = "paged-reference"

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: DecodeBatch, **options: Any
    ) -> torch.Tensor:
        dense_k, dense_v = (x[self.page_table(batch).long()].flatten(1, 2) for x in (k, v))
        size = batch.batch_size
        slots = torch.arange(size, dtype=torch.int32, device=q.device)
        dense = DecodeBatch(slots, batch.rows_int32, batch.ends_int32, batch.max_end)
        return get("reference")(q, dense_k, dense_v, dense, **options)


class _PagedFlashAttention(_Paged):
    """Both packages' ``flash_attn_with_kvcache``, which call the table by different names."""

    def kernel(self) -> tuple[Callable[..., torch.Tensor], str]:
        """The function, and its name for the table."""
        raise NotImplementedError

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: DecodeBatch,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        function, table = self.kernel()
        out = function(
            q[:, None],
            k,
            v,
            cache_seqlens=batch.ends_int32,
            **{table: self.page_table(batch)},
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        return out[:, 0]


class PagedFlashAttention2(_PagedFlashAttention):
    """``flash_attn_with_kvcache`` with ``block_table``; blocks of a multiple of 256 tokens."""

    name = "paged-flash-attn-2"

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if self.cache.block_tokens % 256:
            return f"needs blocks of a multiple of 256 tokens, got {self.cache.block_tokens}"
        return get("flash-attn-2").supports(device, dtype, head_dim)

    def kernel(self) -> tuple[Callable[..., torch.Tensor], str]:
        from flash_attn import flash_attn_with_kvcache

        return flash_attn_with_kvcache, "block_table"


class PagedFlashAttention3(_PagedFlashAttention):
    """``flash_attn_with_kvcache`` of FlashAttention-3 with ``page_table``; blocks of any size."""

    name = "paged-flash-attn-3"

    def supports(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return get("flash-attn-3").supports(device, dtype, head_dim)

    def kernel(self) -> tuple[Callable[..., torch.Tensor], str]:
        from flash_attn_interface import flash_attn_with_kvcache

        return flash_attn_with_kvcache, "page_table"
