"""The forward pass of a ``TransformersModel`` that is under way in this thread.

transformers calls a model's layers itself, so what a layer needs of the runtime (the cache, where each token's K and V
go, how attention is computed) reaches it beside the arguments that transformers passes on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..attention import AttentionBackend, AttentionBatch
from ..kv_cache import KVCache

__all__ = ["IMPLEMENTATIONS", "Pass", "current", "implementation", "running"]

_THREAD = threading.local()
IMPLEMENTATIONS: dict[str, str] = {}  # vattn's name of an attention implementation -> the one it stands for


@dataclass
class Pass:
    """Packed tokens of many sequences, without padding.

    Attributes:
        cache: has the rows of every token backed and writable.
        slots, rows: ``[T]`` int32 or int64, of each token, on the cache's device.
        parts: (batch, attention) of all tokens in order.
        unread: layers of the cache for what the model's newest ``update`` gave K and V to, where its attention reads
            others that it made of these.
    """

    cache: KVCache
    slots: torch.Tensor
    rows: torch.Tensor
    parts: list[tuple[AttentionBatch, AttentionBackend]]
    unread: Iterator[int] = field(default_factory=lambda: iter(()))

    @cached_property
    def where(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``slots`` and ``rows`` as int64."""
        return self.slots.long(), self.rows.long()

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None for all rows."""
        return next(group.window for group in self.cache.layout.groups if layer in group.layers)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the K and V of every token.

        Args:
            layer: of the cache.
            k: ``[T, num_kv_heads, head_dim]``.
            v: ``[T, num_kv_heads, v_head_dim]``.
        """
        dtype = self.cache.layout.dtype
        self.cache.k(layer).index_put_(self.where, k.to(dtype))
        self.cache.v(layer).index_put_(self.where, v.to(dtype))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of every token, whose K and V are appended already.

        Args:
            layer: of the cache; another than the model's own where layers share K and V.
            q: ``[T, num_heads, head_dim]``.
            scale, window, softcap, sinks: as in :class:`vattn.attention.AttentionBackend`.

        Returns:
            ``[T, num_heads, v_head_dim]``.
        """
        k, v = self.cache.k(layer), self.cache.v(layer)
        extras: dict[str, Any] = {} if softcap is None and sinks is None else {"softcap": softcap, "sinks": sinks}
        out = [
            attention(of_part, k, v, batch, scale=scale, window=window, **extras)
            for of_part, (batch, attention) in zip(
                q.split([batch.num_tokens for batch, _ in self.parts]), self.parts, strict=True
            )
        ]
        return out[0] if len(out) == 1 else torch.cat(out)


def current() -> Pass | None:
    """The pass of this thread; None outside of one, where a model is used as transformers' own."""
    return getattr(_THREAD, "current", None)


@contextmanager
def running(this: Pass) -> Iterator[Pass]:
    """Run the model's forward inside: it computes this pass."""
    before = current()
    _THREAD.current = this
    try:
        yield this
    finally:
        _THREAD.current = before


def implementation(name: str) -> str:
    """The attention implementation that is meant by a name: vattn's stand for others outside of a pass."""
    return IMPLEMENTATIONS[name] if name in IMPLEMENTATIONS and current() is None else name
