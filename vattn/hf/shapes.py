"""The shapes of a model's attention layers: those seen, and what the others will be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import KVLayout, LayerGroup

__all__ = ["ConfiguredLayer", "LayerShape", "Shapes"]


@dataclass(frozen=True)
class LayerShape:
    """K and V of one layer and token: ``[num_kv_heads, head_dim]`` and ``[num_kv_heads, v_head_dim]``."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor) -> LayerShape:
        """Of tensors ``[batch, num_kv_heads, tokens, head_dim]``."""
        return cls(k.shape[1], k.shape[3], v.shape[3])


@dataclass(frozen=True)
class ConfiguredLayer:
    """What a config says of an attention layer.

    Attributes:
        num_kv_heads, head_dim: only their ratios between layers matter.
        window: of sliding or chunked attention, else None: how many tokens a query sees, its own included.
        chunked: whether the window is a chunk.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunked: bool = False


class Shapes:
    """The shapes of layers not seen yet are predicted from those seen and from the config, which knows them but for
    what tensor parallelism and a model's own habits make of them.

    Args:
        configured: the attention layers by index.

    Attributes:
        seen: shapes by layer.
    """

    def __init__(self, configured: dict[int, ConfiguredLayer]) -> None:
        self.configured = configured
        self.seen: dict[int, LayerShape] = {}

    def predict(self, layer: int) -> LayerShape:
        """As the nearest layer seen whose config is the same, or scaled from the nearest by what the configs say."""
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
        """Of all layers, those alike in shape and window in one group."""
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
