"""Views of K and V for a forward pass, made for all layers of the same shape at once.

Slicing a tensor costs the host two to three microseconds. A forward pass needs four slices per layer, which is a
noticeable part of an eager decode step. One ``unbind`` makes the slices of all layers for little more than the cost of
one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Cuts", "StepViews"]


class Cuts:
    """Slices of K and V, made for all layers together and returned one layer at a time.

    Args:
        k, v: all layers' K and V, ``[layers, batch, num_kv_heads, max_length, head_dim]``.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._k, self._v = k, v
        self._key: tuple[int, int, bool] | None = None
        self._views: list[tuple[torch.Tensor, torch.Tensor] | None] = []

    def cut(self, position: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens ``start`` to ``end`` of one layer.

        Args:
            position: index of the layer in ``k`` and ``v``.
            start, end: the first token, and the first one after the last.

        Returns:
            Views of K and V, each ``[batch, num_kv_heads, end - start, head_dim]``.
        """
        key = (start, end, torch.is_inference_mode_enabled())
        if self._key != key or self._views[position] is None:
            with torch.no_grad():
                views = [x.narrow(3, start, end - start).unbind() for x in (self._k, self._v)]
            self._key, self._views = key, list(zip(*views, strict=True))
        # A view is returned once and not kept here: callers attach a reference to its layer, and so to this object.
        pair, self._views[position] = self._views[position], None
        assert pair is not None
        return pair


class StepViews:
    """Slices of K and V of layers that are stored at equal distances in one address range.

    Args:
        pairs: K and V of each layer, each ``[batch, max_length, num_kv_heads, head_dim]``. They differ in their address
            only.

    Attributes:
        written: slices of the rows that a pass writes.
        read: slices of the rows that it attends to.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        k, v = (_stack(tensors) for tensors in zip(*pairs, strict=True))
        self.written = Cuts(k, v)
        self.read = Cuts(k, v)


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A view of all of them as one tensor: ``[layers, batch, num_kv_heads, max_length, head_dim]``."""
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
