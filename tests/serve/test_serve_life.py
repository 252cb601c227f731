"""Clients that go, queues that fill, engines that fail: what becomes of requests, and of what they held."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from helpers.engine import Faulty
from helpers.server import NAME, Running, error_of, post, raw, running, status_of, until_closed

from vattn import Engine
from vattn.models import Llama, Tokenizer
from vattn.serve.health import Health

ENDLESS: dict[str, Any] = {"model": NAME, "prompt": "the fox", "max_tokens": 90_000, "ignore_eos": True}
SHORT: dict[str, Any] = {"model": NAME, "prompt": "the fox", "max_tokens": 3, "ignore_eos": True}


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def small(loaded: tuple[Llama, Tokenizer]) -> Iterator[Running]:
    """One answer at a time, and one that may wait."""
    model, tokenizer = loaded
    with running(lambda: Engine(model, max_batch=1, memory_limit=64 << 20, max_waiting=1), tokenizer) as found:
        yield found


def endless_stream(server: Running) -> Any:
    stream = server.client().post("/completions", body={**ENDLESS, "stream": True}, cast_to=object, stream=True,
                                  stream_cls=openai.Stream[Any])  # fmt: skip
    next(iter(stream))
    return stream


def test_a_client_that_goes_ends_its_stream(server: Running) -> None:
    stream = endless_stream(server)
    assert server.engine.num_running == 1
    stream.close()
    until(server.is_idle)


def test_a_client_that_goes_ends_its_request(server: Running) -> None:
    with socket.create_connection(server.address) as connection:
        connection.sendall(post("/v1/completions", {**ENDLESS, "n": 3}))
        until(lambda: server.engine.num_running == 3)
    until(server.is_idle)


def test_a_client_that_goes_while_it_waits(small: Running) -> None:
    stream = endless_stream(small)
    with socket.create_connection(small.address) as connection:
        connection.sendall(post("/v1/completions", SHORT))
        until(lambda: small.engine.num_waiting == 1)
    until(lambda: small.engine.num_waiting == 0)
    assert small.engine.num_running == 1
    stream.close()


def test_a_full_queue(small: Running) -> None:
    stream = endless_stream(small)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(raw, small, post("/v1/completions", SHORT))
        until(lambda: small.engine.num_waiting == 1)
        for body in (SHORT, {**SHORT, "stream": True}):
            answer = raw(small, post("/v1/completions", body))
            assert (status_of(answer), error_of(answer)["code"]) == (429, "queue_full")
            assert b"\r\nretry-after: 1\r\n" in answer
        stream.close()
        assert status_of(waits.result(60)) == 200


def test_several_prompts_are_taken_together_or_not_at_all(small: Running) -> None:
    stream = endless_stream(small)
    answer = raw(small, post("/v1/completions", {**SHORT, "prompt": ["a", "b"]}))
    assert status_of(answer) == 400  # more than may wait
    assert small.engine.num_waiting == 0
    stream.close()


def test_a_deadline(loaded: tuple[Llama, Tokenizer]) -> None:
    model, tokenizer = loaded
    with running(lambda: Engine(model, memory_limit=64 << 20), tokenizer, request_timeout_s=0.5) as server:
        answer = raw(server, post("/v1/completions", ENDLESS))
        assert (status_of(answer), error_of(answer)["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(endless_stream(server))
        assert status_of(raw(server, post("/v1/completions", SHORT))) == 200


@pytest.fixture
def faulty(loaded: tuple[Llama, Tokenizer]) -> Iterator[tuple[Running, Faulty]]:
    model, tokenizer = loaded
    made = Faulty(model)
    with running(lambda: Engine(made, memory_limit=64 << 20), tokenizer, request_timeout_s=1.0) as found:
        yield found, made


def health(server: Running) -> int:
    return status_of(raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))


def test_an_engine_that_fails(faulty: tuple[Running, Faulty], caplog: pytest.LogCaptureFixture) -> None:
    server, model = faulty

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    assert health(server) == 200
    model.on_decode = model.on_prefill = fail
    answer = raw(server, post("/v1/completions", SHORT))
    assert (status_of(answer), error_of(answer)["code"]) == (503, "engine_error")
    assert b"device" not in answer
    assert "the device is gone" in caplog.text
    answer = raw(server, post("/v1/completions", {**SHORT, "stream": True}))
    assert b'"code":"engine_error"' in answer
    assert answer.rstrip().endswith(b"0")  # the end of the chunks: the stream is closed, not cut
    assert health(server) == 503
    model.on_decode = model.on_prefill = None
    assert health(server) == 200
    assert status_of(raw(server, post("/v1/completions", SHORT))) == 200


def test_an_engine_that_hangs(faulty: tuple[Running, Faulty]) -> None:
    server, model = faulty
    server.service.health = Health(server.service.serving, stalled_s=0.3)
    go_on = threading.Event()
    model.on_decode = lambda: go_on.wait(60) and None
    try:
        answer = raw(server, post("/v1/completions", SHORT))
        assert (status_of(answer), error_of(answer)["code"]) == (504, "timeout")
        until(lambda: health(server) == 503)
    finally:
        go_on.set()
        model.on_decode = None
    until(lambda: health(server) == 200)


def test_a_client_that_does_not_read(loaded: tuple[Llama, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vattn.serve.limits.Connection.write_s", 0.3)
    model, tokenizer = loaded
    with (
        running(lambda: Engine(model, memory_limit=64 << 20), tokenizer, send_bytes=4096) as server,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        connection.sendall(post("/v1/completions", {**ENDLESS, "stream": True, "logprobs": 20}))
        until(lambda: server.engine.num_running == 1)
        until(server.is_idle)


def test_logs_hold_nothing_of_prompts(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "xyzzy"
    raw(server, post("/v1/completions", {**SHORT, "prompt": secret}))
    raw(server, post("/v1/completions", {**SHORT, "prompt": [secret, 1]}))
    raw(server, post("/v1/completions", {**SHORT, "prompt": secret + "\ud800"}))
    raw(server, post("/v1/completions", b'{"prompt": "xyzzy'))
    raw(server, post("/v1/chat/completions", {"messages": [{"role": "user", "content": [secret]}]}))
    raw(server, post(f"/v1/completions?prompt={secret}", {**SHORT, "stop": 1}))
    ours = [record.getMessage() for record in caplog.records if record.name.split(".")[0] in ("vattn", "uvicorn")]
    assert sum("/v1/" in line for line in ours) == 6, ours
    assert secret not in "".join(ours)


def test_two_requests_on_a_connection(server: Running) -> None:
    first, second = (post("/v1/completions", {**SHORT, "prompt": text}, close=text == "b") for text in "ab")
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(first + second)
        assert until_closed(connection).count(b"HTTP/1.1 200 OK") == 2


def test_a_fault_of_the_server_counts_as_one(
    small: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not as a client that went."""

    def broken(text: str) -> list[int]:
        raise RuntimeError("a fault")

    caplog.set_level(logging.INFO, "vattn.serve")
    with monkeypatch.context() as patch:
        patch.setattr(small.tokenizer, "encode", broken)
        answer = raw(small, post("/v1/completions", SHORT))
    assert (status_of(answer), error_of(answer)["type"]) == (500, "server_error")
    assert any('"POST /v1/completions" 500 ' in message for message in caplog.messages)
    assert b'handler="/v1/completions",status="500"} 1.0' in small.service.metrics.render()[0]
    assert status_of(raw(small, post("/v1/completions", SHORT))) == 200
