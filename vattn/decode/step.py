"""One decode step on the device: its buffers, the graphs that replay it, and the ring that it answers in.

A step gets the slots of its batch as one small tensor and finds everything else through it, so any sequences in any
order share a graph and nothing is copied when the batch changes. What was sampled goes into a ring in host memory,
which the host reads while the next step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from ..attention import AttentionBackend, DecodeBatch, bind
from ..errors import ConfigError
from ..graphs.capture import captured
from ..kv_cache import KVCache
from ..memory.tensors import upload
from ..ops.logprobs import logprobs
from ..requests import MAX_LOGPROBS
from ..tuning import default_decode
from ..tuning.choices import choices_for
from .graphs import GraphReport, StepGraphs, buckets_beside
from .state import Compute, DecodedToken, DecodeModel, DecodeState, features_of
from .ways import Chosen, choose_ways, measured


@runtime_checkable
class CapturableCompute(Protocol):
    """A ``Compute`` that a graph may hold, for others of its kind to replay."""

    def fit(self, batch: int) -> Hashable | None:
        """Get ready to be called for so many rows. Called next on the stream of the step, or replayed.

        Returns:
            What all that is called with these rows has in common, if the rest lies in device tensors at the same
            addresses; None: it is to be launched as it is, and not for these rows.
        """
        ...

    def __call__(self, residual: torch.Tensor, batch: DecodeBatch, attention: AttentionBackend) -> torch.Tensor: ...


RING = 32  # steps whose tokens the ring holds
MAX_STEPS_AHEAD = RING // 2  # left under way
# Beside those the ring holds the steps of a launch, or of a capture on first use: two and those of a launch.
MAX_STEPS_PER_LAUNCH = RING // 4
_REASONS = {0: None, 1: "stop", 2: "length", 3: "error"}


@dataclass(frozen=True)
class LaunchedStep:
    """A step under way.

    Attributes:
        slots: its sequences.
        place: the row of the ring that it writes.
        logprobs: for each sequence that wants log-probabilities: its place in ``slots``, and of how many tokens.
        event: behind it; None on the CPU.
        error: that the log-probabilities could not be computed for.
    """

    slots: tuple[int, ...]
    place: int
    logprobs: tuple[tuple[int, int], ...]
    event: torch.cuda.Event | None
    error: Exception | None = None


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
        mode, steps_per_launch: of ``StepGraphs``.
        stream: to launch on; None on the CPU.

    Attributes:
        fed: whether sequences were given other tokens since the newest launch.

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
        steps_per_launch: int,
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
        on_gpu = device.type == "cuda"
        self._ring = torch.zeros(RING, max_batch, 2, dtype=torch.int32, pin_memory=on_gpu)
        self._logprobs = torch.zeros(RING, max_batch, 1 + 2 * MAX_LOGPROBS, dtype=torch.int32, pin_memory=on_gpu)
        self._logits: torch.Tensor | None = None  # of a step that was launched eagerly
        self._graph_logits: dict[Hashable, _Borrowed] = {}  # of each graph's last replay
        self._newest: tuple[Hashable, int] = None, 0  # graph and sequences of the newest launch
        self._residual = torch.zeros(max_batch, embedding.shape[1], dtype=embedding.dtype, device=device)
        self._rows, self._ends, self._fed, self._sampled = torch.zeros(4, max_batch, dtype=torch.int32, device=device)
        self._batches: dict[int, DecodeBatch] = {}
        self._num_launched = 0
        self.fed = False
        self._graphs = StepGraphs(self._run, buckets, device, mode, steps_per_launch)
        if self._graphs.buckets[-1] != max_batch:
            raise ConfigError(f"the largest bucket must be max_batch, {max_batch}, got {self._graphs.buckets[-1]}")
        self._beside = buckets_beside(self._graphs.buckets)
        with torch.inference_mode(), torch.cuda.stream(stream):
            if stream is not None:
                torch.cuda.synchronize(device)
            self._graphs.capture(self._chosen_ways() if mode == "measure" else None)
            self._counter.zero_()
            self._logits = None

    @property
    def reports(self) -> tuple[GraphReport, ...]:
        """What was captured, by batch size."""
        return self._graphs.reports

    def several(self, slots: list[int]) -> int:
        """Steps of the model's ``decode`` that one launch can take for these slots: one where the caller may have
        something to say between two, or log-probabilities come of each step's logits."""
        if self.fed or any(slot in self.state.masked or slot in self.state.num_logprobs for slot in slots):
            return 1
        return self._graphs.several(self._graphs.bucket_for(len(slots)))

    def launch(self, slots: list[int], compute: Compute | None = None, count: int = 1) -> list[LaunchedStep]:
        """Submit steps for these slots to the current stream, in inference mode.

        Args:
            compute: instead of the model's ``decode``; the step is replayed only where that is a ``CapturableCompute``.
            count: of steps: 1, or ``several`` of these slots, which have as many rows, and of those that get fewer
                tokens one row more than these take.
        """
        self._logits, self.fed = None, False
        place, bucket = self._num_launched % RING, self._graphs.bucket_for(len(slots))
        if compute is None and self._graphs.awaits_capture(bucket):
            with self._on_scratch():
                self._graphs.capture_one(bucket)
        if slots != self._order:
            self._order = []
            padded = np.full(self.max_batch, self._scratch, np.int32)
            padded[: len(slots)] = slots
            self._slots.copy_(self.upload(padded))
            self._order = slots
        self.state.upload_allowed(self.upload)
        wanted = tuple((i, k) for i, slot in enumerate(slots) if (k := self.state.num_logprobs.get(slot)) is not None)
        event = None if self.stream is None else torch.cuda.Event()
        key = self._submit(len(slots), compute, count)
        self._num_launched += count
        self._newest = key, len(slots)
        error = self._add_logprobs(wanted, place) if wanted else None
        if event is not None:
            event.record()
        places = [(place + i) % RING for i in range(count)]
        return [LaunchedStep(tuple(slots), each, wanted, event, error) for each in places]

    def rows_beside(self, batch: int) -> int:
        """Rows that a captured step has for so many sequences where it is captured with other work."""
        return next(bucket for bucket in self._beside if batch <= bucket)

    def capture_beside(self, others: Callable[[int], Iterable[CapturableCompute]]) -> None:
        """Capture steps with other work now. No step is under way.

        Args:
            others: rows of a step -> the work to be captured with it, of all sizes.
        """
        with self._on_scratch():
            for wide in reversed(self._beside):
                for i, compute in enumerate(others(wide)):
                    if (kind := compute.fit(wide)) is not None:
                        key = wide, kind
                        self._graphs.capture_now(key, partial(self._run, wide, compute, key), compiled=i > 0)

    def _submit(self, batch: int, compute: Compute | None, count: int) -> Hashable:
        """Replay steps or launch one; the key of the graph that it has, if there is one."""
        bucket = self._graphs.bucket_for(batch)
        if count > 1:
            return self._graphs.launch_several(bucket)
        if compute is None:
            self._graphs.launch(bucket)
            return bucket
        if isinstance(compute, CapturableCompute):
            wide = self.rows_beside(batch)
            if (kind := compute.fit(wide)) is not None:
                key = wide, kind
                self._graphs.launch_by_need(key, partial(self._run, wide, compute, key))
                return key
        self._run(bucket, compute)
        return None

    def logits(self) -> torch.Tensor:
        """``[sequences, vocab_size]`` of the newest launch, in the order of its slots; the next one overwrites them.

        Raises:
            ConfigError: nothing was launched yet.
        """
        key, count = self._newest
        if not count:
            raise ConfigError("there are no logits before the first step")
        return (self._graph_logits[key].tensor() if self._logits is None else self._logits)[:count]

    def read(self, launched: LaunchedStep) -> list[DecodedToken]:
        """What each sequence of the step got; waits for it."""
        if launched.event is not None:
            launched.event.synchronize()
        asked = self._read_logprobs(launched) if launched.logprobs and launched.error is None else {}
        sampled = self._ring[launched.place, : len(launched.slots)].tolist()
        tokens = [
            DecodedToken(slot, None, _REASONS[reason])
            if token < 0
            else DecodedToken(slot, token, _REASONS[reason], *asked.get(i, ()))
            for i, (slot, (token, reason)) in enumerate(zip(launched.slots, sampled, strict=True))
        ]
        if launched.error is not None:
            for i, _ in launched.logprobs:
                tokens[i] = DecodedToken(launched.slots[i], None, "error", error=launched.error)
        return tokens

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """On the device, in the order of the current stream."""
        return upload(array, self.cache.device)

    def release(self) -> None:
        """Free the graphs. No step may be under way."""
        self._graphs.release()

    @contextmanager
    def _on_scratch(self) -> Iterator[None]:
        """Between steps: what runs in the block does so on rows that are no sequence's, and was no step."""
        self._order = []
        self._slots.fill_(self._scratch)
        try:
            yield
        finally:  # a step whose number the device does not agree with would be read in another's place
            self._counter.fill_(self._num_launched)
            self._logits, self._newest = None, (None, 0)

    def _run(self, bucket: int, compute: Compute | None = None, key: Hashable = None) -> None:
        """The step itself: what is captured. ``key``: of its graph, if that is not the bucket."""
        ops, state = self.model.ops, self.state
        batch = self._batches.get(bucket)
        slots, rows, ends, fed = (t[:bucket] for t in (self._slots, self._rows, self._ends, self._fed))
        if batch is None:
            batch = self._batches[bucket] = DecodeBatch(slots, rows, ends, self.max_seq_len, fed)
        residual = self._residual[:bucket]
        ops.begin_step(slots, state.tokens, state.lengths, self.model.embedding, residual, rows, ends, fed)
        attention = self._attention_for(bucket)
        if compute is None:
            logits = self.model.decode(residual, batch, self.cache, attention)
        else:
            logits = compute(residual, batch, attention)
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            self._logits, self._graph_logits[bucket if key is None else key] = None, _Borrowed(logits)
        else:
            self._logits = logits
        sampled = self._sampled[:bucket]
        ops.sample_tokens(logits, slots, rows, state.sampler, sampled)
        ops.advance(
            sampled,
            slots,
            state.tokens,
            state.lengths,
            state.remaining,
            state.sampler.stop_tokens,
            state.sampler.flags,
            state.sampler.counts,
            self._counter,
            self._ring,
        )

    def _add_logprobs(self, wanted: tuple[tuple[int, int], ...], place: int) -> Exception | None:
        """Compute them for these rows, behind the step, and bring them to the host without waiting.

        Returns what is raised, as memory may run out here: the step is launched already and has to be told of.
        """
        try:
            index = self.upload(np.array([i for i, _ in wanted], np.int64))
            found = logprobs(self.logits()[index], self._sampled[index], max(k for _, k in wanted))
            self._logprobs[place, : found.shape[0], : found.shape[1]].copy_(found, non_blocking=True)
        except Exception as error:
            return error.with_traceback(None)  # whose frames hold the memory that is short
        return None

    def _read_logprobs(self, launched: LaunchedStep) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """By place in the batch: the chosen token's log-probability, and the likeliest tokens with theirs."""
        most = max(k for _, k in launched.logprobs)
        bits = self._logprobs[launched.place, : len(launched.logprobs), : 1 + 2 * most]
        logs, ids = bits.view(torch.float32).tolist(), bits[:, 1 + most :].tolist()
        return {
            i: (logs[j][0], tuple(zip(ids[j][:k], logs[j][1 : 1 + k], strict=True)))
            for j, (i, k) in enumerate(launched.logprobs)
        }

    def _chosen_ways(self) -> dict[int, Chosen]:
        device = self.cache.device
        wait = partial(torch.cuda.synchronize, device)
        return choose_ways(
            self.model,
            self.cache,
            self._scratch,
            self.state.lengths,
            batches=self._graphs.buckets,
            typical_len=min(self._typical_len, self.max_seq_len),
            attention=lambda bucket: self._attention_for(bucket).name,
            run=self._run,
            measure=lambda ways: measured(ways, lambda launch: captured(launch).replay, wait),
            store=choices_for(device),
        )

    def _attention_for(self, bucket: int) -> AttentionBackend:
        if self._attention is not None:
            return self._attention
        if bucket not in self._attentions:
            cache = self.cache
            margin = 0 if cache.over_read_masked else cache.over_read_tokens
            case = (cache.layout, cache.device, bucket, self._typical_len, self.model.num_heads)
            features = features_of(self.model)
            self._attentions[bucket] = bind(default_decode(*case, max_over_read=margin, features=features))
        return self._attentions[bucket]


class _Borrowed:
    """A captured tensor's memory, not kept from later captures of the pool: valid from its graph's replay to the next.

    Held as tensors, every bucket's logits would take memory of their own: 0.8 GB for 256 sequences of 128,256 tokens.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"<i{size}",  # the interface has no bfloat16
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }

    def tensor(self) -> torch.Tensor:
        return torch.as_tensor(self, device=self.device).view(self.dtype)
