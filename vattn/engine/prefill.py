"""Passes that compute parts of prompts: packed, many sequences in one, alone or with the rows of a decode step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..attention import AttentionBackend, AttentionBatch, DecodeBatch
from ..decode import DecodeModel
from ..interrupts import Uninterrupted
from ..kv_cache import KVCache
from ..layout import KVLayout
from ..memory.tensors import upload

__all__ = ["Chunk", "PrefillPasses", "RuntimeModel"]

_MOST_UNDER_WAY = 2  # passes that nobody decodes beside: one that runs, and one to follow it at once


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


@runtime_checkable
class MixedModel(Protocol):
    """A model that computes prompts and decode rows in one pass; with any other one follows the other."""

    def prefill_and_decode(
        self,
        tokens: torch.Tensor,
        prefill: AttentionBatch,
        prefill_attention: AttentionBackend,
        residual: torch.Tensor,
        decode: DecodeBatch,
        decode_attention: AttentionBackend,
        cache: KVCache,
    ) -> torch.Tensor:
        """``prefill`` and ``decode`` -> the logits of ``decode``."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a prompt: the tokens of rows ``[end - len(tokens), end)`` of a slot.

    Attributes:
        version: the cache's, of the slot: nothing is written to it where it has another one.
    """

    slot: int
    version: int
    tokens: Sequence[int]
    end: int


class Riding:
    """A pass that is going to be part of the next decode step, which calls this to compute both.

    Attributes:
        versions: slot -> version, of the prompts.
        is_launched: whether it was called, and raised nothing.
    """

    def __init__(self, passes: PrefillPasses, chunks: list[Chunk], tokens: torch.Tensor, batch: AttentionBatch) -> None:
        self.versions, self.is_launched = {chunk.slot: chunk.version for chunk in chunks}, False
        self._passes, self._tokens, self._batch = passes, tokens, batch

    def __call__(self, residual: torch.Tensor, batch: DecodeBatch, attention: AttentionBackend) -> torch.Tensor:
        model, cache, prompts = self._passes.model, self._passes.cache, self._passes.attention
        if isinstance(model, MixedModel):
            logits = model.prefill_and_decode(self._tokens, self._batch, prompts, residual, batch, attention, cache)
        else:
            model.prefill(self._tokens, self._batch, cache, prompts)
            logits = model.decode(residual, batch, cache, attention)
        self.is_launched = True
        return logits


class PrefillPasses:
    """Launches passes, on the stream of the decode steps: what starts to decode after one finds its rows there.

    Decode rows ride in a pass where there are any. That reads the weights once for both: beside 8 sequences a prompt of
    16,384 tokens takes an H100 520 ms in passes of 1,024 (8B; 470 alone), and no sequence waits longer than 40. In turn
    with decode steps it takes 629, beside them on a stream of its own 690, with waits of 60 and 70.

    Args:
        model: computes them.
        cache: holds the sequences.
        attention: of the passes.
        stream: of the decode steps; None on the CPU.
    """

    def __init__(
        self, model: RuntimeModel, cache: KVCache, attention: AttentionBackend, stream: torch.cuda.Stream | None
    ) -> None:
        self.model, self.cache, self.attention = model, cache, attention
        self._stream = stream
        self._under_way: deque[torch.cuda.Event] = deque()

    def launch(self, chunks: list[Chunk]) -> None:
        """Back the rows and submit a pass by itself; waits while two are under way. Whatever is raised: nothing was
        launched.

        Raises:
            OutOfPages: no pages for the rows; nothing was changed.
            ConfigError: a slot was released or truncated by somebody else, or the cache is closed.
        """
        tokens, batch = self._prepare(chunks)
        versions = [chunk.version for chunk in chunks]
        while len(self._under_way) >= _MOST_UNDER_WAY:
            self._under_way[0].synchronize()
            self._under_way.popleft()
        with (
            Uninterrupted(),
            torch.inference_mode(),
            torch.cuda.stream(self._stream),
            self.cache.step(batch.slots, versions=versions),
        ):
            self.model.prefill(tokens, batch, self.cache, self.attention)
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record()
                self._under_way.append(event)

    def riding(self, chunks: list[Chunk]) -> Riding:
        """Back the rows, for a pass that the next decode step launches.

        Raises:
            OutOfPages, ConfigError: as ``launch``.
        """
        return Riding(self, chunks, *self._prepare(chunks))

    def settle(self) -> None:
        """Wait for all passes."""
        if self._stream is not None:
            self._stream.synchronize()
        self._under_way.clear()

    def _prepare(self, chunks: list[Chunk]) -> tuple[torch.Tensor, AttentionBatch]:
        slots, ends = [chunk.slot for chunk in chunks], [chunk.end for chunk in chunks]
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self.cache.ensure_batch(slots, ends, versions=[chunk.version for chunk in chunks])
            batch = AttentionBatch.build(slots, [len(chunk.tokens) for chunk in chunks], ends, self.cache.device)
            tokens = upload([token for chunk in chunks for token in chunk.tokens], self.cache.device, torch.int64)
        return tokens, batch
