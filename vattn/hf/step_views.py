"""The views that a forward pass takes of K and V, cut for all layers of a kind at once.

Cutting a view of a tensor costs the host two or three microseconds; a pass takes four of every layer, which an eager
decode step feels. ``unbind`` cuts those of all layers for little more than the price of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Cuts", "StepViews"]


class Cuts:
    """Views of rows of all layers of a kind, made together and handed out one layer at a time.

    Args:
        k, v: ``[layers, batch, num_kv_heads, max_length, head_dim]``.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._k, self._v = k, v
        self._key: tuple[int, int, bool] | None = None
        self._views: list[tuple[torch.Tensor, torch.Tensor] | None] = []

    def cut(self, position: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the ``position``-th layer's tokens from ``start`` to ``end``, ``[batch, num_kv_heads, tokens,
        head_dim]``."""
        key = (start, end, torch.is_inference_mode_enabled())
        if self._key != key or self._views[position] is None:
            with torch.no_grad():
                views = [x.narrow(3, start, end - start).unbind() for x in (self._k, self._v)]
            self._key, self._views = key, list(zip(*views, strict=True))
        # Handed out once and not kept: what is read carries a reference to its layer, and so to this object.
        pair, self._views[position] = self._views[position], None
        assert pair is not None
        return pair


class StepViews:
    """Views of the K and V of layers that lie at equal distances in one range of addresses.

    Args:
        pairs: K and V of each layer, ``[batch, max_length, num_kv_heads, head_dim]``, alike but for their place.

    Attributes:
        written: cuts what a pass adds.
        read: cuts what it attends to.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        k, v = (_stack(tensors) for tensors in zip(*pairs, strict=True))
        self.written = Cuts(k, v)
        self.read = Cuts(k, v)


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor over all of them, where they lie: ``[layers, batch, num_kv_heads, max_length, head_dim]``."""
    first, *others = tensors
    offsets = [tensor.storage_offset() for tensor in tensors]
    distance = offsets[1] - offsets[0] if others else 0
    assert offsets == [offsets[0] + index * distance for index in range(len(tensors))], "layers at odd distances"
    batch, length, heads, dim = (0, 1, 2, 3)
    order = (batch, heads, length, dim)
    return first.as_strided(
        (len(tensors), *(first.shape[axis] for axis in order)),
        (distance, *(first.stride(axis) for axis in order)),
        first.storage_offset(),
    )
