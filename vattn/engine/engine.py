"""Requests in, tokens out: admit in arrival order, prefill, decode together, preempt when memory runs out."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..arguments import require_int
from ..attention import AttentionBackend, AttentionBatch, get, require_fit
from ..errors import ConfigError, OutOfPages, OutOfSlots
from ..interrupts import Uninterrupted
from ..kv_cache import KVCache
from ..layout import KVLayout
from ..memory.tensors import upload
from ..requests import Completion, EngineStats, Request, StepToken, checked_request
from ..tuning import default_attention, default_ops

__all__ = ["Completion", "Engine", "EngineStats", "LanguageModel", "Request", "StepToken", "bytes_for"]


class LanguageModel(Protocol):
    """What the engine asks of a model; ``vattn.models.Llama`` is one."""

    @property
    def config(self) -> Any:
        """Has ``vocab_size``."""
        ...

    def __call__(
        self, tokens: torch.Tensor, batch: AttentionBatch, cache: KVCache, attention: AttentionBackend
    ) -> torch.Tensor:
        """Packed tokens ``[num_tokens]`` int64 -> logits ``[batch, vocab_size]`` of each sequence's last."""
        ...


@dataclass(eq=False)
class _Sequence:
    """A request under way. ``tokens[:num_cached]`` have their K and V in the cache."""

    request_id: int
    request: Request
    tokens: list[int]
    slot: int = -1
    num_cached: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_tokens)


class Engine:
    """Runs many requests through one model and one cache.

    A step is either the prefill of newly admitted requests or one decode step of all running ones. When a growing batch
    runs out of pages, the youngest sequence gives its pages back and waits at the head of the queue; what it generated
    is kept, and its K and V are recomputed when a sequence has finished. The engine releases every slot it acquired,
    whatever is raised.

    Args:
        model: see ``LanguageModel``.
        cache: where K and V go. Other users may hold slots of it.
        attention: backend, or its name; None for the best one that runs on the cache's device within its margin.
        max_prefill_tokens: tokens computed in one forward pass; a longer prompt is computed in chunks.
        on_step: called once per step while every sequence that took part still holds its slot, for observing the cache.

    Raises:
        ConfigError: the attention reads further past the end than the cache keeps rows mapped, or does not mask what it
            reads there although the cache was told that it does.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: KVCache,
        attention: AttentionBackend | str | None = None,
        *,
        max_prefill_tokens: int = 2048,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        if not isinstance(cache, KVCache):
            raise ConfigError(f"an engine takes a model and a vattn.KVCache, got a {type(cache).__name__} as cache")
        if isinstance(attention, str):
            attention = get(attention)
        self.model = model
        self.cache = cache
        self.max_prefill_tokens = require_int("max_prefill_tokens", max_prefill_tokens, 1)
        if attention is None:
            margin = 0 if cache.over_read_masked else cache.over_read_tokens
            heads = getattr(model.config, "num_heads", cache.layout.groups[0].num_kv_heads)
            attention = default_attention(
                cache.layout, cache.device, heads, max_over_read=margin, new=max_prefill_tokens
            )
        require_fit(attention, cache)
        self.attention = attention
        self._sample_tokens = default_ops(cache.device, cache.layout.dtype).sample_tokens
        self.stats = EngineStats()
        self._on_step = on_step
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # in arrival order, because admission is
        # Closed by a preemption until a sequence finishes: until then memory only gets tighter, and a sequence admitted
        # again would be computed only to be preempted again.
        self._admitting = True
        self._ids = itertools.count()
        self._unreported: list[StepToken] = []  # others' tokens, of steps that ``generate`` made

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running, or ``step`` has tokens to tell."""
        return bool(self._waiting or self._running or self._unreported)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> int:
        """Queue a copy of a request and return its id. May be called from any thread.

        Raises:
            ConfigError: a value out of range, or a request that this cache could not hold even alone.
        """
        return self._queue(self._checked(request))

    def step(self) -> list[StepToken]:
        """Advance by one step and return its tokens, at most one per request; empty when there is nothing to do.

        After ``generate`` the next call computes nothing: it returns what ``generate``'s steps made for other requests,
        in the order of those steps.

        Raises:
            OutOfPages, OutOfSlots: nothing of this engine's runs and not even the oldest request could start, because
                others hold the memory. Requests stay queued; call again when memory is free.
            BaseException: whatever else goes wrong, after every slot was released and every request dropped.
        """
        if self._unreported:
            tokens, self._unreported = self._unreported, []
            return tokens
        return self._advance()

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run requests to their end; their completions in the order given.

        Requests that were submitted before go on meanwhile: the next ``step`` returns their tokens.

        Raises:
            ConfigError: see ``submit``; before anything ran.
            OutOfPages, OutOfSlots: see ``step``; these requests are dropped, others stay queued.
        """
        if isinstance(requests, Request):
            raise ConfigError("generate takes a list of requests: generate([request])")
        checked = [self._checked(request) for request in requests]  # all of them, before the first is queued
        tokens: dict[int, list[int]] = {self._queue(request): [] for request in checked}
        reasons: dict[int, str] = {}
        try:
            while any(sequence.request_id in tokens for sequence in (*self._waiting, *self._running)):
                for new in self._advance():
                    if new.request_id not in tokens:
                        self._unreported.append(new)
                        continue
                    tokens[new.request_id].append(new.token)
                    if new.finish_reason is not None:
                        reasons[new.request_id] = new.finish_reason
        except BaseException:
            for request_id in tokens:
                self.cancel(request_id)
            raise
        return [
            Completion(request_id, tuple(new), reasons.get(request_id, "cancelled"))
            for request_id, new in tokens.items()
        ]

    def cancel(self, request_id: int) -> None:
        """Drop a request: nothing of it is reported any more. One that is unknown or has ended: no effect."""
        self._unreported = [token for token in self._unreported if token.request_id != request_id]
        for sequence in tuple(self._waiting):
            if sequence.request_id == request_id:
                self._waiting.remove(sequence)
        for sequence in tuple(self._running):
            if sequence.request_id == request_id:
                self._release(sequence)
                self._admitting = True

    def abort(self) -> None:
        """Drop every request and release every slot; one whose release fails is tried again by the next ``abort``."""
        self._waiting.clear()
        self._unreported.clear()
        self._admitting = True
        with ExitStack() as releases:  # runs them all, even if one raises
            for sequence in tuple(self._running):
                releases.callback(self._release, sequence)

    # One step ---------------------------------------------------------------------------------------------------

    def _queue(self, request: Request) -> int:
        sequence = _Sequence(next(self._ids), request, list(request.prompt_tokens))
        self._waiting.append(sequence)
        return sequence.request_id

    def _advance(self) -> list[StepToken]:
        try:
            return self._step()
        except (OutOfPages, OutOfSlots):
            if self._running:
                self.abort()
            raise
        except BaseException:
            self.abort()
            raise

    def _step(self) -> list[StepToken]:
        start = time.perf_counter()
        stats = self.stats
        if admitted := self._admit():
            num_tokens = sum(len(sequence.tokens) for sequence in admitted)
            new = self._prefill(admitted)
            stats.num_prefill_steps += 1
            stats.num_prefill_tokens += num_tokens
            stats.prefill_s += time.perf_counter() - start
            return new
        if not self._running:
            return []
        new = self._decode()
        stats.num_decode_steps += 1
        stats.num_decode_tokens += len(new)
        stats.decode_s += time.perf_counter() - start
        return new

    def _admit(self) -> list[_Sequence]:
        """Give slots and pages to waiting sequences, oldest first, until something runs short."""
        admitted: list[_Sequence] = []
        num_tokens = 0
        while self._waiting and (self._admitting or not self._running):
            sequence = self._waiting[0]
            num_tokens += len(sequence.tokens)
            if admitted and num_tokens > self.max_prefill_tokens:
                break
            try:
                request = sequence.request
                longest = len(request.prompt_tokens) + request.max_new_tokens - 1  # the last token has no row
                sequence.slot = self.cache.acquire(expect_len=longest)
                self._running.append(sequence)  # from here on `abort` releases it
                self.cache.ensure(sequence.slot, len(sequence.tokens))
            except (OutOfPages, OutOfSlots):
                if sequence in self._running:
                    self._release(sequence)
                if not self._running:
                    raise
                break
            self._waiting.popleft()
            admitted.append(sequence)
        return admitted

    def _prefill(self, sequences: list[_Sequence]) -> list[StepToken]:
        """Compute all tokens of newly admitted sequences, at most ``max_prefill_tokens`` a pass."""
        last_logits: dict[int, torch.Tensor] = {}
        pending = deque(sequences)
        while pending:
            work: list[tuple[_Sequence, int]] = []
            room = self.max_prefill_tokens
            while pending and room:
                sequence = pending[0]
                count = min(room, len(sequence.tokens) - sequence.num_cached)
                room -= count
                work.append((sequence, count))
                if sequence.num_cached + count < len(sequence.tokens):
                    break  # the rest of it is the next pass
                pending.popleft()
            logits = self._forward(work)
            last_logits.update({sequence.slot: row for (sequence, _), row in zip(work, logits, strict=True)})
        return self._finish_step(sequences, torch.stack([last_logits[sequence.slot] for sequence in sequences]))

    def _decode(self) -> list[StepToken]:
        """One token for every running sequence that keeps its memory."""
        while True:
            try:
                self.cache.ensure_batch(
                    [sequence.slot for sequence in self._running],
                    [sequence.num_cached + 1 for sequence in self._running],
                )
                break
            except OutOfPages:
                self._preempt_youngest()
                if not self._running:
                    raise
        running = list(self._running)
        logits = self._forward([(sequence, 1) for sequence in running])
        self.stats.num_decode_rows += sum(sequence.num_cached for sequence in running)
        return self._finish_step(running, logits)

    @torch.inference_mode()
    def _forward(self, work: list[tuple[_Sequence, int]]) -> torch.Tensor:
        """Compute the next ``count`` uncomputed tokens of each sequence -> logits ``[len(work), vocab_size]``."""
        slots = [sequence.slot for sequence, _ in work]
        counts = [count for _, count in work]
        ends = [sequence.num_cached + count for sequence, count in work]
        batch = AttentionBatch.build(slots, counts, ends, self.cache.device)
        packed: list[int] = []
        for (sequence, _), end in zip(work, ends, strict=True):
            packed += sequence.tokens[sequence.num_cached : end]
        tokens = upload(packed, self.cache.device, torch.int64)
        with self.cache.step(slots):
            logits = self.model(tokens, batch, self.cache, self.attention)
        for (sequence, _), end in zip(work, ends, strict=True):
            sequence.num_cached = end
        return logits

    def _finish_step(self, sequences: list[_Sequence], logits: torch.Tensor) -> list[StepToken]:
        """Sample, record, and release the sequences that ended. ``logits``: ``[len(sequences), vocab_size]``."""
        chosen = self._sample(sequences, logits)
        new: list[StepToken] = []
        finished: list[_Sequence] = []
        for sequence, token in zip(sequences, chosen, strict=True):
            sequence.tokens.append(token)
            reason = None
            if token in sequence.request.stop_tokens:
                reason = "stop"
            elif sequence.num_generated >= sequence.request.max_new_tokens:
                reason = "length"
            if reason is not None:
                finished.append(sequence)
            new.append(StepToken(sequence.request_id, token, reason))
        if self._on_step is not None:
            self._on_step()
        for sequence in finished:
            self._release(sequence)
            self._admitting = True
        return new

    def _sample(self, sequences: list[_Sequence], logits: torch.Tensor) -> list[int]:
        """Each one's next token: drawn with its seed and the position of the token that its logits came from."""
        requests, device = [sequence.request for sequence in sequences], self.cache.device

        def put(values: Iterable[float], dtype: type) -> torch.Tensor:
            return upload(np.array(list(values), dtype), device)

        out = torch.empty(len(requests), dtype=torch.int32, device=device)
        self._sample_tokens(
            logits,
            put(range(len(requests)), np.int32),
            put((len(sequence.tokens) - 1 for sequence in sequences), np.int32),
            put((request.temperature for request in requests), np.float32),
            put((request.top_k for request in requests), np.int32),
            put((request.top_p for request in requests), np.float32),
            put((request.seed for request in requests), np.int64),
            out,
        )
        return out.tolist()

    def _preempt_youngest(self) -> None:
        sequence = self._running[-1]
        self._release(sequence)
        sequence.num_cached = 0
        self._waiting.appendleft(sequence)
        self._admitting = False
        self.stats.num_preemptions += 1

    def _release(self, sequence: _Sequence) -> None:
        if sequence in self._running:  # the caller's on_step may have cancelled it
            # Both or none: released twice, the slot might be another user's by then.
            with Uninterrupted():
                self.cache.release(sequence.slot)
                self._running.remove(sequence)

    # Checks -----------------------------------------------------------------------------------------------------

    def _checked(self, request: Request) -> Request:
        """A copy, which this cache can hold."""
        request = checked_request(request, vocab_size=self.model.config.vocab_size)
        max_new_tokens = request.max_new_tokens
        layout = self.cache.layout
        # The last new token is returned and never read, so it needs no row.
        num_rows = len(request.prompt_tokens) + max_new_tokens - 1
        if num_rows > layout.max_seq_len:
            raise ConfigError(
                f"a prompt of {len(request.prompt_tokens)} tokens and {max_new_tokens} new ones exceed the context of "
                f"{layout.max_seq_len} tokens"
            )
        needed = bytes_for(layout, num_rows + self.cache.over_read_tokens, self.cache.page_bytes)
        if needed > self.cache.memory_limit:
            raise ConfigError(
                f"a prompt of {len(request.prompt_tokens)} tokens and {max_new_tokens} new ones need {needed} bytes of "
                f"memory, the limit is {self.cache.memory_limit} bytes"
            )
        return request


def bytes_for(layout: KVLayout, num_rows: int, page_bytes: int) -> int:
    """Physical bytes that one sequence of ``num_rows`` tokens takes, in whole pages."""
    lanes = (lane for group in layout.groups for lane in layout.plan(group, 1, page_bytes).lanes)
    return sum(-(-num_rows * lane.row_bytes // page_bytes) * page_bytes for lane in lanes)
