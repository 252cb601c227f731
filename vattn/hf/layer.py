"""One attention layer of a ``VirtualCache``, as transformers knows layers."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..attention import AttentionBackend, UniformDecode, uniform_decode
from ..attention.uniform_step import UniformStep
from ..errors import ConfigError
from .shapes import LayerShape
from .step_views import StepViews
from .storage import Storage

__all__ = ["MaskLength", "VirtualLayer"]


class MaskLength(int):
    """A KV length that knows its layer: it tells vattn's mask function that the mask is for this cache."""

    layer: VirtualLayer

    def __new__(cls, value: int, layer: VirtualLayer) -> MaskLength:
        length = super().__new__(cls, value)
        length.layer = layer
        return length


class VirtualLayer(CacheLayerMixin):
    """K and V of one layer, in slots of the shared storage.

    Args:
        storage: of the whole cache.
        index: in the model.

    Attributes:
        window, chunked: as in ``ConfiguredLayer``.
        num_new: tokens of each sequence in the newest update.
        shape: None before the first update.
        full_k, full_v: ``[batch, max_length, num_kv_heads, head_dim]``, backed as far as the storage's rows.
        backends: vattn's attention for this layer, by what it has to support.
        reader: the code of the model's that takes what ``update`` returns to vattn's attention, reading none of it
            before; None where there is none, or it is not known.
        uniform_decode: its attention of a step of one token where nothing has to be supported and ``attend_step`` has
            nothing; None for a backend's.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, storage: Storage, index: int) -> None:
        self.storage = storage
        self.index = index
        self.window = storage.configured[index].window
        self.chunked = storage.configured[index].chunked
        self.is_sliding = self.window is not None
        self.is_first = index == min(storage.configured)
        self.forget()

    def forget(self) -> None:
        """Drop the tensors, which keep their addresses reserved."""
        self.num_new = 0
        self.shape: LayerShape | None = None
        self.full_k = self.full_v = torch.empty(0)
        self._step_views: StepViews | None = None
        self._step: UniformStep | None = None
        self.reader: CodeType | None = None
        self.backends: dict[tuple[bool, ...], AttentionBackend] = {}
        self.uniform_decode: UniformDecode | None = None
        self._fits: tuple[Any, ...] | None = None  # what the newest update looked like; one like it needs no checks
        self._version = -1

    @property
    def length(self) -> int:
        """Tokens of each sequence, padding included."""
        return self.storage.lengths[self.index]

    # -- transformers' interface ---------------------------------------------------------------------------------
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V, ``[batch, num_kv_heads, new, head_dim]``.

        Returns:
            Views ``[batch, num_kv_heads, tokens, head_dim]`` of what the new queries see: every token, or with a
            sliding window its newest ``window - 1`` and the new ones. Not to be read after ``crop``, ``reset`` or
            ``close``: there is no memory behind them then. A single new row is written by vattn's attention, where that
            is what follows; until then ``keys`` and ``values`` have it, and these views do not.

        Raises:
            ConfigError: they do not fit this cache, or record gradients.
            OutOfPages: no memory for them.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ConfigError(
                "K and V of this forward pass record gradients, which a cache in place cannot keep: run it under "
                "torch.no_grad(), or train with use_cache=False"
            )
        storage, index, key_shape = self.storage, self.index, key_states.shape
        if storage.pending is not None:  # nobody attended to it
            storage.write_pending()
        looks = (key_shape, value_states.shape, key_states.dtype, value_states.dtype, key_states.device)
        if looks != self._fits or self._version != storage.version:
            if looks[2] != looks[3] and torch.is_autocast_enabled(looks[4].type):
                dtype = torch.get_autocast_dtype(looks[4].type)  # some rotary embeddings leave K in float32
                key_states, value_states = key_states.to(dtype), value_states.to(dtype)
            self.lazy_initialization(key_states, value_states)
            self._fits = looks if looks[2] == looks[3] else None
        if self.is_first:
            storage.begin_pass(index)
        start = storage.lengths[index]
        self.num_new = key_shape[2]
        end = start + key_shape[2]
        if end > storage.rows:
            storage.ensure(end)
        first = 0 if self.window is None else self._first_visible(start)
        assert self._step_views is not None
        keys, values = self._step_views.read.cut(self._position, first, end)
        if key_shape[2] == 1 and self._may_wait(key_states, value_states):
            storage.pending = self, key_states, value_states, start
        else:
            self.write(key_states, value_states, start, end)
        storage.lengths[index] = end
        keys._vattn_layer = values._vattn_layer = self  # type: ignore[attr-defined]  # for vattn's attention function
        return keys, values

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor, start: int, end: int) -> None:
        """Copy K and V, ``[batch, num_kv_heads, end - start, head_dim]``, to the rows from ``start``."""
        assert self._step_views is not None
        new_keys, new_values = self._step_views.written.cut(self._position, start, end)
        new_keys.copy_(key_states)
        new_values.copy_(value_states)

    def _may_wait(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether a new row may wait for the attention, whose launch writes it as well: where launches are vattn's own,
        can take the row from where it is, and ``update`` was called by code that goes on to that attention, by way of
        the cache and of nobody who looks at what it returns."""
        return (
            self.storage.defers
            and self.reader is not None
            and sys._getframe(3).f_code is self.reader
            and sys._getframe(2).f_code is self.storage.update_code
            and self._step is not None
            and key_states.stride(3) == 1
            and value_states.stride(3) == 1
        )

    def attend_step(self, q: torch.Tensor, scale: float | None, **features: Any) -> torch.Tensor | None:
        """Attention of a step of one token over every row, or every row in the window, if that works here; writes the
        row that waits for it.

        Args:
            q: ``[batch, num_heads, 1, head_dim]``.
            features: ``softcap``, ``sinks`` and ``starts``, as ``UniformStep.attend`` takes them.

        Returns:
            ``[batch, 1, num_heads, v_head_dim]``, or None; no row waits any more.
        """
        storage, step, row = self.storage, self._step, self.storage.pending
        error: Exception | None = None
        if row is not None and row[0] is not self:
            storage.write_pending()
            row = None
        if (
            step is not None
            and storage.launches
            and self._version == storage.version
            and q.stride(3) == 1
            and not (q.requires_grad and torch.is_grad_enabled())
        ):
            new = None if row is None else (row[1], row[2])
            try:
                out = step.attend(q, storage.lengths[self.index], scale=scale, window=self.window, new=new, **features)
                storage.pending = None
                return out
            except torch.OutOfMemoryError:  # other kernels may do with less
                pass
            except Exception as raised:
                error = None if "out of memory" in str(raised) else raised
        storage.write_pending()  # before a warning, which may be an error to some
        if error is not None:
            storage.give_up_steps(error)
        return None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for tensors like these, ``[batch, num_kv_heads, any, head_dim]``."""
        self.storage.admit(self.index, key_states, value_states)
        self.shape = LayerShape.of(key_states, value_states)
        self._look_again()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that ``update`` will return, index of the first of them)."""
        first, end = self._first_visible(self.length), self.length + query_length
        length = end - first
        return (MaskLength(length, self) if self.storage.switched else length), first

    def get_seq_length(self) -> int:
        """Tokens of each sequence, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """``max_length`` of the cache."""
        return self.storage.options.max_length

    # -- what the cache does with all its layers -------------------------------------------------------------------
    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether it has seen a forward pass."""
        return self.shape is not None

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """``[batch, num_kv_heads, length, head_dim]``; None before the first use. A view, as ``update`` returns."""
        return self._whole()[0]

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """``[batch, num_kv_heads, length, v_head_dim]``; None before the first use. A view, as ``update`` returns."""
        return self._whole()[1]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: rows that continue one another share the memory of all layers."""
        raise ConfigError("reorder the whole cache, not one of its layers")

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        if self.shape is None or self.storage.kv_cache is None:
            return None, None
        if self.storage.lost:
            raise ConfigError("rows of this cache changed places, which failed half-way: call reset()")
        if self._version != self.storage.version:
            self._look_again()
        self.storage.write_pending()
        length = self.length
        return self.full_k[:, :length].transpose(1, 2), self.full_v[:, :length].transpose(1, 2)

    def _look_again(self) -> None:
        """Take the storage's tensors, which are others than before."""
        self.full_k, self.full_v = self.storage.views(self.index)
        self._step_views, self._position = self.storage.step_views(self.index)
        self.backends.clear()
        k, v = self.full_k, self.full_v
        if self.storage.options.attention == "auto" and self._version != self.storage.version:
            self.uniform_decode = uniform_decode(k.device, k.dtype, k.shape[3], v.shape[3])
            self._step = self.storage.uniform_step(k, v)
        self._version = self.storage.version

    def _first_visible(self, start: int) -> int:
        return 0 if self.window is None else max(0, start - self.window + 1)
