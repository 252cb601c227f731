"""The ``KVCache`` behind a ``VirtualCache``. It is opened when the first layer shows its shape."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..attention import AttentionBatch
from ..attention.uniform_step import StepState, UniformStep, supports_uniform_step
from ..errors import ConfigError, OutOfPages
from ..kv_cache import KVCache
from ..layout import KVLayout
from .beams import Places
from .shapes import ConfiguredLayer, LayerShape, Shapes
from .step_views import StepViews

__all__ = ["Options", "Storage"]


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where the model decides.

    Attributes:
        attention: ``"auto"``, the name of a backend, or None to leave the model's own attention in place.
        num_stored: slots for sequences that are stored; a larger batch has one for each of its rows. 0: none is stored.
    """

    max_length: int
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    memory_limit: int | None = None
    page_bytes: int | None = None
    attention: str | None = "auto"
    num_stored: int = 0


class Storage:
    """Slot ``i`` holds row ``i`` of the batch. All rows have one length, as in transformers. One more slot is free, for
    rows that change places; behind it are those of stored sequences (``prefixes``).

    The shapes of layers not seen yet are predicted. Where a prediction is wrong, the cache moves to another layout:
    only during the first forward pass.

    Args:
        configured: the attention layers by index.
        options: the user's.

    Attributes:
        kv_cache: None before the first use.
        batch_size: sequences that it holds, -1 before the first use.
        lengths: tokens that each attention layer holds of each sequence, padding included.
        rows: tokens that every slot is backed for.
        version: changes whenever the tensors do.
        steps: what layers share for decode steps by vattn's own launches; None where these are not used.
        launches: whether this pass uses them.
        batch: (what identifies a pass, its batch, its tokens): made by the first layer, used by all.
        awaits_attention: whether K and V were returned and no attention has asked for them yet.
        is_hybrid: whether the model has recurrent layers too, which see what attention computes for padding.
    """

    def __init__(self, configured: dict[int, ConfiguredLayer], options: Options) -> None:
        self.configured = configured
        self.options = options
        self.kv_cache: KVCache | None = None
        self.batch_size = -1
        self.shapes = Shapes(configured)
        self.lengths = dict.fromkeys(configured, 0)
        self.rows = 0
        self._step_views: dict[tuple[int, ...], StepViews] = {}
        self.steps: StepState | None = None
        self._steps_fail = False
        self.batch: tuple[tuple[Any, ...], AttentionBatch, torch.Tensor | None] | None = None
        self.launches = self.is_hybrid = self.awaits_attention = False
        self.version = 0
        self.closed = False
        self.lost = False  # rows changed places and that failed half-way: the slots' content is undefined
        self.not_plain = ""  # why the rows are not those of a batch's tokens alone, as a clause
        self._stream: torch.cuda.Stream | None = None  # of the newest pass

    def require_open(self) -> None:
        """ConfigError after ``close``."""
        if self.closed:
            raise ConfigError("this VirtualCache is closed; make a new one")

    def require_whole(self) -> None:
        """ConfigError after a change of rows that failed."""
        if self.lost:
            raise ConfigError("rows of this cache changed places, which failed half-way: call reset()")

    def note_mask(self, mask: torch.Tensor) -> None:
        """The mask of a pass, ``[batch, tokens]``: rows that are stored depend on tokens alone."""
        if self.options.num_stored and not bool(mask.all()):
            self.not_plain = "a mask has hidden tokens of it, as padding"

    # -- shapes --------------------------------------------------------------------------------------------------
    def admit(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Make room for a layer's K and V, ``[batch, num_kv_heads, tokens, head_dim]``.

        Raises:
            ConfigError: they do not fit what the cache was opened for.
        """
        holds_rows = any(self.lengths.values())
        self._check(layer, k, v, holds_rows)
        shape, cache = LayerShape.of(k, v), self.kv_cache
        if cache is None or (not holds_rows and (self.batch_size != k.shape[0] or cache.layout.dtype != k.dtype)):
            self._drop()
            self.shapes.seen = {layer: shape}
            self._install(self._make(k.shape[0], self._layout(k.dtype), k.device, 0), k.shape[0], 0)
        elif layer not in self.shapes.seen:
            predicted = self.shapes.predict(layer)
            self.shapes.seen[layer] = shape
            if predicted != shape:
                try:
                    self._move(self._layout(k.dtype), range(self.batch_size))
                except BaseException:
                    del self.shapes.seen[layer]
                    raise

    def require_batch(self, size: int) -> None:
        """ConfigError unless the batch has so many sequences, or no tokens yet."""
        if size != self.batch_size and any(self.lengths.values()):
            repeat = f"batch_repeat_interleave({size}) to go on with its one row in {size} ways, or "
            raise ConfigError(
                f"this cache holds a batch of {self.batch_size}, got a batch of {size}: call "
                f"{repeat if self.batch_size == 1 else ''}reset() first, or make a new cache"
            )

    def _layout(self, dtype: torch.dtype) -> KVLayout:
        return self.shapes.layout(self.options.max_length, dtype)

    def _check(self, layer: int, k: torch.Tensor, v: torch.Tensor, holds_rows: bool) -> None:
        options, cache, shape = self.options, self.kv_cache, LayerShape.of(k, v)
        wanted = options.dtype or k.dtype, options.device or k.device
        if k.dtype != v.dtype or k.device != v.device or k.shape[:3] != v.shape[:3]:
            raise ConfigError(f"K and V must agree, got {k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}")
        if k.dtype != wanted[0]:
            raise ConfigError(f"the model computes K and V in {k.dtype}, this cache was made for dtype={wanted[0]}")
        if not _same_device(k.device, wanted[1]):
            raise ConfigError(f"the model is on {k.device}, this cache was made for device={wanted[1]}")
        if cache is None:
            return
        if (known := self.shapes.seen.get(layer, shape)) != shape:
            raise ConfigError(
                f"layer {layer} has {known} in this cache, got {shape}: make a new cache for another model"
            )
        if not _same_device(k.device, cache.device):
            raise ConfigError(
                f"layer {layer} is on {k.device}, this cache on {cache.device}: a cache lives on one device, and a "
                "model spread over several (device_map) needs transformers' own"
            )
        self.require_batch(k.shape[0])
        if holds_rows and k.dtype != cache.layout.dtype:
            raise ConfigError(f"this cache holds {cache.layout.dtype}, got {k.dtype}: make a new cache")

    # -- opening and moving --------------------------------------------------------------------------------------
    def _make(self, batch_size: int, layout: KVLayout, device: torch.device, rows: int) -> KVCache:
        """A ``KVCache`` with a slot for each sequence, backed for ``rows`` tokens, and a spare slot."""
        self.require_open()
        options, limit, page_bytes = self.options, self.options.memory_limit, self.options.page_bytes
        # A batch with more rows than there are slots for would push out rows of its own when it is stored.
        max_slots = batch_size + 1 + (max(options.num_stored, batch_size) if options.num_stored else 0)
        try:
            cache = KVCache(layout, max_slots, device, memory_limit=limit, page_bytes=page_bytes)
        except ConfigError as error:
            raise ConfigError(
                f"no cache for a batch of {batch_size} (and a spare slot) with max_length={layout.max_seq_len}: {error}"
            ) from error
        try:
            slots = [cache.acquire() for _ in range(batch_size)]
            cache.ensure_batch(slots, [rows] * batch_size)
        except BaseException:
            cache.close()
            raise
        return cache

    def _install(self, cache: KVCache | None, batch_size: int, rows: int) -> None:
        self.kv_cache, self.batch_size, self.rows = cache, batch_size, rows
        self._step_views.clear()
        self.steps = self.batch = None
        self.version += 1

    def _drop(self) -> None:
        cache, steps = self.kv_cache, self.steps
        self._install(None, -1, 0)
        if cache is not None:
            cache.close()
        del steps  # only now: closing waits for the work on the device, which reads them

    def _copied(self, layout: KVLayout, index: Sequence[int]) -> KVCache:
        """A new cache whose batch row ``i`` holds what row ``index[i]`` of this one does, layer by layer."""
        old = self.kv_cache
        assert old is not None
        self.order()
        new = self._make(len(index), layout, old.device, self.rows)
        try:
            for layer, length in self.lengths.items():
                if not length:
                    continue  # a layer not seen yet, which may be of another shape
                for target, source in zip((new.k(layer), new.v(layer)), (old.k(layer), old.v(layer)), strict=True):
                    for row, picked in enumerate(index):  # one by one: a view of all rows has some with no memory
                        target[row, :length] = source[picked, :length]
        except BaseException:
            new.close()
            raise
        self.submitted()
        return new

    def _move(self, layout: KVLayout, sources: Iterable[int]) -> None:
        """Continue in another cache. Both exist for a moment, each within ``memory_limit``."""
        old, index = self.kv_cache, list(sources)
        assert old is not None
        self._install(self._copied(layout, index), len(index), self.rows)
        old.close()

    def reorder(self, sources: Sequence[int]) -> None:
        """Make batch row ``i`` the old row ``sources[i]``, sharing memory with the others that are.

        Raises:
            OutOfPages: the rows fit neither by sharing pages nor as copies. After this, as after any other error, the
                cache has to be reset.
        """
        rows, cache = max(self.lengths.values()), self.kv_cache
        if cache is None or not rows:
            return
        self.not_plain = "rows have changed places, as in beam search"
        places = Places(cache, self.batch_size)
        self.order()
        try:
            try:
                places.change(sources, rows)
                self.rows = rows
            except OutOfPages:
                self._move(cache.layout, places.where(sources))
        except BaseException:
            self.lost = True
            places.restore()
            raise

    def regroup(self, sources: Iterable[int]) -> None:
        """Make batch row ``i`` the old row ``sources[i]``; the batch may grow or shrink."""
        if self.kv_cache is not None:
            self.not_plain = "rows have changed places"
            self._move(self.kv_cache.layout, sources)

    def copy(self) -> Storage:
        """The same content in memory of its own."""
        other = Storage(self.configured, self.options)
        other.shapes.seen, other.lengths = dict(self.shapes.seen), dict(self.lengths)
        other._steps_fail, other.not_plain = self._steps_fail, self.not_plain
        if (cache := self.kv_cache) is not None:
            other._install(self._copied(cache.layout, range(self.batch_size)), self.batch_size, self.rows)
            other._stream = self._stream
        return other

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, ``[batch, max_length, num_kv_heads, head_dim]``, backed as far as ``rows``."""
        assert self.kv_cache is not None
        return self.kv_cache.k(layer)[: self.batch_size], self.kv_cache.v(layer)[: self.batch_size]

    def step_views(self, layer: int) -> tuple[StepViews, int]:
        """The ``StepViews`` of this layer's group, and the layer's position in it."""
        assert self.kv_cache is not None
        layers = next(tuple(group.layers) for group in self.kv_cache.layout.groups if layer in group.layers)
        if layers not in self._step_views:
            self._step_views[layers] = StepViews([self.views(each) for each in layers])
        return self._step_views[layers], layers.index(layer)

    def uniform_step(self, k: torch.Tensor, v: torch.Tensor) -> UniformStep | None:
        """vattn's launches of decode steps for the layer with these ``views``; None where they cannot run."""
        if self._steps_fail or not supports_uniform_step(k.device, k.dtype, k.shape[3], v.shape[3]):
            return None
        if self.steps is None:
            self.steps = StepState(self.batch_size, self.options.max_length, k.device)
        return UniformStep(self.steps, k, v)

    def give_up_steps(self, error: Exception) -> None:
        """A launch failed on this machine: from here on decode steps use torch's operations."""
        self.steps, self._steps_fail, self.launches = None, True, False
        warnings.warn(
            f"vattn's kernel for decode steps does not work here, and others take its place, more slowly: {error}",
            stacklevel=4,
        )

    # -- rows ----------------------------------------------------------------------------------------------------
    def ensure(self, rows: int) -> None:
        """Back ``rows`` tokens of every sequence.

        Raises:
            ConfigError: more than ``max_length``.
            OutOfPages: they do not fit in the memory limit.
        """
        if rows > self.options.max_length:
            raise ConfigError(
                f"this forward pass needs {rows} tokens of cache, max_length is {self.options.max_length}: make the "
                "VirtualCache with a max_length of at least the prompt and all new tokens (and as many more as prompt "
                "lookup guesses, prompt_lookup_num_tokens), or call reset() before a text that does not go on with the "
                "one it holds"
            )
        if rows > self.rows:
            assert self.kv_cache is not None
            self.kv_cache.ensure_batch(np.arange(self.batch_size), np.full(self.batch_size, rows))
            self.rows = rows

    def truncate(self, lengths: dict[int, int]) -> None:
        """Shorten layers, and give back whole pages past the longest."""
        self.lengths.update(lengths)
        rows = max(self.lengths.values())
        if not rows:
            self.lost, self.not_plain = False, ""
        if self.kv_cache is not None and rows < self.rows:
            self.order()
            self.rows = rows  # first: after an interrupt slots may be longer than this, never shorter
            for slot in range(self.batch_size):
                self.kv_cache.truncate(slot, rows)

    def order(self) -> None:
        """Make the current stream wait for the newest pass, if that ran on another stream."""
        if self._stream is not None and self._stream != (stream := torch.cuda.current_stream(self._stream.device)):
            stream.wait_stream(self._stream)

    def submitted(self) -> None:
        """Copies were, to the current stream: whoever comes next waits for them."""
        if self._stream is not None:
            self._stream = torch.cuda.current_stream(self._stream.device)

    def begin_pass(self, layer: int) -> None:
        """Check that all layers hold equally many tokens, and order this pass after the one before.

        Raises:
            ConfigError: they do not, because the pass before did not fill all layers.
        """
        behind = [other for other, length in self.lengths.items() if length != self.lengths[layer]]
        if behind:
            raise ConfigError(
                f"layers {behind} hold another number of tokens than layer {layer}: the forward pass before this one "
                "was interrupted, another model's, of fewer layers than the config says (num_hidden_layers), or did "
                "not take its layers in order. reset() the cache, and use it for one model"
            )
        on_gpu = self.kv_cache is not None and self.kv_cache.device.type == "cuda"
        # A graph that a user captures gets torch's operations.
        self.launches = self.steps is not None and not (on_gpu and torch.cuda.is_current_stream_capturing())
        if on_gpu:
            assert self.kv_cache is not None
            self.order()  # of two passes on two streams
            self._stream = torch.cuda.current_stream(self.kv_cache.device)

    def close(self) -> None:
        """Free everything. Idempotent."""
        self.closed = True
        self.order()
        self._drop()


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))
