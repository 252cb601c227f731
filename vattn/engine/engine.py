"""``Engine``: requests in, tokens out. Used by the Python API, ``vattn generate`` and ``vattn chat``."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any

from ..arguments import is_int, optional_int, require_bool, require_int
from ..attention import AttentionBackend, require_fit
from ..attention.choice import backend_of
from ..decode.state import features_of
from ..errors import ConfigError, OutOfPages, OutOfSlots, QueueFull
from ..interrupts import Uninterrupted, finish
from ..kv_cache import KVCache
from ..requests import Completion, Request, StepToken, checked_request
from .answers import Answers
from .costs import SequenceCosts
from .mail import Mail, Turns, nobody
from .opening import BUDGETS, attention_for_prompts, decode_loop, opened_cache, runtime_of
from .prefill import PrefillPasses
from .prefixes import Prefixes
from .runner import Runner
from .samples import Samples
from .scheduler import Scheduler
from .stats import EngineStats, Meters

__all__ = ["Engine"]

_MAX_BATCH = 64


class Engine:
    """Runs many requests through one model and one cache.

    A step gives every running sequence a token and computes a part of a waiting prompt. Where pages run out, the
    sequence whose turn would come last gives its own back and is computed again later, which changes none of its
    tokens.

    ``submit`` and ``cancel`` may be called from any thread at any time, ``step`` and ``generate`` from one at a time,
    and not while an ``AsyncEngine`` of this engine is open.

    Args:
        model: ``vattn.models.Llama``, a decoder of transformers, or any other ``RuntimeModel``.
        cache: where K and V go; others may hold slots of it, and the engine takes one for itself. None: the engine
            opens one, and closes it.
        max_batch: sequences that run together; None for 64, or as many as the given cache has slots for.
        max_step_tokens: prompt tokens that a step computes at most: a running sequence waits no longer than these
            take. None: on CUDA 1,024, and 8,192 while nobody decodes; on the CPU 64 and 256; between
            them while many prompts wait for few that decode.
        memory_limit: of the cache that the engine opens, in bytes; None: 90 % of what is free.
        max_waiting: samples that may wait; ``submit`` raises ``QueueFull`` rather than let more do so. None for any
            number.
        attention: backend or its name, for prompts, and for decode where captured steps can use it; None for the ones
            measured as fastest.
        prefix_caching: keep K and V of requests that have ended, as long as nobody needs the memory, for later ones
            that begin with the same tokens and have the same ``cache_salt``.
        graphs: of its ``DecodeLoop``: ``"measure"`` takes the way of decoding that is fastest on this GPU.

    Raises:
        ConfigError: an argument is wrong, or model, attention and cache do not fit each other.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache | None = None,
        *,
        max_batch: int | None = None,
        max_step_tokens: int | None = None,
        memory_limit: int | None = None,
        max_waiting: int | None = None,
        attention: AttentionBackend | str | None = None,
        prefix_caching: bool = True,
        graphs: str | None = None,
    ) -> None:
        if cache is not None and not isinstance(cache, KVCache):
            raise ConfigError(f"an engine takes a model and a vattn.KVCache, got a {type(cache).__name__} as cache")
        if cache is not None and memory_limit is not None:
            raise ConfigError("memory_limit is of a cache that the engine opens; the one given has its own")
        max_step_tokens = optional_int("max_step_tokens", max_step_tokens, 1)
        self.max_waiting = optional_int("max_waiting", max_waiting, 1)
        attention = None if attention is None else backend_of(attention)
        prefix_caching = require_bool("prefix_caching", prefix_caching)
        if max_batch is None:
            max_batch = _MAX_BATCH if cache is None else max(1, cache.max_slots - 1)
        max_batch = require_int("max_batch", max_batch, 1)
        self._made = ExitStack()  # what this engine made and closes
        self.model = model = runtime_of(model, self._made)
        try:
            budgets = BUDGETS[model.device.type] if max_step_tokens is None else (max_step_tokens,) * 2
            if cache is None:
                opened = opened_cache(model, attention, max_batch, memory_limit, stores=prefix_caching)
                cache = self._made.enter_context(opened)
            self.cache = cache
            self.attention = attention_for_prompts(model, self.cache, budgets[1]) if attention is None else attention
            require_fit(self.attention, self.cache, features=features_of(model))
            self._loop = decode_loop(model, self.cache, attention, max_batch, graphs)
        except BaseException:
            self._made.close()
            raise
        self._costs = SequenceCosts(
            self.cache.layout, self.cache.page_bytes, self.cache.over_read_tokens, self.cache.max_page_bytes
        )
        self._meters = Meters()
        prefixes = Prefixes(self.cache, self._meters, prefix_caching)
        self._scheduler = Scheduler(self._costs, max_batch, running_rows=prefixes.running_rows)
        self._passes = PrefillPasses(model, self.cache, self.attention, self._loop.stream, self._loop.own_slot)
        self._samples = Samples(self._loop, self._scheduler, prefixes, self._meters)
        self._runner = Runner(self._samples, self._loop, self._passes, self._scheduler, prefixes, self._meters, budgets)
        self._room_bytes = self.cache.memory_limit - self._costs.bytes(self.cache.seq_len(self._loop.own_slot))
        self._turns = Turns()
        self._mail = Mail()
        self._pid = os.getpid()
        self._closed = False

    # -- requests ------------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> int:
        """Queue a copy of a request and return its id. From any thread.

        Raises:
            ConfigError: a value out of range, a request that this cache could not hold even alone, ``n`` beyond
                ``max_waiting``, or the engine is closed.
            QueueFull: with the samples of this request, more than ``max_waiting`` would wait.
        """
        self._require_open()
        checked, limit = self._checked(request), self.max_waiting
        if limit is not None and checked.n > limit:
            raise ConfigError(
                f"n is {checked.n}, and max_waiting of this engine is {limit}: these samples could never all wait; "
                "lower n, or raise max_waiting"
            )
        request_id = None
        try:
            with Uninterrupted(), self._mail.lock:
                if limit is not None and self.num_waiting + checked.n > limit:
                    raise QueueFull(
                        f"{self.num_waiting} samples wait, and max_waiting is {limit}: a request with n = {checked.n} "
                        "does not fit now; send it again later",
                        max_waiting=limit,
                    )
                request_id = self._mail.post(checked)
        except BaseException:
            if request_id is not None:  # a signal's handler raised, and nobody will know the id
                self._mail.cancel(request_id)
            raise
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request: nothing of it is reported any more. One that is unknown or has ended: no effect. From any
        thread; while another one is in ``step``, the memory comes back when that one is through.

        Raises:
            ConfigError: the id is no int.
        """
        if not is_int(request_id):
            raise ConfigError(f"cancel takes an id that submit returned, an int, got {request_id!r}")
        with Uninterrupted():
            self._mail.cancel(int(request_id))
            self._take_in_cancelled()

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or ``step`` has tokens to report."""
        mail, scheduler = self._mail, self._scheduler
        waits = scheduler.num_waiting or mail.num_arrived
        return bool(scheduler.running or waits or mail.has_kept or self._samples.reported)

    @property
    def num_running(self) -> int:
        """Samples that have a slot, or are about to fork."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Samples without a slot."""
        return self._scheduler.num_waiting + self._mail.num_arrived

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until there is something to do, so long at most. From any thread. Returns ``has_work``."""
        if not self.has_work:
            self._mail.arrived.wait(timeout_s)
            self._mail.arrived.clear()
        return self.has_work

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer that a request may come to in the context and the memory of this engine."""
        return self._costs.rows_within(self._room_bytes, self._loop.max_seq_len) + 1  # the last token has no row

    def wake(self) -> None:
        """Let ``wait`` return. From any thread."""
        self._mail.arrived.set()

    # -- steps ---------------------------------------------------------------------------------------------------
    def step(self) -> list[StepToken]:
        """Advance by one step and return what it brought, at most one token of each sample; often nothing.

        Signals are handled when the step is through. What their handlers raise takes no token with it: the next call
        returns them.

        Raises:
            OutOfPages, OutOfSlots: others hold the memory or the slots of the cache, and nothing of this engine runs.
                The requests stay queued.
            ConfigError: another thread is in ``step`` or ``generate``, an ``AsyncEngine`` steps this engine, or it is
                closed.
        """
        return self._step()

    def _step(self, by: object | None = None) -> list[StepToken]:
        tokens: list[StepToken] = []
        try:
            with Uninterrupted(), self._alone(by):
                self._take_in()
                try:
                    self._runner.advance(time.monotonic())
                except (OutOfPages, OutOfSlots):
                    if not self._mail.has_kept:
                        raise
                tokens = self._mail.reportable(self._samples.collect())
        except BaseException:
            self._mail.keep(tokens)
            raise
        return tokens

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run requests to their end -> one completion a sample, in the order given, a request's samples side by side.

        What was submitted before runs on beside them; its tokens come with the next ``step``. ``max_waiting`` does not
        count here.

        Raises:
            ConfigError: as ``submit`` and ``step``; then none of them was queued.
            OutOfPages, OutOfSlots: as ``step``; these requests are cancelled, the others go on waiting.
        """
        self._require_open()
        if isinstance(requests, Request) or not isinstance(requests, Iterable):
            raise ConfigError(f"generate takes a list of requests, as [Request(prompt_tokens)], got {requests!r}")
        checked = [self._checked(request) for request in requests]
        answers = Answers()
        try:
            with self._alone():  # so that nobody else takes in who is cancelled
                with Uninterrupted(), self._mail.lock:
                    for request in checked:
                        answers.expect(self._mail.post(request), request.n)
                while answers.pending:
                    with Uninterrupted():
                        answers.expect_no_more(self._take_in())
                        self._runner.advance(time.monotonic())
                        tokens = self._mail.reportable(self._samples.collect(), with_kept=False)
                        self._mail.keep(answers.add(tokens))
        except BaseException:
            with Uninterrupted():
                for request_id in answers.request_ids:
                    self.cancel(request_id)
            raise
        return answers.completions()

    def warm_up(self) -> None:
        """Capture passes of every size before any request comes, as a server does; it takes a few seconds at most.

        Without it each size is launched kernel by kernel the first time, and captured the second time.

        Raises:
            ConfigError: as ``step``.
        """
        with self._alone():
            self._loop.capture_beside(self._passes.of_all_sizes)

    def stats(self) -> EngineStats:
        """A snapshot; from any thread, in constant time."""
        cache = None
        with suppress(ConfigError):  # it is closed
            cache = self.cache.stats()
        return self._meters.snapshot(self.num_waiting, self.num_running, cache, time.monotonic())

    def close(self) -> None:
        """Drop every request, release every slot, and close what the engine opened for itself. Idempotent.

        Raises:
            ConfigError: another thread is in ``step`` or ``generate``, or an ``AsyncEngine`` steps this engine.
        """
        if os.getpid() != self._pid:  # a forked child: nothing of this is its
            self._closed = True
            return
        with Uninterrupted(), self._alone(even_closed=True), ExitStack() as last:
            # Each of these, though one before it raises; the last one first.
            last.callback(self._made.close)
            last.callback(self._loop.close)
            if not self._closed:
                self._closed = True
                self._take_in()
                self._samples.cancel_all()
                self._passes.settle()
                self.wake()

    def __reduce__(self) -> str:
        raise TypeError(
            "an Engine is memory and work of this process and cannot be copied or pickled: make another one"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Nobody closed it: slots of a cache that lives on may be taken.
        if not sys.is_finalizing() and not getattr(self, "_closed", True) and os.getpid() == self._pid:
            finish(self.close)

    # -- for AsyncEngine -----------------------------------------------------------------------------------------
    def _claim(self, by: object) -> None:
        """Only ``by`` may step this engine or close it, until it lets go or is no more."""
        with self._alone(), self._mail.lock:
            self._turns.owner, self._mail.ended = weakref.ref(by), []

    def _let_go(self, by: object | None) -> None:
        """``by`` steps it no more; None for one that is no more."""
        with self._mail.lock:
            if self._turns.owner() is by:
                self._turns.owner, self._mail.ended = nobody, None

    def _running_ids(self) -> set[int]:
        """Of requests with a sample that has a slot. For the thread that steps."""
        return {sample.request_id for sample in self._scheduler.running}

    # -- inside --------------------------------------------------------------------------------------------------
    def _take_in(self) -> list[int]:
        """What other threads have left: new requests, then cancellations, which are returned."""
        if self._samples.reported:  # of a step that raised
            self._mail.keep(self._samples.collect())
        with self._mail.lock:  # ``submit`` counts who waits
            arrived, cancelled = self._mail.take()
            for request_id, request, arrived_s in arrived:
                self._samples.add(request_id, request, arrived_s)
        for request_id in cancelled:
            self._samples.cancel(request_id)
        return cancelled

    def _take_in_cancelled(self) -> None:
        """Unless somebody is at it: whoever holds the books looks here after that."""
        books = self._turns.books
        while self._mail.has_cancelled and self._is_usable and books.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                books.release()

    @contextmanager
    def _alone(self, by: object | None = None, even_closed: bool = False) -> Iterator[None]:
        """Only one thread at a time, and only ``by`` while an ``AsyncEngine`` has claimed this engine."""
        if not even_closed:
            self._require_open()
        try:
            with self._turns.alone(by):
                if not even_closed:
                    self._require_open()
                yield
        finally:
            self._take_in_cancelled()  # who was cancelled meanwhile

    @property
    def _is_usable(self) -> bool:
        return not self._closed and os.getpid() == self._pid

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("this engine is closed; make a new one")
        if not self._is_usable:
            raise ConfigError("this engine belongs to the process that forked this one; make another here")

    def _checked(self, request: Request) -> Request:
        """A copy, which this cache can hold."""
        most = self._loop.max_stop_tokens
        request = checked_request(request, vocab_size=self.model.config.vocab_size, max_stop_tokens=most)
        self._costs.require_room(request, self._loop.max_seq_len, self._room_bytes, self.cache.memory_limit)
        return request
