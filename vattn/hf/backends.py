"""The batch that vattn's attention is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention import AttentionBatch
from ..memory.upload import upload
from .storage import Storage

__all__ = ["build_batch"]


def build_batch(
    storage: Storage, new: int, end: int, starts: Sequence[int] | None
) -> tuple[AttentionBatch, torch.Tensor | None]:
    """The batch of a forward pass.

    Args:
        new: tokens that the pass computes, of each sequence.
        end: tokens that each sequence then has, padding included.
        starts: left padding of each sequence, or None.

    Returns:
        The batch without the padding, and where its packed tokens lie among the ``batch * new`` of the pass (None:
        they are all of them).
    """
    assert storage.kv_cache is not None
    size, device = storage.batch_size, storage.kv_cache.device
    if starts is None:
        return AttentionBatch.build(range(size), [new] * size, [end] * size, device), None
    live = [i for i in range(size) if starts[i] < end]  # a chunk of a prompt may be nothing but padding
    query_lens = [min(new, end - starts[i]) for i in live]
    batch = AttentionBatch(
        tuple(live),
        tuple(query_lens),
        tuple(end - starts[i] for i in live),
        device,
        tuple(starts[i] for i in live),
    )
    if batch.num_tokens == size * new:
        return batch, None
    tokens = [i * new + j for i, n in zip(live, query_lens, strict=True) for j in range(new - n, new)]
    return batch, upload(tokens, device, torch.int64)
