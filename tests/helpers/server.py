"""A server in this process, on a thread, over an engine that the test can look into."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from vattn import Engine
from vattn.models import Tokenizer
from vattn.serve.run import listening_socket, serve
from vattn.serve.service import Service, Settings

NAME = "tiny"


@dataclass
class Running:
    """What a test may want of it."""

    url: str
    engine: Engine
    tokenizer: Tokenizer
    service: Service

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **options)

    def is_idle(self) -> bool:
        return not self.engine.has_work


@contextmanager
def running(
    make_engine: Callable[[], Engine], tokenizer: Tokenizer, *, send_bytes: int | None = None, **settings: Any
) -> Iterator[Running]:
    """Serves until the end of the block, at which nothing may be under way any more.

    Args:
        send_bytes: what the system may hold of answers that a client does not read; None for its own choice.
        settings: as of ``Settings``.
    """
    with make_engine() as engine:
        longest = min(engine.longest, engine.cache.layout.max_seq_len)
        told = Settings(**{"model_names": (NAME,), "max_model_len": longest, **settings})
        began = threading.Event()
        found: list[Any] = []

        def ready(*given: Any) -> None:
            found.extend(given)
            began.set()

        opened = listening_socket("127.0.0.1", 0)
        if send_bytes is not None:  # connections take it from here
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        thread = threading.Thread(target=serve, args=(engine, tokenizer, told, opened, ready))
        thread.start()
        assert began.wait(60)
        url, server = found
        try:
            yield Running(url, engine, tokenizer, server.config.app.state.service)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
        assert not engine.has_work
        assert engine.cache.stats().num_live_slots == 1  # the decode loop's own
        engine.cache.check_integrity()


def raw(running: Running, data: bytes, *more: bytes) -> bytes:
    """What comes back on a connection of its own, until the server closes it."""
    with socket.create_connection(running.address, timeout=60) as connection:
        connection.sendall(data)
        for part in more:
            connection.sendall(part)
        return until_closed(connection)


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def post(path: str, body: bytes | dict[str, Any], *headers: str, close: bool = True) -> bytes:
    """A request as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}", *(["Connection: close"] if close else []), *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, Any]:
    """The error object, which is all that the body may be."""
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]
