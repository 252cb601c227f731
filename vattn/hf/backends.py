"""Which of vattn's backends attends for a layer, and the batch that it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention import AttentionBackend, AttentionBatch, choose, get
from ..errors import ConfigError
from ..memory.tensors import upload
from .shapes import LayerShape
from .storage import Storage

__all__ = ["build_batch", "choose_backend"]


def choose_backend(storage: Storage, shape: LayerShape, features: frozenset[str]) -> AttentionBackend:
    """The backend for a layer, one that reads nothing past the end of a sequence.

    Raises:
        ConfigError: the one that was asked for by name does not do here.
    """
    assert storage.kv_cache is not None
    name, cache = storage.options.attention, storage.kv_cache
    if name not in ("auto", None):
        backend = get(name)
        missing = sorted(features - backend.features)
        if missing:
            raise ConfigError(f'attention {name!r} has no {" or ".join(missing)}; use attention="auto"')
        if reason := backend.supports(cache.device, cache.layout.dtype, shape.head_dim):
            raise ConfigError(f'attention {name!r} cannot be used: {reason}; use attention="auto"')
        return backend
    if shape.head_dim != shape.v_head_dim:  # the FlashAttention kernels want them equal
        return get("sdpa") if features <= get("sdpa").features else get("reference")
    return choose(cache.device, cache.layout.dtype, shape.head_dim, max_over_read=0, features=features)


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
