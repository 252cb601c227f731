"""A server in this process, on a thread, over an engine that the test can look into; or in a process of its own."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import openai

from vattn import Engine
from vattn.models import Tokenizer
from vattn.models import load as load_model
from vattn.serve.run import listening_socket, serve
from vattn.serve.service import Service, Settings

NAME = "tiny"


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


@dataclass
class Running:
    """What a test may want of it."""

    url: str
    engine: Engine
    tokenizer: Tokenizer
    service: Service

    @property
    def address(self) -> tuple[str, int]:
        return address_of(self.url)

    def is_idle(self) -> bool:
        return not self.engine.has_work

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **options)


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


@dataclass
class Elsewhere:
    """A server in a process of its own, whose memory is not its clients'."""

    address: tuple[str, int]
    _pipe: Connection

    def measure(self) -> dict[str, float]:
        """What the process holds once nothing is under way."""
        self._pipe.send(True)
        found: dict[str, float] = self._pipe.recv()
        return found


@contextmanager
def running_elsewhere(folder: Path, **options: Any) -> Iterator[Elsewhere]:
    """As ``running``, in another process, over the model of that folder and an engine with those options."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve_elsewhere, args=(folder, options, theirs))
    process.start()
    theirs.close()  # so that its end is seen here
    try:
        yield Elsewhere(address_of(pipe.recv()), pipe)
        pipe.send(False)
        process.join(120)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        pipe.close()


def _serve_elsewhere(folder: Path, options: dict[str, Any], pipe: Connection) -> None:
    model, tokenizer = load_model(folder)
    with running(lambda: Engine(model, **options), tokenizer) as server:
        pipe.send(server.url)
        while pipe.recv():
            while not server.is_idle():  # clients that vanished are found out one by one
                time.sleep(0.01)
            gc.collect()
            # Without the cache's pages, which are files' and have a limit of their own.
            resident = Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]
            counted = {"descriptors": len(os.listdir("/proc/self/fd")), "objects": len(gc.get_objects())}
            pipe.send({"MiB resident": int(resident) / 1024, **counted})


def raw(running: Running | Elsewhere, data: bytes, *more: bytes) -> bytes:
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
