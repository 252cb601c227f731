"""Answers on their way to a client: server-sent events, and work that ends when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from .errors import ApiError, error_object

__all__ = ["DONE", "EventStream", "broken_off", "event", "unless_gone"]

_Result = TypeVar("_Result")
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % to_json(data)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result], timeout_s: float) -> _Result:
    """The result of ``work``, which is cancelled and has ended when the client goes or the time is up.

    Raises:
        ApiError: 499 where the client went, which it does not see; 504 where the time is up.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, watching}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if watching.done():
            raise ApiError(499, "the client closed the connection")
        raise ApiError(504, f"no end within {timeout_s:g} s", code="timeout")
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come; ends at once when the client goes.

    Args:
        events: does not raise.
        close: is called at the end, also where the events were never begun.
        timeout_s: for all of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]], timeout_s: float
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._timeout_s = events, close, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await unless_gone(receive, self._send(events, send), self._timeout_s)
        except ApiError as error:
            if error.status != 499:
                await send({"type": "http.response.body", "body": broken_off(error), "more_body": False})
        finally:
            await self._close()

    async def _send(self, events: AsyncGenerator[bytes, None], send: Send) -> None:
        async for data in events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def broken_off(error: ApiError) -> bytes:
    """The end of a stream that broke off: the error as an event."""
    return event(error_object(error)) + DONE
