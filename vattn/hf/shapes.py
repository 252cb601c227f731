"""Shapes of K and V of a model's attention layers: those seen so far, and predictions for the other layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import KVLayout, LayerGroup

__all__ = ["ConfiguredLayer", "LayerShape", "Shapes"]


@dataclass(frozen=True)
class LayerShape:
    """The shape of one token in one layer: K is ``[num_kv_heads, head_dim]``, V is ``[num_kv_heads, v_head_dim]``."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor) -> LayerShape:
        """The shape that these tensors have.

        Args:
            k, v: ``[batch, num_kv_heads, tokens, head_dim]``; ``v`` may have another ``head_dim``.
        """
        return cls(k.shape[1], k.shape[3], v.shape[3])


@dataclass(frozen=True)
class ConfiguredLayer:
    """What a model's config says about one attention layer.

    Attributes:
        num_kv_heads, head_dim: used as ratios between layers only.
        window: tokens that a query attends to in sliding or chunked attention, its own included. None: all tokens.
        chunked: True for chunked attention, False for sliding attention.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunked: bool = False


class Shapes:
    """Known and predicted shapes of a model's layers.

    The config alone is not enough: tensor parallelism divides the heads, and some models store other sizes than their
    config names. So the shape of a layer that was not seen yet follows from one that was, scaled by the ratio of what
    the config says about the two.

    Args:
        configured: what the config says, by layer index.

    Attributes:
        seen: shapes of the layers seen so far, by layer index.
    """

    def __init__(self, configured: dict[int, ConfiguredLayer]) -> None:
        self.configured = configured
        self.seen: dict[int, LayerShape] = {}

    def predict(self, layer: int) -> LayerShape:
        """The shape expected of a layer. At least one layer must have been seen.

        The source is the nearest seen layer with the same config, or else the nearest one, scaled.
        """
        mine = self.configured[layer]

        def distance(other: int) -> tuple[bool, int]:
            known = self.configured[other]
            return (known.num_kv_heads, known.head_dim) != (mine.num_kv_heads, mine.head_dim), abs(other - layer)

        nearest = min(self.seen, key=distance)
        shape, known = self.seen[nearest], self.configured[nearest]
        return LayerShape(
            max(1, shape.num_kv_heads * mine.num_kv_heads // known.num_kv_heads),
            max(1, shape.head_dim * mine.head_dim // known.head_dim),
            max(1, shape.v_head_dim * mine.head_dim // known.head_dim),
        )

    def layout(self, max_length: int, dtype: torch.dtype) -> KVLayout:
        """A layout of all layers. Layers with the same shape and window are one group.

        Args:
            max_length: tokens per sequence at most.
            dtype: of K and V.
        """
        groups: dict[tuple[LayerShape, int | None], list[int]] = {}
        for layer in self.configured:
            shape = self.seen.get(layer) or self.predict(layer)
            groups.setdefault((shape, self.configured[layer].window), []).append(layer)
        return KVLayout(
            groups=[
                LayerGroup(layers, shape.num_kv_heads, shape.head_dim, shape.v_head_dim, window)
                for (shape, window), layers in groups.items()
            ],
            max_seq_len=max_length,
            dtype=dtype,
        )
