"""``AsyncEngine``: an engine whose steps run on a thread, and whose requests are streams."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

import torch

from ..errors import ConfigError, OutOfPages, OutOfSlots
from ..requests import Request, StepToken
from .engine import Engine

__all__ = ["AsyncEngine"]

_RETRY_S = 0.02  # where others hold all memory or slots


class _Stream:
    """The tokens of one request on their way to an event loop."""

    def __init__(self, num_samples: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[StepToken | BaseException] = asyncio.Queue()  # as long as an answer at most
        self.num_open = num_samples  # as its consumer sees it
        self.num_running = num_samples  # as the engine does


class AsyncEngine:
    """Streams of tokens from an engine, for any number of tasks and event loops.

    A thread calls ``engine.step`` from the first stream on; nobody else may while this is open. The engine stays its
    maker's to close.

    Args:
        engine: its ``max_waiting`` bounds the queue: beyond it a stream begins with ``QueueFull``.
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise ConfigError(f"an AsyncEngine takes a vattn.Engine, got a {type(engine).__name__}")
        self.engine = engine
        self._lock = threading.Lock()  # of what follows
        self._streams: dict[int, _Stream] = {}
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._is_stopped = False
        self._idle = threading.Event()  # no stream is open, or will be
        self._idle.set()

    async def stream(self, request: Request) -> AsyncIterator[StepToken]:
        """The request's tokens as they come, until every sample of it has ended. Leaving the loop early cancels it.

        Raises:
            ConfigError: as ``Engine.submit``, or this is closed.
            QueueFull: as many wait as ``max_waiting`` allows.
            Exception: a step raised, and the request was under way.
        """
        request_id, stream = self._open(request)
        try:
            while stream.num_open:
                item = await stream.queue.get()
                if isinstance(item, BaseException):
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
        with self._lock:
            self._is_stopped = True
            left = list(self._streams)
        self._fail(left, ConfigError("this AsyncEngine was closed while the request was under way"))
        thread = self._thread
        if thread is not None:
            self.engine.wake()
            await asyncio.get_running_loop().run_in_executor(None, thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=error is None)

    # -- inside --------------------------------------------------------------------------------------------------
    def _open(self, request: Request) -> tuple[int, _Stream]:
        with self._lock:  # no step hands out tokens before the stream is known
            if self._is_closing:
                raise ConfigError("this AsyncEngine is closed; make a new one")
            request_id = self.engine.submit(request)
            stream = self._streams[request_id] = _Stream(request.n)
            self._idle.clear()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="vattn-engine", daemon=True)
                self._thread.start()
        return request_id, stream

    def _forget(self, request_id: int) -> None:
        """Under the lock: the engine is done with a request."""
        self._streams.pop(request_id, None)
        if not self._streams:
            self._idle.set()

    def _work(self) -> None:
        """The thread."""
        if self.engine.cache.device.type == "cuda":
            torch.cuda.set_device(self.engine.cache.device)
        while not self._is_stopped:
            if not self.engine.wait(1.0):
                continue
            try:
                tokens = self.engine.step()
            except (OutOfPages, OutOfSlots):  # nothing runs, and others hold what it takes
                time.sleep(_RETRY_S)
            except Exception as error:
                with self._lock:
                    ids = list(self._streams)
                self._fail([each for each in ids if self.engine.is_running(each)] or ids, error)
                time.sleep(_RETRY_S)
            else:
                self._hand_out(tokens)

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
                    self._forget(token.request_id)
        for loop, items in by_loop.items():
            if not _send(loop, items):
                for token in {token.request_id: token for _, token in items}.values():
                    self._drop(token.request_id)

    def _fail(self, request_ids: list[int], error: BaseException) -> None:
        for request_id in request_ids:
            stream = self._drop(request_id)
            if stream is not None:
                _send(stream.loop, [(stream, error)])

    def _drop(self, request_id: int) -> _Stream | None:
        self.engine.cancel(request_id)
        with self._lock:
            stream = self._streams.get(request_id)
            self._forget(request_id)
        return stream


def _send(loop: asyncio.AbstractEventLoop, items: Sequence[tuple[_Stream, StepToken | BaseException]]) -> bool:
    """Into the streams' queues, by their event loop; False where that has ended, and its tasks with it."""

    def put() -> None:
        for stream, item in items:
            stream.queue.put_nowait(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        return False
    return True
