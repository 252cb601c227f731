"""Passes that compute parts of prompts: packed, many sequences in one, on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch

from ..attention import AttentionBackend, AttentionBatch
from ..decode import DecodeModel
from ..interrupts import Uninterrupted
from ..kv_cache import KVCache
from ..layout import KVLayout
from ..memory.tensors import upload

__all__ = ["Chunk", "PrefillPasses", "RuntimeModel"]

# Whether a pass runs beside the decode steps, each taking what the other leaves of the GPU, or between two of them.
BESIDE_DECODE = True

_Owner = TypeVar("_Owner")


@runtime_checkable
class RuntimeModel(DecodeModel, Protocol):
    """What the engine asks of a model; ``vattn.models.FusedLlama`` is one."""

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        ...

    def kv_layout(self, max_seq_len: int | None = None) -> KVLayout:
        """The shape of its K and V."""
        ...

    def prefill(self, tokens: torch.Tensor, batch: AttentionBatch, cache: KVCache, attention: AttentionBackend) -> None:
        """Packed tokens ``[num_tokens]`` int64 of many sequences: computes them and appends their K and V."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk(Generic[_Owner]):
    """A part of a prompt: the tokens of rows ``[end - len(tokens), end)`` of a slot.

    Attributes:
        owner: whoever asked for it, to be told when it is done.
        version: the cache's, of the slot: nothing is written to it where it has another one.
    """

    owner: _Owner
    slot: int
    version: int
    tokens: Sequence[int]
    end: int


class PrefillPasses(Generic[_Owner]):
    """Launches passes and says when they are done.

    Args:
        model: computes them.
        cache: holds the sequences.
        attention: of the passes.
        decoding: the stream of decode steps, which go first; None on the CPU, where a pass is done once launched.
    """

    def __init__(
        self,
        model: RuntimeModel,
        cache: KVCache,
        attention: AttentionBackend,
        decoding: torch.cuda.Stream | None,
    ) -> None:
        self._model, self._cache, self._attention, self._decoding = model, cache, attention, decoding
        self._stream = None if decoding is None else torch.cuda.Stream(cache.device, priority=0)
        self._under_way: deque[tuple[list[Chunk[_Owner]], torch.cuda.Event | None]] = deque()

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def launch(self, chunks: list[Chunk[_Owner]]) -> None:
        """Back the rows and submit a pass. Whatever is raised: nothing was launched.

        Raises:
            OutOfPages: no pages for the rows; nothing was changed.
            ConfigError: a slot was released or truncated by somebody else, or the cache is closed.
        """
        slots, ends = [chunk.slot for chunk in chunks], [chunk.end for chunk in chunks]
        versions = [chunk.version for chunk in chunks]
        device, event = self._cache.device, None
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._cache.ensure_batch(slots, ends, versions=versions)
            batch = AttentionBatch.build(slots, [len(chunk.tokens) for chunk in chunks], ends, device)
            tokens = upload([token for chunk in chunks for token in chunk.tokens], device, torch.int64)
            if self._stream is not None and self._decoding is not None and not BESIDE_DECODE:
                self._stream.wait_stream(self._decoding)
            with Uninterrupted():
                with self._cache.step(slots, versions=versions):
                    self._model.prefill(tokens, batch, self._cache, self._attention)
                if self._stream is not None:
                    event = torch.cuda.Event()
                    event.record()
                self._under_way.append((chunks, event))
        if self._stream is not None and self._decoding is not None and not BESIDE_DECODE:
            self._decoding.wait_stream(self._stream)

    def done(self, wait: bool) -> list[Chunk[_Owner]]:
        """Chunks of passes that have ended since the last call, oldest first.

        Args:
            wait: for the oldest one, if none has.
        """
        found: list[Chunk[_Owner]] = []
        while self._under_way:
            chunks, event = self._under_way[0]
            if event is not None and not event.query():
                if not wait or found:
                    break
                event.synchronize()
            self._under_way.popleft()
            found += chunks
        return found

    def settle(self) -> None:
        """Wait for all passes, and forget them."""
        if self._stream is not None:
            self._stream.synchronize()
        self._under_way.clear()
