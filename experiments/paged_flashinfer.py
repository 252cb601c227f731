"""Attention of decode steps by FlashInfer, over the blocks of a paged cache."""

from __future__ import annotations

import torch
from paged import PagedKVCache

__all__ = ["FlashInferDecode"]

WORKSPACE_BYTES = 256 << 20


class FlashInferDecode:
    """``BatchDecodeWithPagedKVCacheWrapper`` for one batch: ``plan`` on the host when lengths change, then any layer.

    Made for graphs, so that a captured ``__call__`` follows later plans.

    Args:
        cache: K and V, brought up to date by ``step``.
        slots: of the batch.
        num_heads: query heads.
        tensor_cores: the kernel for prefill, which FlashInfer recommends for four query heads to a KV head and more;
            otherwise the one for decode.
    """

    def __init__(self, cache: PagedKVCache, slots: list[int], num_heads: int, tensor_cores: bool) -> None:
        import flashinfer

        (group,) = cache.layout.groups
        self.cache, self.slots, self.num_heads, self.group = cache, slots, num_heads, group
        device, size = cache.device, len(slots)
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=torch.zeros(size + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=torch.zeros(cache.num_blocks, dtype=torch.int32, device=device),
            paged_kv_last_page_len_buffer=torch.zeros(size, dtype=torch.int32, device=device),
            backend="fa2",
        )

    def tables(self, seq_lens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ``plan`` takes: where each sequence's blocks begin, the blocks, the tokens in the last ones."""
        tokens = self.cache.block_tokens
        counts = [-(-seq_len // tokens) for seq_len in seq_lens]
        blocks = [self.cache.blocks(slot)[:count] for slot, count in zip(self.slots, counts, strict=True)]
        return (
            torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            torch.tensor([block for each in blocks for block in each], dtype=torch.int32),
            torch.tensor([(seq_len - 1) % tokens + 1 for seq_len in seq_lens], dtype=torch.int32),
        )

    def plan(self, tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Divide the work; on the host, which copies the plan to the device."""
        tokens = self.cache.block_tokens
        self._wrapper.plan(
            *tables,
            self.num_heads,
            self.group.num_kv_heads,
            self.group.head_dim,
            tokens,
            q_data_type=self.cache.layout.dtype,
            kv_data_type=self.cache.layout.dtype,
        )

    def __call__(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """q ``[batch, num_heads, head_dim]`` -> the same."""
        return self._wrapper.run(q, (self.cache.k(layer), self.cache.v(layer)))
