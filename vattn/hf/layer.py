"""One attention layer of a ``VirtualCache``, as transformers knows layers."""

from __future__ import annotations

import threading
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..attention import AttentionBackend
from ..attention.uniform_step import UniformStep
from ..errors import ConfigError
from .shapes import LayerShape
from .step_views import StepViews
from .storage import Storage

__all__ = ["MaskLength", "VirtualLayer", "take_note"]

_THREAD = threading.local()


def take_note() -> bool:
    """Whether a layer was updated in this thread since the last call."""
    noted, _THREAD.updated = getattr(_THREAD, "updated", False), False
    return noted


class _ReadOnly(property):
    """What is an attribute of transformers' layers, and follows from the storage here."""

    def __set__(self, instance: Any, value: Any) -> NoReturn:
        name = getattr(self.fget, "__name__", "it")
        raise ConfigError(f"{name} of a VirtualCache cannot be set: write to keys and values in place, or call update")


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
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, storage: Storage, index: int) -> None:
        self.storage = storage
        self.index = index
        self.window = storage.configured[index].window
        self.chunked = storage.configured[index].chunked
        self.is_sliding = self.window is not None
        if self.window is not None:
            self.sliding_window, self.record_past = self.window, False
        self.is_first = index == min(storage.configured)
        self.forget()

    def forget(self) -> None:
        """Drop the tensors, which keep their addresses reserved."""
        self.num_new = 0
        self.shape: LayerShape | None = None
        self.full_k = self.full_v = torch.empty(0)
        self._step_views: StepViews | None = None
        self._step: UniformStep | None = None
        self.backends: dict[tuple[bool, ...], AttentionBackend] = {}
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
            ``close``: there is no memory behind them then.

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
        if not (key_shape[2] == 1 and storage.launches and self._append_step(key_states, value_states, end)):
            new_keys, new_values = self._step_views.written.cut(self._position, start, end)
            new_keys.copy_(key_states)
            new_values.copy_(value_states)
        storage.lengths[index] = end
        if storage.options.attention is not None:
            self._announce(keys, values)
        return keys, values

    def _announce(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Let vattn's attention function know what comes to it."""
        keys._vattn_layer = values._vattn_layer = self  # type: ignore[attr-defined]
        _THREAD.updated = self.storage.awaits_attention = True

    def _append_step(self, key_states: torch.Tensor, value_states: torch.Tensor, end: int) -> bool:
        """Append a token of each sequence by a launch of vattn's own, if that works here."""
        step = self._step
        if step is None or key_states.stride(3) != 1 or value_states.stride(3) != 1:
            return False
        try:
            step.append(key_states, value_states, end)
        except Exception as error:
            self._note(error)
            return False
        return True

    def _note(self, error: Exception) -> None:
        """A launch failed: other kernels may do with less memory; after anything else, launches are given up."""
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            self.storage.give_up_steps(error)

    def attend_step(self, q: torch.Tensor, scale: float | None, **features: Any) -> torch.Tensor | None:
        """Attention of a step of one token over every row, or every row in the window, if that works here.

        Args:
            q: ``[batch, num_heads, 1, head_dim]``.
            features: ``softcap``, ``sinks`` and ``starts``, as ``UniformStep.attend`` takes them.

        Returns:
            ``[batch, 1, num_heads, v_head_dim]``, or None.
        """
        storage, step = self.storage, self._step
        if (
            step is None
            or not storage.launches
            or self._version != storage.version
            or q.stride(3) != 1
            or (q.requires_grad and torch.is_grad_enabled())
        ):
            return None
        try:
            return step.attend(q, storage.lengths[self.index], scale=scale, window=self.window, **features)
        except Exception as error:
            self._note(error)
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
        if self.storage.options.attention is None or torch.compiler.is_compiling():
            return length, first
        return MaskLength(length, self), first

    def get_seq_length(self) -> int:
        """Tokens of each sequence, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """``max_length`` of the cache."""
        return self.storage.options.max_length

    def reset(self) -> None:
        """Forget this layer's tokens. The next pass needs all layers as long as one another."""
        self.storage.require_open()
        self.storage.truncate({self.index: 0})

    def crop(self, tokens_to_remove: int) -> None:
        """Forget this layer's newest tokens.

        Args:
            tokens_to_remove: minus how many. Where the installed transformers takes a positive number, it is the length
                to keep, as there.

        Raises:
            ConfigError: a positive number, which newer versions of transformers refuse.
        """
        self.storage.require_open()
        self.storage.require_whole()
        self.storage.truncate({self.index: self.cropped(tokens_to_remove)})

    def cropped(self, tokens_to_remove: int) -> int:
        """What ``crop`` leaves of ``length``."""
        number = int(tokens_to_remove)  # some versions give a tensor
        if number <= 0:
            return max(0, self.length + number)
        try:
            DynamicLayer().crop(number)  # whether it means anything is for transformers to say
        except ValueError as error:
            raise ConfigError(f"crop({number}): give minus the number of tokens to remove") from error
        return min(self.length, number)

    def activate_past_recording(self) -> None:
        """Changes no more than ``record_past``: rows that have left the window are kept in any case, for ``crop``."""
        if self.is_sliding:
            self.record_past = True

    def offload(self) -> None:
        """As transformers' on a CPU, where nothing moves.

        Raises:
            ConfigError: the cache is on a GPU.
        """
        device = self.device
        if device is not None and device.type != "cpu":
            raise ConfigError(f"this cache lives on {device}, and cannot be offloaded: use transformers' own")

    def prefetch(self) -> None:
        """Nothing: it never is offloaded."""

    # -- what the cache does with all its layers -------------------------------------------------------------------
    @_ReadOnly
    def is_initialized(self) -> bool:
        """Whether it has seen a forward pass."""
        return self.shape is not None

    @_ReadOnly
    def device(self) -> torch.device | None:
        """None before the first use."""
        cache = self.storage.kv_cache
        return None if cache is None else cache.device

    @_ReadOnly
    def dtype(self) -> torch.dtype | None:
        """None before the first use."""
        cache = self.storage.kv_cache
        return None if cache is None else cache.layout.dtype

    @_ReadOnly
    def cumulative_length(self) -> int:
        """``length``, by the name that transformers' layers of windows have for it."""
        return self.length

    @_ReadOnly
    def keys(self) -> torch.Tensor | None:
        """``[batch, num_kv_heads, length, head_dim]``; None before the first use. A view, as ``update`` returns."""
        return self._whole()[0]

    @_ReadOnly
    def values(self) -> torch.Tensor | None:
        """``[batch, num_kv_heads, length, v_head_dim]``; None before the first use. A view, as ``update`` returns."""
        return self._whole()[1]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: rows that continue one another share the memory of all layers."""
        raise ConfigError("reorder_cache: call it for the whole cache, not for one of its layers")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, as ``reorder_cache``."""
        raise ConfigError("batch_repeat_interleave: call it for the whole cache, not for one of its layers")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused, as ``reorder_cache``."""
        raise ConfigError("batch_select_indices: call it for the whole cache, not for one of its layers")

    def __repr__(self) -> str:
        return f"VirtualLayer(index={self.index}, tokens={self.length})"

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        if self.shape is None or self.storage.kv_cache is None:
            return None, None
        self.storage.require_whole()
        if self._version != self.storage.version:
            self._look_again()
        length = self.length
        return self.full_k[:, :length].transpose(1, 2), self.full_v[:, :length].transpose(1, 2)

    def _look_again(self) -> None:
        """Take the storage's tensors, which are others than before."""
        self.full_k, self.full_v = self.storage.views(self.index)
        self._step_views, self._position = self.storage.step_views(self.index)
        self.backends.clear()
        k, v = self.full_k, self.full_v
        if self.storage.options.attention == "auto" and self._version != self.storage.version:
            self._step = self.storage.uniform_step(k, v)
        self._version = self.storage.version

    def _first_visible(self, start: int) -> int:
        return 0 if self.window is None else max(0, start - self.window + 1)
