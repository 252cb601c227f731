"""Where a token's K and V are in memory: strides, bytes per token, tokens per page. Arithmetic only.

A *lane* is a range of addresses of each slot. It grows by a fixed number of bytes per token.

* Token order has one lane per group: ``[slot, token, layer, (K, V), kv_head, head_dim]``. A page holds a few tokens of
  all layers. So a sequence wastes at most one page, however many layers the model has.
* Layer order has a lane for each K and for each V: ``[layer, (K, V), slot, token, kv_head, head_dim]``, as most caches
  do. So a sequence may waste one page per lane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .arguments import require_int
from .errors import ConfigError

__all__ = ["GroupPlan", "KVLayout", "Lane", "LayerGroup", "TensorPlan"]

SUPPORTED_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
)


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose K and V have the same shape. Each group has its own range of addresses.

    Attributes:
        layers: layer indices of the model, as given to ``KVCache.k`` and ``KVCache.v``.
        num_kv_heads: K heads of a layer; it has as many V heads.
        head_dim: elements of one K head.
        v_head_dim: elements of one V head. None: ``head_dim``.
        window: tokens that attention looks back. None: all. The model passes it to attention; the cache keeps all
            rows, also those outside the window.

    Raises:
        ConfigError: a size that is not positive, no layers, or a layer named twice.
    """

    layers: Sequence[int]
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, (str, bytes)) or not isinstance(self.layers, (Sequence, range)):
            raise ConfigError(f"LayerGroup.layers must be a sequence of layer indices, got {self.layers!r}")
        layers = tuple(require_int("a layer index", layer, 0) for layer in self.layers)
        if not layers:
            raise ConfigError("LayerGroup.layers must name at least one layer")
        if len(set(layers)) != len(layers):
            raise ConfigError(f"LayerGroup.layers must not name a layer twice, got {layers}")
        v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "num_kv_heads", require_int("num_kv_heads", self.num_kv_heads, 1))
        object.__setattr__(self, "head_dim", require_int("head_dim", self.head_dim, 1))
        object.__setattr__(self, "v_head_dim", require_int("v_head_dim", v_head_dim, 1))
        if self.window is not None:
            object.__setattr__(self, "window", require_int("window", self.window, 1))


@dataclass(frozen=True, slots=True)
class Lane:
    """A range of addresses of each slot.

    Attributes:
        offset_bytes: where slot 0 begins, counted from the start of the group's addresses.
        row_bytes: bytes of one token.
        slot_stride_bytes: distance from one slot to the next.
    """

    offset_bytes: int
    row_bytes: int
    slot_stride_bytes: int

    def slot_offset(self, slot: int) -> int:
        """Where a slot begins: bytes from the start of the group's addresses."""
        return self.offset_bytes + slot * self.slot_stride_bytes


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A view of a group's addresses as ``[max_slots, max_seq_len, num_kv_heads, head_dim]``.

    The offset and the strides count elements.
    """

    offset: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """How one group is laid out, for a given page size and number of slots.

    Attributes:
        lanes: in the order of their addresses.
        k, v: views by layer index.
        size_bytes: addresses that the group needs.
    """

    lanes: tuple[Lane, ...]
    k: dict[int, TensorPlan]
    v: dict[int, TensorPlan]
    size_bytes: int


class KVLayout:
    """The shape of a model's KV cache. Immutable.

    Args:
        num_layers, num_kv_heads, head_dim: for a model whose layers are all alike; ``head_dim`` in elements.
        max_seq_len: tokens of a slot at most.
        dtype: of K and V.
        order: ``"token"``: a page holds some tokens of every layer. ``"layer"``: a page holds tokens of one K or one V.
        groups: for a model whose layers differ, in place of the first three arguments.
        v_head_dim: elements of one V head, where it differs from ``head_dim``.

    Raises:
        ConfigError: a size that is not positive, a layer in two groups, an unknown order, or an unsupported dtype.
    """

    def __init__(
        self,
        num_layers: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        order: str = "token",
        *,
        groups: Sequence[LayerGroup] | None = None,
        v_head_dim: int | None = None,
    ) -> None:
        if groups is None:
            num_layers = require_int("num_layers", num_layers, 1)
            groups = [LayerGroup(range(num_layers), num_kv_heads, head_dim, v_head_dim)]  # type: ignore[arg-type]
        elif any(value is not None for value in (num_layers, num_kv_heads, head_dim, v_head_dim)):
            raise ConfigError("give groups, or num_layers, num_kv_heads and head_dim; not both")
        self.groups = tuple(groups) if isinstance(groups, Sequence) else ()
        if not self.groups or not all(isinstance(group, LayerGroup) for group in self.groups):
            raise ConfigError(f"groups must be a non-empty sequence of LayerGroup, got {groups!r}")
        self.max_seq_len = require_int("max_seq_len", max_seq_len, 1)
        if dtype not in SUPPORTED_DTYPES:
            names = ", ".join(str(supported) for supported in SUPPORTED_DTYPES)
            raise ConfigError(f"dtype must be one of {names}, got {dtype!r}")
        self.dtype = dtype
        if order not in ("token", "layer"):
            raise ConfigError(f'order must be "token" or "layer", got {order!r}')
        self.order = order
        self.layers = tuple(sorted(layer for group in self.groups for layer in group.layers))
        if len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"a layer belongs to one group only, got {self.layers}")

    @property
    def num_layers(self) -> int:
        """Number of layers in all groups."""
        return len(self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token: K and V of all layers."""
        return sum(sum(self._layer_bytes(group)) * len(group.layers) for group in self.groups)

    def tokens_per_page(self, page_bytes: int) -> float:
        """Tokens that a page holds, in the lane with the most bytes per token."""
        return page_bytes / max(row_bytes for group in self.groups for row_bytes in self._lane_row_bytes(group))

    def plan(self, group: LayerGroup, max_slots: int, page_bytes: int, extra_rows: int = 0) -> GroupPlan:
        """Lay out one group.

        The distance between two slots of a lane is a common multiple of the page size and of the bytes per token. So no
        page holds rows of two slots, and ``[slot, row]`` can be flattened to one axis of tokens.

        Args:
            group: one of ``groups``.
            max_slots: number of slots.
            page_bytes: size of a page.
            extra_rows: addresses for so many tokens beyond ``max_seq_len``.
        """
        lanes, offset = [], 0
        for row_bytes in self._lane_row_bytes(group):
            unit = math.lcm(page_bytes, row_bytes)
            stride = -(-(self.max_seq_len + extra_rows) * row_bytes // unit) * unit
            lanes.append(Lane(offset, row_bytes, stride))
            offset += max_slots * stride
        k, v = {}, {}
        k_bytes, v_bytes = self._layer_bytes(group)
        for position, layer in enumerate(group.layers):
            if self.order == "token":
                k_lane = v_lane = lanes[0]
                k_start = position * (k_bytes + v_bytes)
                v_start = k_start + k_bytes
            else:
                k_lane, v_lane = lanes[2 * position : 2 * position + 2]
                k_start = v_start = 0
            k[layer] = self._tensor(k_lane, k_start, max_slots, group.num_kv_heads, group.head_dim)
            v[layer] = self._tensor(v_lane, v_start, max_slots, group.num_kv_heads, group.v_head_dim or group.head_dim)
        return GroupPlan(tuple(lanes), k, v, offset)

    def _tensor(self, lane: Lane, start_bytes: int, max_slots: int, heads: int, head_dim: int) -> TensorPlan:
        size = self.dtype.itemsize
        strides = (lane.slot_stride_bytes // size, lane.row_bytes // size, head_dim, 1)
        return TensorPlan(
            (lane.offset_bytes + start_bytes) // size, (max_slots, self.max_seq_len, heads, head_dim), strides
        )

    def _layer_bytes(self, group: LayerGroup) -> tuple[int, int]:
        """Bytes of one token in one layer: (K, V)."""
        per_element = group.num_kv_heads * self.dtype.itemsize
        return group.head_dim * per_element, (group.v_head_dim or group.head_dim) * per_element

    def _lane_row_bytes(self, group: LayerGroup) -> list[int]:
        pair = self._layer_bytes(group)
        return [sum(pair) * len(group.layers)] if self.order == "token" else list(pair) * len(group.layers)

    def __repr__(self) -> str:
        return (
            f"KVLayout(num_layers={self.num_layers}, max_seq_len={self.max_seq_len}, dtype={self.dtype}, "
            f"order={self.order!r}, bytes_per_token={self.bytes_per_token}, groups={len(self.groups)})"
        )
