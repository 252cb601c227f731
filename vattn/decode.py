"""The decode loop: sequences come and go, each step is one replay, and the host never makes the GPU wait.

Everything that a step reads lies in device tensors with an entry per slot: the token that a sequence feeds next, its
length, how to sample, when to stop. A step gets the slots of its batch as one small tensor and finds the rest through
it, so any sequences in any order share a graph and nothing is copied when the batch changes. The step writes what it
sampled into a ring in host memory, which the host reads while the next step runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from .arguments import is_int, require_int
from .attention import AttentionBackend, DecodeBatch, bind, require_fit
from .decode_state import DecodeModel, DecodeState, Sampling
from .errors import ConfigError
from .graphs import GraphReport, StepGraphs, default_buckets
from .kv_cache import KVCache
from .mapper import MapAhead
from .ops.sampling import validate_sampling
from .tuning import decode_attention

__all__ = ["DecodeLoop", "DecodeModel", "DecodedToken", "Sampling"]

_RING = 8  # steps whose tokens the ring holds; two are under way at most
_REASONS = {0: None, 1: "stop", 2: "length"}


@dataclass(frozen=True, slots=True)
class DecodedToken:
    """A new token of a slot; ``finish_reason`` is ``"stop"``, ``"length"``, or None while it goes on."""

    slot: int
    token: int
    finish_reason: str | None = None


@dataclass(eq=False)
class _Live:
    """A sequence that is decoding: once the launched steps have run, it has ``rows`` rows in the cache."""

    slot: int
    rows: int


@dataclass(frozen=True)
class _Launched:
    """A step under way: its sequences, the row of the ring that it writes, and the event behind it."""

    sequences: tuple[_Live, ...]
    place: int
    event: torch.cuda.Event | None


class DecodeLoop:
    """Decodes sequences whose prompts are in the cache.

    While a slot decodes it belongs to the loop: rows are mapped ahead of it, which its ``seq_len`` counts too. When
    its end is reported (or ``cancel`` returns) the slot holds exactly the rows of its tokens again, all but the newest
    token's; it is the caller's to fork, go on with, or release.

    Args:
        model: computes a step.
        cache: holds the sequences. One slot is taken for rows that only fill up a batch.
        max_batch: sequences of a step; None for all slots of the cache but that one.
        attention: backend for decode; None for the one measured as fastest for each batch size, of those that the
            cache has a margin for.
        typical_len: rows that sequences are expected to have, for that choice; None for half of what they can have.
        buckets: batch sizes to capture; None for ``default_buckets``.
        graphs: ``"always"``, ``"measure"`` or ``"never"`` (see ``StepGraphs``); None: always on CUDA, never elsewhere.
        ahead_tokens: rows to map ahead of each sequence; None for two pages' worth.
        mapping: ``"thread"``, or ``"inline"`` to map between steps in the caller's thread.
        max_stop_tokens: of a sequence.

    Attributes:
        stream: that steps are launched on; None on the CPU.

    Raises:
        ConfigError: an argument is wrong, or model, attention and cache do not fit each other.
    """

    def __init__(
        self,
        model: DecodeModel,
        cache: KVCache,
        *,
        max_batch: int | None = None,
        attention: AttentionBackend | None = None,
        typical_len: int | None = None,
        buckets: Sequence[int] | None = None,
        graphs: str | None = None,
        ahead_tokens: int | None = None,
        mapping: str = "thread",
        max_stop_tokens: int = 8,
    ) -> None:
        self.model, self.cache = model, cache
        self.max_seq_len = min(cache.layout.max_seq_len, model.max_seq_len)
        if cache.max_slots < 2:
            raise ConfigError("the decode loop takes a slot for itself: open the cache with max_slots of at least 2")
        self.max_batch = require_int("max_batch", max_batch or cache.max_slots - 1, 1, cache.max_slots - 1)
        if mapping not in ("thread", "inline"):
            raise ConfigError(f"mapping must be 'thread' or 'inline', got {mapping!r}")
        if model.embedding.device != cache.device:
            raise ConfigError(f"the model is on {model.embedding.device}, the cache on {cache.device}")
        if attention is not None:
            require_fit(attention, cache)
            attention = bind(attention)
        self._attention = attention
        self._attentions: dict[int, AttentionBackend] = {}  # by batch size
        self._typical_len = require_int("typical_len", typical_len or max(1, self.max_seq_len // 2), 1)
        device = cache.device
        self.state = DecodeState(cache.max_slots, require_int("max_stop_tokens", max_stop_tokens, 1), device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pinned = device.type == "cuda"
        self._slots = torch.zeros(self.max_batch, dtype=torch.int32, device=device)
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._ring = torch.zeros(_RING, self.max_batch, 2, dtype=torch.int32, pin_memory=pinned)
        self._num_launched = 0
        self._live: dict[int, _Live] = {}
        self._order: list[int] = []  # of the batch that ``_slots`` holds
        self._under_way: deque[_Launched] = deque()
        hidden = model.embedding.shape[1]
        self._residual = torch.zeros(self.max_batch, hidden, dtype=model.embedding.dtype, device=device)
        self._rows, self._ends, self._sampled = torch.zeros(3, self.max_batch, dtype=torch.int32, device=device)
        self._batches: dict[int, DecodeBatch] = {}
        if ahead_tokens is None:
            ahead_tokens = max(16, math.ceil(2 * cache.layout.tokens_per_page(cache.page_bytes)))
        self._closed = False
        self._scratch = cache.acquire()
        try:
            cache.ensure(self._scratch, 1)
            self._slots.fill_(self._scratch)
            mode = ("always" if device.type == "cuda" else "never") if graphs is None else graphs
            self._graphs = StepGraphs(self._run, buckets or default_buckets(self.max_batch), device, mode)
            if self._graphs.buckets[-1] < self.max_batch:
                raise ConfigError(f"the largest bucket must be max_batch, {self.max_batch}")
            with torch.inference_mode(), torch.cuda.stream(self.stream):
                if self.stream is not None:
                    self.stream.wait_stream(torch.cuda.default_stream(device))
                    torch.cuda.synchronize(device)
                self._graphs.capture()
                self._counter.zero_()
            self._mapper = MapAhead(cache, ahead_tokens, threaded=mapping == "thread")
        except BaseException:
            cache.release(self._scratch)
            raise

    # -- sequences -----------------------------------------------------------------------------------------------
    def start(
        self,
        slot: int,
        token: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        """Decode a sequence from the next step on.

        Args:
            slot: live in the cache; its ``seq_len`` rows are computed.
            token: the first to feed, not in the cache yet: the prompt's last, or the one sampled after a prefill.
            max_new_tokens: tokens to decode.
            sampling: None for greedy.
            stop_tokens: end the sequence when one of these is sampled; it is still reported.

        Raises:
            ConfigError: a value out of range, or the slot is decoding already.
            OutOfPages: no page for the first row; the slot is as it was.
        """
        self.start_batch([(slot, token, max_new_tokens, sampling, stop_tokens)])

    def start_batch(self, sequences: Sequence[tuple[int, int, int, Sampling | None, Sequence[int]]]) -> None:
        """``start`` for several at once, all or nothing, with one upload."""
        self._require_open()
        rows = [self._check(*sequence) for sequence in sequences]
        slots = [sequence[0] for sequence in sequences]
        if not slots:
            return
        if len(set(slots)) < len(slots):
            raise ConfigError(f"expected every slot once, got {slots}")
        if len(self._live) + len(slots) > self.max_batch:
            raise ConfigError(f"{len(self._live) + len(slots)} sequences exceed max_batch, {self.max_batch}")
        # What a page shared with another sequence takes to become private, it takes here, before any step is open.
        self.cache.ensure_batch(slots, [n + 1 for n in rows])
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            self.state.start(self._upload, sequences, rows)
        for slot, n, sequence in zip(slots, rows, sequences, strict=True):
            self._mapper.track(slot, n + 1, n + sequence[2])
            self._live[slot] = _Live(slot, n)

    def cancel(self, slot: int) -> None:
        """Stop decoding a sequence; tokens that were not reported yet are not going to be. Any other slot: no effect.

        The slot then holds the rows of the tokens that were reported, the newest one's excepted.
        """
        self._require_open()
        live = self._live.pop(slot, None)
        if live is not None:
            self._hand_back(live)

    @property
    def slots(self) -> tuple[int, ...]:
        """Those that are decoding."""
        return tuple(self._live)

    # -- steps ---------------------------------------------------------------------------------------------------
    def step(self) -> list[DecodedToken]:
        """Launch a step for every sequence, then report the tokens of the step before it.

        So the first call reports nothing, and a call without sequences reports what is left.

        Raises:
            OutOfPages: no page for the next row of some sequence. Nothing was launched; cancel one, or make room in the
                cache, and call again.
        """
        self._require_open()
        if self._live:
            self._launch()
            return self._drain(1)
        return self._drain(0)

    def run(self) -> list[DecodedToken]:
        """Step until every sequence has ended; all tokens, in the order of their steps."""
        tokens = []
        while self._live or self._under_way:
            tokens += self.step()
        return tokens

    def drain(self) -> list[DecodedToken]:
        """Report the tokens of every step launched so far; waits for them."""
        self._require_open()
        return self._drain(0)

    @property
    def graphs(self) -> tuple[GraphReport, ...]:
        """What was captured, by batch size."""
        return self._graphs.reports

    def close(self) -> None:
        """End the loop: graphs and the loop's own slot are freed, sequences stay as they are. Idempotent."""
        if self._closed:
            return
        with suppress(ConfigError):  # the cache is closed already
            for slot in self.slots:
                self.cancel(slot)
        self._closed = True
        self._mapper.close()
        if self.stream is not None:
            self.stream.synchronize()
        self._live.clear()
        self._under_way.clear()
        self._graphs.release()
        with suppress(ConfigError):
            self.cache.release(self._scratch)

    def __enter__(self) -> DecodeLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------
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
            chosen = decode_attention(self.cache, self.model.num_heads, bucket, self._typical_len)
            self._attentions[bucket] = bind(chosen)
        return self._attentions[bucket]

    def _launch(self) -> None:
        sequences = tuple(self._live.values())
        slots = list(self._live)
        index = np.array(slots, np.int64)
        rows = np.array([sequence.rows for sequence in sequences], np.int64) + 1
        self._mapper.require(index, rows)
        bucket = self._graphs.bucket_for(len(slots))
        with torch.inference_mode(), torch.cuda.stream(self.stream), self.cache.step(index):
            if slots != self._order:
                padded = np.full(self.max_batch, self._scratch, np.int32)
                padded[: len(slots)] = slots
                self._slots.copy_(self._upload(padded))
                self._order = slots
            self._graphs.launch(bucket)
            event = None
            if self.stream is not None:
                event = torch.cuda.Event()
                event.record()
        self._under_way.append(_Launched(sequences, self._num_launched % _RING, event))
        self._num_launched += 1
        for sequence in sequences:
            sequence.rows += 1
        self._mapper.look_ahead(index, rows)

    def _drain(self, keep: int) -> list[DecodedToken]:
        """Read the ring up to the newest ``keep`` steps."""
        tokens: list[DecodedToken] = []
        while len(self._under_way) > keep:
            launched = self._under_way.popleft()
            if launched.event is not None:
                launched.event.synchronize()
            sampled = self._ring[launched.place, : len(launched.sequences)].tolist()
            for sequence, (token, reason) in zip(launched.sequences, sampled, strict=True):
                slot = sequence.slot
                if self._live.get(slot) is not sequence:  # ended, or cancelled
                    continue
                tokens.append(DecodedToken(slot, token, _REASONS[reason]))
                if reason:
                    del self._live[slot]
                    self._hand_back(sequence)
        return tokens

    def _hand_back(self, sequence: _Live) -> None:
        """A sequence has ended: cut it to its rows. What was mapped ahead goes when the GPU is past it."""
        self._mapper.forget(sequence.slot)
        num_under_way = sum(sequence in launched.sequences for launched in self._under_way)
        with torch.cuda.stream(self.stream), self.cache.step([sequence.slot]):
            self.cache.truncate(sequence.slot, sequence.rows - num_under_way)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array))
        if self.stream is None:
            return host
        return host.pin_memory().to(self.cache.device, non_blocking=True)

    def _check(
        self, slot: int, token: int, max_new_tokens: int, sampling: Sampling | None, stop_tokens: Sequence[int]
    ) -> int:
        """ConfigError unless a sequence can start so; returns its rows."""
        vocab_size = self.model.config.vocab_size
        if slot in self._live or slot == self._scratch:
            raise ConfigError(f"slot {slot} is {'decoding already' if slot in self._live else 'the loop’s own'}")
        rows = self.cache.seq_len(slot)
        require_int("max_new_tokens", max_new_tokens, 1)
        for each in (token, *stop_tokens):
            if not is_int(each) or not 0 <= each < vocab_size:
                raise ConfigError(f"token {each!r} is not in the model's vocabulary of {vocab_size}")
        if len(stop_tokens) > self.state.stop_tokens.shape[1]:
            raise ConfigError(
                f"{len(stop_tokens)} stop tokens exceed {self.state.stop_tokens.shape[1]}; raise max_stop_tokens"
            )
        if rows + max_new_tokens > self.max_seq_len:
            raise ConfigError(
                f"slot {slot} has {rows} rows; {max_new_tokens} new ones exceed the context of {self.max_seq_len}"
            )
        if sampling is not None:
            validate_sampling(sampling.temperature, sampling.top_p)
            require_int("top_k", sampling.top_k, 0, 2**31 - 1)
            require_int("seed", sampling.seed, 0, 2**63 - 1)
        return rows

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("this DecodeLoop is closed; make a new one")
