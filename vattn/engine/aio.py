"""``AsyncEngine``: an engine whose steps run on a thread, and whose requests are streams."""

from __future__ import annotations

import asyncio
import atexit
import operator
import threading
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

import torch

from ..errors import ConfigError, OutOfPages, OutOfSlots
from ..interrupts import Uninterrupted
from ..requests import Request, StepToken
from .engine import Engine

__all__ = ["AsyncEngine"]

_RETRY_S = 0.02  # where others hold all memory or slots


class _Stream:
    """The tokens of one request on their way to an event loop."""

    def __init__(self, num_samples: int) -> None:
        self.loop = asyncio.get_running_loop()
        # As long as an answer at most. None: cancelled.
        self.queue: asyncio.Queue[StepToken | Exception | None] = asyncio.Queue()
        self.num_open = num_samples  # as its consumer sees it
        self.num_running = num_samples  # as the engine does


class AsyncEngine:
    """Streams of tokens from an engine, for any number of tasks and event loops.

    A thread steps the engine from the first stream on. While this is open, ``step``, ``generate`` and ``close`` of the
    engine, and another AsyncEngine of it, raise ``ConfigError``; ``submit``, ``cancel`` and ``stats`` do not. The
    engine stays its maker's to close, after this. One that nobody closes ends with its last reference, or with the
    process.

    Args:
        engine: its ``max_waiting`` bounds the queue: beyond it a stream begins with ``QueueFull``.

    Raises:
        ConfigError: another AsyncEngine or thread steps the engine, or it is closed.
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise ConfigError(f"an AsyncEngine takes a vattn.Engine, got a {type(engine).__name__}")
        engine._claim(self)
        self.engine = engine
        self._lock = threading.RLock()  # of what follows
        self._streams: dict[int, _Stream] = {}
        self._thread: _Thread | None = None
        self._is_closing = False
        self._stop = threading.Event()
        self._idle = threading.Event()  # no stream is open, or will be
        self._idle.set()

    async def stream(self, request: Request) -> AsyncIterator[StepToken]:
        """The request's tokens as they come, until every sample of it has ended or somebody cancels it. Leaving the
        loop early cancels it.

        Raises:
            ConfigError: as ``Engine.submit``, or this is closed.
            QueueFull: as many wait as ``max_waiting`` allows.
            Exception: a step raised, and the request was under way. Where that is no Exception, as SystemExit: a
                RuntimeError with it as its cause.
        """
        request_id, stream = self._open(request)
        try:
            while stream.num_open:
                item = await stream.queue.get()
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                stream.num_open -= item.finish_reason is not None
                yield item
        finally:
            if stream.num_open:
                self._drop(request_id)

    async def close(self, drain: bool = True) -> None:
        """Take no more requests, and end the thread. Idempotent.

        Args:
            drain: let what is under way come to its end first; else it is cancelled, and its streams raise ConfigError.
        """
        with self._lock:
            self._is_closing = True
        if drain:
            await asyncio.get_running_loop().run_in_executor(None, self._idle.wait)
        self._stop.set()
        if self._thread is None:
            self.engine._let_go(self)
        else:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.end)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=error is None)

    # -- inside --------------------------------------------------------------------------------------------------
    def _open(self, request: Request) -> tuple[int, _Stream]:
        with Uninterrupted(), self._lock:  # no step hands out tokens before the stream is known
            if self._is_closing or self._stop.is_set():
                raise ConfigError("this AsyncEngine is closed; make a new one")
            if self._thread is None:
                thread = _Thread(self)
                thread.start()
                atexit.register(thread.end)
                self._thread = thread
            request_id = self.engine.submit(request)
            stream = self._streams[request_id] = _Stream(operator.index(request.n))
            self._idle.clear()
        return request_id, stream

    def _take(self, request_id: int) -> _Stream | None:
        """A stream, which gets nothing more from the engine."""
        with self._lock:
            stream = self._streams.pop(request_id, None)
            if not self._streams:
                self._idle.set()
        return stream

    def _turn(self, has_work: bool) -> None:
        """In the thread: a step, if there is something to do."""
        try:
            self._hand_out(self.engine._step(self) if has_work else [])
        except (OutOfPages, OutOfSlots):  # nothing runs, and others hold what it takes
            time.sleep(_RETRY_S)
        except BaseException as error:  # a callback's sys.exit() must leave no stream waiting
            if not isinstance(error, Exception):
                cause, error = error, RuntimeError(f"a step of the engine raised {error!r}")
                error.__cause__ = cause
            self._fail(self.engine._running_ids() or self._stream_ids(), error)
            time.sleep(_RETRY_S)
        for request_id in self.engine._mail.take_ended():
            if (stream := self._take(request_id)) is not None:
                _send(stream.loop, [(stream, None)])

    def _hand_out(self, tokens: list[StepToken]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, StepToken]]] = {}
        with self._lock:
            for token in tokens:
                stream = self._streams.get(token.request_id)
                if stream is None:
                    continue
                by_loop.setdefault(stream.loop, []).append((stream, token))
                stream.num_running -= token.finish_reason is not None
                if not stream.num_running:
                    self._take(token.request_id)
        for loop, items in by_loop.items():
            if not _send(loop, items):
                for token in {token.request_id: token for _, token in items}.values():
                    self._drop(token.request_id)

    def _finish(self) -> None:
        """In the thread, at its end: who has asked for that has seen to it that no stream opens any more."""
        self._fail(self._stream_ids(), ConfigError("this AsyncEngine was closed while the request was under way"))
        self.engine._let_go(self)

    def _stream_ids(self) -> set[int]:
        with self._lock:
            return set(self._streams)

    def _fail(self, request_ids: set[int], error: Exception) -> None:
        for request_id in request_ids:
            stream = self._drop(request_id)
            if stream is not None:
                _send(stream.loop, [(stream, error)])

    def _drop(self, request_id: int) -> _Stream | None:
        stream = self._take(request_id)  # first, so that the thread does not take it for one that others cancelled
        self.engine.cancel(request_id)
        return stream


class _Thread(threading.Thread):
    """Steps an engine until its AsyncEngine is closed, or nobody refers to that any more, or the process ends.

    The interpreter would abort at its end if a daemon thread was inside torch; one that is no daemon is waited for
    before ``atexit`` could end it. So this is a daemon, and its ``end`` is registered with ``atexit``.
    """

    def __init__(self, serving: AsyncEngine) -> None:
        super().__init__(name="vattn-engine", daemon=True)
        self._serving = weakref.ref(serving)
        self._engine, self._stop_event, self._streams = serving.engine, serving._stop, serving._streams

    def run(self) -> None:
        engine = self._engine
        try:
            if engine.cache.device.type == "cuda":
                torch.cuda.set_device(engine.cache.device)
            while not self._stop_event.is_set():
                has_work = engine.wait(1.0)
                serving = self._serving()
                if serving is None:
                    break
                serving._turn(has_work)
                del serving
        finally:
            self._stop_event.set()
            serving = self._serving()
            if serving is not None:
                serving._finish()
            else:
                for request_id in list(self._streams):
                    engine.cancel(request_id)
                engine._let_go(None)
            atexit.unregister(self.end)

    def end(self) -> None:
        """End it and wait for that."""
        if self.is_alive():  # not so in a process that was forked meanwhile
            self._stop_event.set()
            self._engine.wake()
            self.join()


def _send(loop: asyncio.AbstractEventLoop, items: Sequence[tuple[_Stream, StepToken | Exception | None]]) -> bool:
    """Into the streams' queues, by their event loop; False where that has ended, and its tasks with it."""

    def put() -> None:
        for stream, item in items:
            stream.queue.put_nowait(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        return False
    return True
