"""Passes that compute parts of prompts: packed, many sequences in one, alone or with the rows of a decode step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..attention import AttentionBackend, AttentionBatch, DecodeBatch, PromptBatch, declared
from ..decode import DecodeModel
from ..interrupts import Uninterrupted
from ..kv_cache import KVCache
from ..layout import KVLayout
from ..memory.tensors import upload

__all__ = ["Chunk", "PrefillPasses", "PromptPass", "RuntimeModel"]

_MOST_UNDER_WAY = 2  # passes that nobody decodes beside: one that runs, and one to follow it at once
# Of a captured pass. A larger one takes the GPU longer than launching it takes the host.
_MOST_ROWS, _MOST_SEQUENCES = 2048, 64


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


class PromptPass:
    """Parts of prompts whose rows are backed, to be computed by themselves or in a decode step, which calls this.

    Attributes:
        versions: slot -> version, of the prompts.
        is_taken: whether a decode step has launched it, if it has raised nothing.
    """

    def __init__(self, passes: PrefillPasses, chunks: list[Chunk], num_tokens: int | None = None) -> None:
        self._num_tokens = sum(len(chunk.tokens) for chunk in chunks) if num_tokens is None else num_tokens
        self.versions, self.is_taken = {chunk.slot: chunk.version for chunk in chunks}, False
        self._passes, self._chunks = passes, chunks
        self._tokens: torch.Tensor | None = None
        self._batch: AttentionBatch | None = None

    def packed(self) -> tuple[torch.Tensor, AttentionBatch]:
        """Tokens and batch, on the device: of fixed size where ``fit`` has found one."""
        if self._tokens is None or self._batch is None:
            chunks, device = self._chunks, self._passes.cache.device
            lens, ends = [len(chunk.tokens) for chunk in chunks], [chunk.end for chunk in chunks]
            self._batch = AttentionBatch.build(list(self.versions), lens, ends, device)
            self._tokens = upload([token for chunk in chunks for token in chunk.tokens], device, torch.int64)
        return self._tokens, self._batch

    def num_rows(self, beside: int) -> int:
        """Rows of the pass with so many decode rows, about: as captured passes are filled up."""
        return _rounded(self._num_tokens + beside)

    def fit(self, batch: int) -> int | None:
        """As ``CapturableCompute`` wants it: the size of the pass that this is filled into."""
        chunks = self._chunks
        fixed = self._passes.fixed(self._num_tokens, len(chunks), batch)
        if fixed is None:
            return None
        fixed.fill(
            list(self.versions), [chunk.tokens for chunk in chunks], [chunk.end for chunk in chunks],
            self._passes.spare_slot,
        )  # fmt: skip
        self._tokens, self._batch, self.is_taken = fixed.tokens, fixed, True
        return fixed.num_tokens

    def __call__(self, residual: torch.Tensor, batch: DecodeBatch, attention: AttentionBackend) -> torch.Tensor:
        model, cache, prompts = self._passes.model, self._passes.cache, self._passes.attention
        tokens, of_prompts = self.packed()
        self.is_taken = True
        if isinstance(model, MixedModel):
            return model.prefill_and_decode(tokens, of_prompts, prompts, residual, batch, attention, cache)
        model.prefill(tokens, of_prompts, cache, prompts)
        return model.decode(residual, batch, cache, attention)


class PrefillPasses:
    """Launches passes, on the stream of the decode steps: what starts to decode after one finds its rows there.

    Decode rows ride in a pass where there are any. That reads the weights once for both: beside 8 sequences a prompt of
    16,384 tokens takes an H100 520 ms in passes of 1,024 (8B; 470 alone), and no sequence waits longer than 40. In turn
    with decode steps it takes 629, beside them on a stream of its own 690, with waits of 60 and 70.

    Small passes with decode rows are filled up to fixed sizes and captured: launching one kernel by kernel keeps the
    host busy for longer (30 to 50 ms, 8B) than the GPU takes for 1,024 tokens.

    Args:
        model: computes them.
        cache: holds the sequences.
        attention: of the passes.
        stream: of the decode steps; None on the CPU.
        spare_slot: a slot with one row that is nobody's, for tokens that fill up a pass.
    """

    def __init__(
        self,
        model: RuntimeModel,
        cache: KVCache,
        attention: AttentionBackend,
        stream: torch.cuda.Stream | None,
        spare_slot: int,
    ) -> None:
        self.model, self.cache, self.attention, self.spare_slot = model, cache, attention, spare_slot
        self._stream = stream
        self._captures = stream is not None and declared(attention, "captures_prompts")
        self._fixed: dict[int, PromptBatch] = {}  # by tokens
        self._under_way: deque[torch.cuda.Event] = deque()

    def prepare(self, chunks: list[Chunk]) -> PromptPass:
        """Back the rows of a pass.

        Raises:
            OutOfPages: no pages for the rows; nothing was changed.
            ConfigError: a slot was released or truncated by somebody else, or the cache is closed.
        """
        slots, ends = [chunk.slot for chunk in chunks], [chunk.end for chunk in chunks]
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self.cache.ensure_batch(slots, ends, versions=[chunk.version for chunk in chunks])
        return PromptPass(self, chunks)

    def launch(self, one: PromptPass) -> None:
        """Submit a pass by itself; waits while two are under way. Whatever is raised: nothing was launched.

        Raises:
            ConfigError: as ``prepare``.
        """
        while len(self._under_way) >= _MOST_UNDER_WAY:
            self._under_way[0].synchronize()
            self._under_way.popleft()
        with (
            Uninterrupted(),
            torch.inference_mode(),
            torch.cuda.stream(self._stream),
            self.cache.step(list(one.versions), versions=list(one.versions.values())),
        ):
            self.model.prefill(*one.packed(), self.cache, self.attention)
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record()
                self._under_way.append(event)

    @property
    def idle(self) -> bool:
        """Whether a device beside the host has no pass to compute."""
        return self._stream is not None and all(event.query() for event in self._under_way)

    def of_all_sizes(self, beside: int) -> Iterator[PromptPass]:
        """Passes without prompts, one of each size that is captured with so many decode rows, the largest first."""
        sizes = {_rounded(rows) for rows in range(beside + 1, _MOST_ROWS + 1)} if self._captures else ()
        for rows in sorted(sizes, reverse=True):
            yield PromptPass(self, [], rows - beside)

    def room(self, budget: int, beside: int) -> int:
        """Prompt tokens of a pass that takes ``budget`` at most, beside so many decode rows: to fill a captured one,
        but for passes that would have few of them."""
        room = min(budget, _rounded(budget) - beside)
        return room if self._captures and budget <= _MOST_ROWS and 2 * room >= budget else budget

    def fixed(self, num_tokens: int, num_sequences: int, beside: int) -> PromptBatch | None:
        """What a captured pass of so many prompt tokens and decode rows reads; None: it is not going to be captured."""
        if not self._captures or num_sequences > _MOST_SEQUENCES or num_tokens + beside > _MOST_ROWS:
            return None
        size = _rounded(num_tokens + beside) - beside
        if size not in self._fixed:
            most = min(self.cache.layout.max_seq_len, self.model.max_seq_len)
            self._fixed[size] = PromptBatch(size, _MOST_SEQUENCES, most, self.cache.device)
        return self._fixed[size]

    def settle(self) -> None:
        """Wait for all passes."""
        if self._stream is not None:
            self._stream.synchronize()
        self._under_way.clear()


def _rounded(rows: int) -> int:
    """Up to a size of captured passes: rows of matrix products are computed in tiles of 128."""
    step = 128 if rows <= 1024 else 256
    return -(-rows // step) * step
