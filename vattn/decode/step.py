"""One decode step on the device: its buffers, the graphs that replay it, and the ring that it answers in.

A step gets the slots of its batch as one small tensor and finds everything else through it, so any sequences in any
order share a graph and nothing is copied when the batch changes. What was sampled goes into a ring in host memory,
which the host reads while the next step runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..attention import AttentionBackend, DecodeBatch, bind
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..memory.tensors import upload
from ..tuning import default_decode
from .graphs import GraphReport, StepGraphs
from .state import DecodeModel, DecodeState

RING = 8  # steps whose tokens the ring holds
_REASONS = {0: None, 1: "stop", 2: "length"}


@dataclass(frozen=True)
class LaunchedStep:
    """A step under way: how many sequences it has, the row of the ring that it writes, and the event behind it."""

    num_sequences: int
    place: int
    event: torch.cuda.Event | None


class DecodeStep:
    """Captured once, valid while sequences come, grow and go.

    Args:
        model: computes the step.
        cache: holds the sequences.
        state: of the sequences, by slot.
        scratch: the slot that fills up a batch; it has a row.
        max_batch: sequences of a step.
        attention: backend, bound; None for the one measured as fastest for each batch size.
        typical_len: rows that sequences are expected to have, for that choice.
        max_seq_len: rows of a sequence.
        buckets: batch sizes to capture, the largest of them ``max_batch``.
        mode: of ``StepGraphs``.
        stream: to launch on; None on the CPU.

    Raises:
        ConfigError: the buckets do not end with ``max_batch``, or cannot be captured.
    """

    def __init__(
        self,
        model: DecodeModel,
        cache: KVCache,
        state: DecodeState,
        scratch: int,
        *,
        max_batch: int,
        attention: AttentionBackend | None,
        typical_len: int,
        max_seq_len: int,
        buckets: Sequence[int],
        mode: str,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.model, self.cache, self.state, self.stream = model, cache, state, stream
        self.max_batch, self.max_seq_len = max_batch, max_seq_len
        self._attention, self._typical_len = attention, typical_len
        self._attentions: dict[int, AttentionBackend] = {}  # by batch size
        self._scratch = scratch
        device, embedding = cache.device, model.embedding
        self._slots = torch.full((max_batch,), scratch, dtype=torch.int32, device=device)
        self._order: list[int] = []  # of the batch that ``_slots`` holds
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._ring = torch.zeros(RING, max_batch, 2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._residual = torch.zeros(max_batch, embedding.shape[1], dtype=embedding.dtype, device=device)
        self._rows, self._ends, self._sampled = torch.zeros(3, max_batch, dtype=torch.int32, device=device)
        self._batches: dict[int, DecodeBatch] = {}
        self._num_launched = 0
        self._graphs = StepGraphs(self._run, buckets, device, mode)
        if self._graphs.buckets[-1] != max_batch:
            raise ConfigError(f"the largest bucket must be max_batch, {max_batch}, got {self._graphs.buckets[-1]}")
        with torch.inference_mode(), torch.cuda.stream(stream):
            if stream is not None:
                torch.cuda.synchronize(device)
            self._graphs.capture()
            self._counter.zero_()

    @property
    def reports(self) -> tuple[GraphReport, ...]:
        """What was captured, by batch size."""
        return self._graphs.reports

    def launch(self, slots: list[int]) -> LaunchedStep:
        """Submit a step for these slots to the current stream, in inference mode."""
        if slots != self._order:
            self._order = []
            padded = np.full(self.max_batch, self._scratch, np.int32)
            padded[: len(slots)] = slots
            self._slots.copy_(self.upload(padded))
            self._order = slots
        self._graphs.launch(self._graphs.bucket_for(len(slots)))
        event = None
        if self.stream is not None:
            event = torch.cuda.Event()
            event.record()
        launched = LaunchedStep(len(slots), self._num_launched % RING, event)
        self._num_launched += 1
        return launched

    def read(self, launched: LaunchedStep) -> list[tuple[int, str | None]]:
        """(token, why its sequence ends or None) of each sequence of the step; waits for it."""
        if launched.event is not None:
            launched.event.synchronize()
        sampled = self._ring[launched.place, : launched.num_sequences].tolist()
        return [(token, _REASONS[reason]) for token, reason in sampled]

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """On the device, in the order of the current stream."""
        return upload(array, self.cache.device)

    def release(self) -> None:
        """Free the graphs. No step may be under way."""
        self._graphs.release()

    def _run(self, bucket: int) -> None:
        """The step itself: what is captured."""
        ops, state = self.model.ops, self.state
        batch = self._batches.get(bucket)
        slots, rows, ends, residual = (t[:bucket] for t in (self._slots, self._rows, self._ends, self._residual))
        if batch is None:
            batch = self._batches[bucket] = DecodeBatch(slots, rows, ends, self.max_seq_len)
        ops.begin_step(slots, state.tokens, state.lengths, self.model.embedding, residual, rows, ends)
        logits = self.model.decode(residual, batch, self.cache, self._attention_for(bucket))
        sampled = self._sampled[:bucket]
        ops.sample_tokens(logits, slots, rows, state.temperature, state.top_k, state.top_p, state.seeds, sampled)
        ops.advance(
            sampled,
            slots,
            state.tokens,
            state.lengths,
            state.remaining,
            state.stop_tokens,
            self._counter,
            self._ring,
        )

    def _attention_for(self, bucket: int) -> AttentionBackend:
        if self._attention is not None:
            return self._attention
        if bucket not in self._attentions:
            cache = self.cache
            margin = 0 if cache.over_read_masked else cache.over_read_tokens
            case = (cache.layout, cache.device, bucket, self._typical_len, self.model.num_heads)
            self._attentions[bucket] = bind(default_decode(*case, max_over_read=margin))
        return self._attentions[bucket]
