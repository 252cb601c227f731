"""A backend with the memory that it needs between its kernels, for launches that follow one another on one stream."""

from __future__ import annotations

from typing import Any

import torch

from .base import AttentionBackend
from .decode_batch import DecodeBatch
from .phased import PhasedAttention
from .triton_decode import DecodeWorkspace, TritonDecodeAttention

__all__ = ["bind"]


class _BoundTritonDecode:
    """Makes a workspace for each batch size in its first launch, so that those captured afterwards allocate none."""

    def __init__(self, backend: TritonDecodeAttention) -> None:
        self.backend = backend
        self.name = backend.name
        self.over_read_tokens = backend.over_read_tokens
        self.masks_over_read = backend.masks_over_read
        self.features = backend.features
        self.supports = backend.supports
        self._workspaces: dict[tuple[int, ...], DecodeWorkspace] = {}

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: DecodeBatch, **options: Any
    ) -> torch.Tensor:
        key = (batch.batch_size, q.shape[1], k.shape[2], v.shape[3], batch.max_end)
        workspace = self._workspaces.get(key)
        if workspace is None:
            workspace = self._workspaces[key] = self.backend.workspace(*key, q.device)
        return self.backend.decode(q, k, v, batch, workspace=workspace, **options)


def bind(backend: AttentionBackend) -> AttentionBackend:
    """The decode half of a backend, with memory of its own where it needs some.

    The result is for one stream and one launch at a time: two decode loops each bind their own.
    """
    if isinstance(backend, PhasedAttention):
        backend = backend.decode
    if isinstance(backend, TritonDecodeAttention):
        return _BoundTritonDecode(backend)  # type: ignore[return-value]
    return backend
