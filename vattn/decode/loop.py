"""The decode loop: sequences come and go, each step is one replay, and the host never makes the GPU wait.

Everything that a step reads lies in device tensors with an entry per slot: the token that a sequence feeds next, its
length, how to sample, when to stop (``state``). What the device does in a step is in ``step``, in which order steps are
launched and read in ``pipeline``, who decodes and what was reported in ``progress``; here is what a user calls.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ..attention import AttentionBackend
from ..errors import ConfigError
from ..interrupts import Uninterrupted, finish, for_one_thread
from ..kv_cache import KVCache
from ..requests import Sampling
from .graphs import GraphReport
from .map_ahead import MapAhead
from .options import checked_options
from .pipeline import Pipeline
from .progress import Progress
from .state import Compute, DecodedToken, DecodeModel, DecodeState, Start
from .step import CapturableCompute, DecodeStep

__all__ = ["DecodeLoop"]


class DecodeLoop:
    """Decodes sequences whose prompts are in the cache. For one thread at a time.

    While a slot decodes it belongs to the loop: rows are mapped ahead of it, which its ``seq_len`` counts too. When
    its end is reported (or ``cancel`` returns) the slot holds exactly the rows of its tokens again, all but the newest
    token's; it is the caller's to fork, go on with, or release.

    A sequence that is released or truncated in the cache meanwhile is dropped: the next step that would decode it
    raises ``ConfigError``, which names the slot, launches nothing, and leaves the slot to whoever has it now. Calling
    again goes on with the others.

    Args:
        model: computes a step.
        cache: holds the sequences. One slot is taken for rows that only fill up a batch.
        max_batch: sequences of a step; None for all slots of the cache but that one.
        attention: backend for decode, or its name; None for the one measured as fastest for each batch size, of those
            that the cache has a margin for.
        typical_len: rows that sequences are expected to have, for that choice and for what ``"measure"`` times; None
            for half of what they can have.
        buckets: batch sizes to capture; None for ``default_buckets``, or without graphs for every size.
        graphs: ``"always"``, ``"measure"``, ``"first use"`` or ``"never"`` (see ``StepGraphs``); None: always on CUDA,
            never elsewhere. ``"measure"`` times the ways to run a step of each batch size and takes the fastest. It is
            kept in a file for later loops; ``vattn info --graphs`` shows it.
        ahead_tokens: rows to map ahead of each sequence; None for two pages' worth.
        mapping: ``"thread"``, or ``"inline"`` to map between steps in the caller's thread.
        max_stop_tokens: of a sequence.
        steps_ahead: steps, 1 to 16, that are under way while an older one's tokens are read. With more the GPU goes on
            while the host is kept from launching; a new sequence waits for them, and a stop token is seen so many steps
            later.
        steps_per_launch: steps, 1 to 8 and at most ``steps_ahead``, that one graph holds: the host launches less often.
            Each batch size has such a graph beside that of one step, where its steps are captured at all. Steps are
            launched one by one after ``feed``, for some of the slots or with other work beside, and where a sequence
            has a mask, wants log-probabilities, or is near the end of the context.

    Attributes:
        own_slot: that of rows which only fill up a batch.
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
        attention: AttentionBackend | str | None = None,
        typical_len: int | None = None,
        buckets: Sequence[int] | None = None,
        graphs: str | None = None,
        ahead_tokens: int | None = None,
        mapping: str = "thread",
        max_stop_tokens: int = 16,
        steps_ahead: int = 1,
        steps_per_launch: int = 1,
    ) -> None:
        options = checked_options(
            model,
            cache,
            max_batch,
            attention,
            typical_len,
            buckets,
            graphs,
            ahead_tokens,
            mapping,
            max_stop_tokens,
            steps_ahead,
            steps_per_launch,
        )
        self.model, self.cache = model, cache
        self._pid = os.getpid()
        self._one_thread: int | None = None
        self._closed = False
        self.max_seq_len, self.max_batch = options.max_seq_len, options.max_batch
        self.max_stop_tokens = options.max_stop_tokens
        device = cache.device
        self.state = DecodeState(cache.max_slots, self.max_stop_tokens, model.config.vocab_size, device)
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.own_slot = cache.acquire()
        try:
            if options.fills_up:
                cache.ensure(self.own_slot, 1)
            self._step = DecodeStep(
                model,
                cache,
                self.state,
                self.own_slot,
                max_batch=self.max_batch,
                attention=options.attention,
                typical_len=options.typical_len,
                max_seq_len=self.max_seq_len,
                buckets=options.buckets,
                mode=options.graphs,
                steps_per_launch=options.steps_per_launch,
                stream=self.stream,
            )
            self._own_version = int(cache.versions([self.own_slot])[0])  # another one once steps were measured on it
            self._mapper = MapAhead(cache, options.ahead_tokens, threaded=mapping == "thread")
            self._progress = Progress(cache, self._mapper, self.stream, self.own_slot, self.max_batch, self.max_seq_len)
        except BaseException:
            if (mapper := getattr(self, "_mapper", None)) is not None:
                mapper.close()
            cache.release(self.own_slot)
            raise
        parts = cache, self._step, self._progress, self._mapper, self.stream
        self._pipeline = Pipeline(*parts, options.steps_ahead, options.steps_per_launch > 1)

    # -- sequences -----------------------------------------------------------------------------------------------
    def start(
        self,
        slot: int,
        token: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: Collection[int] = (),
        *,
        prompt_tokens: Sequence[int] = (),
        answer_tokens: Sequence[int] = (),
        num_logprobs: int | None = None,
    ) -> None:
        """Decode a sequence from the next step on; ``Start`` says what the arguments are.

        The first step comes after what was submitted to the current stream, and to any stream inside
        ``cache.step([slot])``.

        Raises:
            ConfigError: a value out of range, or the slot is decoding already, here or in another loop, or it is
                given to another sequence at this moment.
            OutOfPages: no page for the first row; the slot is as it was.
        """
        self.start_batch(
            [Start(slot, token, max_new_tokens, sampling, stop_tokens, prompt_tokens, answer_tokens, num_logprobs)]
        )

    @for_one_thread
    def start_batch(self, starts: Iterable[Start], versions: Sequence[int] | None = None) -> None:
        """``start`` for several at once, all or nothing, with one upload.

        Args:
            versions: of their slots, as ``KVCache.versions`` said: ConfigError where another sequence is there by now.
        """
        self._require_open()
        starts = list(starts)
        for each in starts:
            if not isinstance(each, Start):
                raise ConfigError(f"a sequence is a Start(slot, token, max_new_tokens, ...), got {each!r}")
        vocab_size = self.model.config.vocab_size
        checked = [each.checked(vocab_size=vocab_size, max_stop_tokens=self.max_stop_tokens) for each in starts]
        if checked:
            with Uninterrupted():
                self._progress.begin(checked, versions, partial(self.state.start, self._step.upload))

    @for_one_thread
    def allow(self, slot: int, mask: Any) -> None:
        """Let only some tokens come in the next steps of a sequence.

        Args:
            mask: booleans ``[vocab_size]``, or 32 of them to an int32, the first lowest; None for all tokens.

        Raises:
            ConfigError: it is neither, or allows nothing; or the slot does not decode.
        """
        self._require_open()
        if slot not in self._progress.live:
            raise ConfigError(f"slot {slot} does not decode here")
        self.state.allow(slot, mask)

    @for_one_thread
    def feed(self, slots: Sequence[int], tokens: torch.Tensor) -> None:
        """Let the next step of these sequences take other tokens than those that the step before sampled.

        Args:
            tokens: ``[len(slots)]`` integers on the cache's device, ids of the vocabulary, as what was submitted to the
                current stream leaves them.

        Raises:
            ConfigError: a slot does not decode, or tokens are of another shape.
        """
        self._require_open()
        missing = [slot for slot in slots if slot not in self._progress.live]
        if missing or tokens.shape != (len(slots),):
            raise ConfigError(
                f"expected a token for each of {[*slots]}, of which {missing} do not decode; got {[*tokens.shape]}"
            )
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.cache.device))
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            self._step.fed = True
            index = self._step.upload(np.array(slots, np.int64))
            self.state.tokens[index] = tokens.to(self.state.tokens.dtype)
            if tokens.is_cuda and self.stream is not None:
                tokens.record_stream(self.stream)

    @for_one_thread
    def logits(self) -> torch.Tensor:
        """Those of the step that was launched last, for a caller that chooses tokens itself.

        Returns:
            ``[sequences, vocab_size]`` in the order of its slots, of work on ``stream``. It is to be read on that
            stream, before the next step is launched, which overwrites it.

        Raises:
            ConfigError: no step was launched yet.
        """
        self._require_open()
        return self._step.logits()

    @for_one_thread
    def cancel(self, slot: int) -> None:
        """Stop decoding a sequence; tokens that were not reported yet are not going to be. Any other slot: no effect.

        The slot then holds the rows of the tokens that were reported, the newest one's excepted.
        """
        self._require_open()
        with Uninterrupted():
            self._progress.cancel(slot)

    @for_one_thread
    def release(self, slot: int, store: int = 0) -> int:
        """End a sequence, decoding or not, and give its slot back to the cache, which stores its first ``store`` rows.

        As for ``cache.release`` and ``cache.store``, which keep the pages for work on the current stream, but that they
        are kept for the steps that may still be under way on the loop's stream, too. Returns the version that the
        sequence had at its end.

        Raises:
            ConfigError: it is the loop's own slot, or not live in the cache, or another sequence's by now than the one
                that decoded.
        """
        self._require_open()
        return self._progress.release(slot, store)

    def rows_beside(self, batch: int) -> int:
        """Rows that a step has for so many sequences where it is captured with other work (``CapturableCompute``)."""
        return self._step.rows_beside(batch)

    @property
    def slots(self) -> tuple[int, ...]:
        """Those that are decoding."""
        return tuple(self._progress.live)

    # -- steps ---------------------------------------------------------------------------------------------------
    @for_one_thread
    def step(
        self,
        slots: Collection[int] | None = None,
        compute: Compute | None = None,
        beside: Mapping[int, int] | None = None,
    ) -> list[DecodedToken]:
        """Launch a step for every sequence, then report the tokens of the step ``steps_ahead`` before it. With
        ``steps_per_launch`` those are several steps.

        So the first calls report nothing, and a call without sequences reports what is left. Whatever is raised by the
        model or the driver: no step was launched, no token is lost, and the sequences decode on with the next call.

        Args:
            slots: those that take part; None for all.
            compute: ``(embeddings, batch, attention) -> logits`` instead of the model's ``decode``, for other work to
                be done in the same pass. Not called where no sequence takes part.
            beside: slots of the cache that it works on, too, and their versions (see ``KVCache.versions``). A slot that
                decodes may be among them: its rows are then computed in this very pass, before it reads them.

        Raises:
            OutOfPages: no page for the next row of some sequence. Nothing was launched, and no token is lost: cancel a
                sequence, or make room in the cache, and call again.
            ConfigError: a sequence was released or truncated in the cache. It was dropped, and nothing launched: call
                again for the others.
            DriverError: the driver failed where pages were mapped. If rows of a sequence were lost by that, the next
                call refuses the sequence as a truncated one.
        """
        self._require_open()
        self._pipeline.advance(slots, compute, beside)
        return self._progress.report()

    @for_one_thread
    def capture_beside(self, others: Callable[[int], Iterable[CapturableCompute]]) -> None:
        """Capture steps with other work before any comes; without it each is captured when it comes for the second
        time.

        Args:
            others: rows of a step -> what is to be captured with it, of all sizes that come.
        """
        self._require_open()
        self._pipeline.drain(0)
        with (
            Uninterrupted(),
            torch.inference_mode(),
            torch.cuda.stream(self.stream),
            self.cache.step([self.own_slot], versions=[self._own_version]),
        ):
            self._step.capture_beside(others)

    @for_one_thread
    def run(self) -> list[DecodedToken]:
        """Step until every sequence has ended; all tokens, in the order of their steps.

        Raises:
            OutOfPages: as ``step``; the tokens so far are returned by the next call of ``step``, ``run`` or ``drain``.
        """
        self._require_open()
        tokens: list[DecodedToken] = []
        try:
            progress = self._progress
            while progress.live or progress.under_way or progress.unreported:
                tokens += self.step()
        except BaseException:
            self._progress.unreported[:0] = tokens
            raise
        return tokens

    @for_one_thread
    def drain(self) -> list[DecodedToken]:
        """Report the tokens of every step launched so far; waits for them."""
        self._require_open()
        self._pipeline.drain(0)
        return self._progress.report()

    @property
    def graphs(self) -> tuple[GraphReport, ...]:
        """What was captured, by batch size."""
        return self._step.reports

    @for_one_thread
    def close(self) -> None:
        """End the loop: graphs and the loop's own slot are freed, sequences stay as they are. Idempotent."""
        if self._closed:
            return
        if os.getpid() != self._pid:  # a forked child: nothing of this is its
            self._closed = True
            return
        for slot in self.slots:
            self.cancel(slot)
        self._mapper.close()
        if self.stream is not None:
            self.stream.synchronize()
        self._step.release()
        with Uninterrupted():
            with suppress(ConfigError):  # the cache is closed already, or somebody else has released the slot
                if self.cache.versions([self.own_slot])[0] == self._own_version:
                    self.cache.release(self.own_slot)
            self._progress.close()
            self._closed = True

    def __del__(self) -> None:
        # Nobody closed it: work may be under way, and the mapper's thread would live on.
        if not sys.is_finalizing() and getattr(self, "_pipeline", None) is not None and os.getpid() == self._pid:
            finish(self.close)

    def __enter__(self) -> DecodeLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("this DecodeLoop is closed; make a new one")
        if os.getpid() != self._pid:
            raise ConfigError("this DecodeLoop belongs to the process that forked this one; make another here")
