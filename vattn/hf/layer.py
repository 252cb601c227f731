"""One attention layer of a ``VirtualCache``, as transformers knows layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
    """An attribute of transformers' layers that is computed from the storage here."""

    def __set__(self, instance: Any, value: Any) -> NoReturn:
        name = getattr(self.fget, "__name__", "it")
        raise ConfigError(f"{name} of a VirtualCache cannot be set: write to keys and values in place, or call update")


def _of_the_whole_cache(name: str) -> Callable[..., NoReturn]:
    """A method that one layer cannot offer: rows that continue one another share the memory of all layers."""

    def refuse(self: VirtualLayer, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"{name}: call it for the whole cache, not for one of its layers")

    return refuse


class MaskLength(int):
    """A KV length that knows its layer, so that vattn's mask function knows whose mask it makes."""

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
        backends: vattn's attention for this layer, by the features that it needs.
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
        self._fits: tuple[Any, ...] | None = None  # what the newest update looked like
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
            sliding window the new ones and ``window - 1`` before them. After ``crop``, ``reset`` or ``close`` there is
            no memory behind them: do not read them then.

        Raises:
            ConfigError: they do not fit this cache, or record gradients.
            OutOfPages: no memory for them.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ConfigError(
                "K and V of this forward pass record gradients, which a cache in place cannot keep: run it under "
                "torch.no_grad(), or train with use_cache=False"
            )
        storage, index, num_new = self.storage, self.index, key_states.shape[2]
        # Tensors that look like the newest update's need no checks.
        looks = (key_states.shape, value_states.shape, key_states.dtype, value_states.dtype, key_states.device)
        if looks != self._fits or self._version != storage.version:
            if looks[2] != looks[3] and torch.is_autocast_enabled(looks[4].type):
                dtype = torch.get_autocast_dtype(looks[4].type)  # some rotary embeddings leave K in float32
                key_states, value_states = key_states.to(dtype), value_states.to(dtype)
            self.lazy_initialization(key_states, value_states)
            self._fits = looks if looks[2] == looks[3] else None
        if self.is_first:
            storage.begin_pass(index)
        start = storage.lengths[index]
        end = start + num_new
        if end > storage.rows:
            storage.ensure(end)
        self.num_new = num_new
        assert self._step_views is not None
        keys, values = self._step_views.read.cut(self._position, self._first_visible(start), end)
        if not (num_new == 1 and storage.launches and self._append_step(key_states, value_states, end)):
            new_keys, new_values = self._step_views.written.cut(self._position, start, end)
            new_keys.copy_(key_states)
            new_values.copy_(value_states)
        storage.lengths[index] = end
        if storage.options.attention is not None:  # vattn's attention function knows K and V by this
            keys._vattn_layer = values._vattn_layer = self  # type: ignore[attr-defined]
            _THREAD.updated = storage.awaits_attention = True
        return keys, values

    def _append_step(self, key_states: torch.Tensor, value_states: torch.Tensor, end: int) -> bool:
        """Append a token of each sequence by vattn's own launch; False where that does not work."""
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
        """A launch failed. Without memory the next may work; after any other error there are no more launches."""
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            self.storage.give_up_steps(error)

    def attend_step(self, q: torch.Tensor, scale: float | None, **features: Any) -> torch.Tensor | None:
        """Attention of a step of one token over every row, or every row in the window; None where that does not work.

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
        """Forget this layer's tokens. The next pass needs all layers to be equally long."""
        self.storage.require_open()
        self.storage.truncate({self.index: 0})

    def crop(self, tokens_to_remove: int) -> None:
        """Forget this layer's newest tokens.

        Args:
            tokens_to_remove: minus their number. A positive number is the length to keep, where the installed
                transformers takes one.

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
            DynamicLayer().crop(number)  # transformers says whether a positive number is allowed
        except ValueError as error:
            raise ConfigError(f"crop({number}): give minus the number of tokens to remove") from error
        return min(self.length, number)

    def activate_past_recording(self) -> None:
        """Set ``record_past`` only: rows outside the window are kept in any case, for ``crop``."""
        if self.is_sliding:
            self.record_past = True

    def offload(self) -> None:
        """Nothing on a CPU, as in transformers.

        Raises:
            ConfigError: the cache is on a GPU.
        """
        device = self.device
        if device is not None and device.type != "cpu":
            raise ConfigError(f"this cache lives on {device}, and cannot be offloaded: use transformers' own")

    def prefetch(self) -> None:
        """Nothing: this layer is never offloaded."""

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

    reorder_cache = _of_the_whole_cache("reorder_cache")
    batch_repeat_interleave = _of_the_whole_cache("batch_repeat_interleave")
    batch_select_indices = _of_the_whole_cache("batch_select_indices")

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
        """Take the storage's tensors, which have changed."""
        self.full_k, self.full_v = self.storage.views(self.index)
        self._step_views, self._position = self.storage.step_views(self.index)
        self.backends.clear()
        k, v = self.full_k, self.full_v
        if self.storage.options.attention == "auto" and self._version != self.storage.version:
            self._step = self.storage.uniform_step(k, v)
        self._version = self.storage.version

    def _first_visible(self, start: int) -> int:
        return 0 if self.window is None else max(0, start - self.window + 1)
