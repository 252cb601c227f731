"""What comes in before it is believed: who asks, how large it is, how long it takes."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..arguments import escaped
from .errors import ApiError, response_of

__all__ = ["MAX_HEADER_BYTES", "Connection", "Guard"]

_log = logging.getLogger("vattn.serve")
MAX_HEADER_BYTES = 64 << 10  # of a request's line and headers
_LINGER_S = 1.0  # a client that still sends would not see an answer on a connection that is closed
_OPEN = {"/health", "/"}  # without a key: the second is a page without data
_TIMER = "vattn.connection"


class Guard:
    """In front of the app: refuses requests without a key, and reads the body of the others.

    Args:
        keys: any of which a client must show; none for a server without keys.
        max_body_bytes: of a request's body.
        body_timeout_s: in which a body must have come.
        is_local: answer only requests that name this machine as their host. Else a page of another site, whose name
            was made to point here, could ask in the name of whoever looks at it.
        observe: is told the route and the status of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        max_body_bytes: int,
        body_timeout_s: float,
        is_local: bool,
        observe: Callable[[str, int], None],
    ) -> None:
        self._observe = observe
        self._app, self._keys = app, [key.encode() for key in keys]
        self._max_bytes, self._timeout_s, self._is_local = max_body_bytes, body_timeout_s, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        timer = scope.get("state", {}).get(_TIMER)
        if timer is not None:
            timer.stop()
        began_s, status = time.monotonic(), 499  # the client went

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = [(name.lower(), value) for name, value in scope["headers"]]
            try:
                self._admit(scope["path"], headers)
                body = await self._body(scope["method"], headers, receive)
            except ApiError as error:
                return await self._refuse(error, scope, receive, watched)
            if body is not None:
                await self._app(scope, _replay(body, receive), watched)
        except Exception:  # of which the app tells the client outside of this
            status = 500 if status == 499 else status
            raise
        finally:
            if timer is not None:
                timer.start()
            # No query: somebody may have put a prompt or a key there.
            asked = scope["method"], escaped(scope["path"]), status, time.monotonic() - began_s
            _log.info('"%s %s" %s in %.3f s', *asked)
            self._observe(getattr(scope.get("route"), "path", "other"), status)
        return None

    def _admit(self, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        if self._is_local and not all(_is_this_machine(value) for name, value in headers if name == b"host"):
            raise ApiError(
                403, "this server has no key, and answers only to localhost or an IP address as host: give it --api-key"
            )
        if not self._keys or path in _OPEN:
            return
        given = [value for name, value in headers if name == b"authorization"]
        kind, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Every key is compared, whichever fits: the time says nothing.
        fits = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        if kind.lower() != b"bearer" or not any(fits):
            said = "no key was given" if not given else "the key is wrong"
            challenge = {"www-authenticate": "Bearer"}
            raise ApiError(
                401, f"{said}: send it as Authorization: Bearer KEY", code="invalid_api_key", headers=challenge
            )

    async def _body(self, method: str, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes | None:
        """The whole body; None where the client went."""
        names = [name for name, _ in headers]
        if b"content-length" in names and b"transfer-encoding" in names:  # a proxy may see another end of the body
            raise ApiError(400, "Content-Length and Transfer-Encoding were both given: give one of them")
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if not length.isdigit() or int(length[:20]) > self._max_bytes:
            raise self._too_large()
        chunks, num_bytes = [], 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    num_bytes += len(chunks[-1])
                    if num_bytes > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._timeout_s:g} s", code="timeout") from None
        body = b"".join(chunks)
        if method == "POST":
            kind = next((value for name, value in headers if name == b"content-type"), b"")
            # Also because a page of another site can send other types without asking.
            if kind.partition(b";")[0].strip().lower() != b"application/json":
                raise ApiError(415, "send JSON, with Content-Type: application/json")
            try:
                body.decode()
            except UnicodeDecodeError as error:
                raise ApiError(400, f"the body is not JSON: byte {error.start} is not UTF-8") from None
        return body

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_bytes} bytes", code="body_too_large")

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, let the client come to read that, and close the connection."""
        error.headers = {**(error.headers or {}), "connection": "close"}

        async def lingering(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await self._linger(receive)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await response_of(error)(scope, receive, lingering)

    async def _linger(self, receive: Receive) -> None:
        try:
            async with asyncio.timeout(_LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
        except TimeoutError:
            pass


def _is_this_machine(host: bytes) -> bool:
    name = host.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what comes after it."""
    is_told = False

    async def replayed() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


# -- connections -------------------------------------------------------------------------------------------------------
class _Timer:
    """Closes a connection on which no request comes, or whose client does not read."""

    def __init__(self, idle_s: float, write_s: float) -> None:
        self._idle_s, self._write_s = idle_s, write_s
        self._transport: asyncio.Transport | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._write: asyncio.TimerHandle | None = None

    def made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.start()

    def lost(self) -> None:
        self.stop()
        self.written()
        self._transport = None

    def start(self) -> None:
        """No request is under way."""
        self.stop()
        if self._transport is not None:
            self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._transport.abort)

    def stop(self) -> None:
        """A request has come."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def stuck(self) -> None:
        """The client reads too slowly for what is sent to it."""
        if self._transport is not None and self._write is None:
            self._write = asyncio.get_running_loop().call_later(self._write_s, self._transport.abort)

    def written(self) -> None:
        """It has caught up."""
        if self._write is not None:
            self._write.cancel()
            self._write = None


class Connection(H11Protocol):
    """uvicorn's, which waits no longer than ``idle_s`` for a request, headers included, nor than ``write_s`` for a
    client to read what it is sent. The guard says when a request begins and ends.
    """

    idle_s = 30.0
    write_s = 60.0

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._timer = _Timer(self.idle_s, self.write_s)
        settings["app_state"] = {**settings.get("app_state", {}), _TIMER: self._timer}
        super().__init__(*args, **settings)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer.made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.lost()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._timer.stuck()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._timer.written()
