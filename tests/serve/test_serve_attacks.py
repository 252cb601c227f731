"""What strangers send: each is refused with an error, or cut off, and the server goes on."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.server import NAME, Running, error_of, post, raw, running, status_of, until_closed

from vattn import Engine
from vattn.models import Llama, Tokenizer

KEY = "a-key-of-some-length"
AUTH = f"Authorization: Bearer {KEY}"
BODY: dict[str, Any] = {"model": NAME, "prompt": "the fox", "max_tokens": 2, "ignore_eos": True}
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def guarded(loaded: tuple[Llama, Tokenizer]) -> Iterator[Running]:
    """With a key, and little patience."""
    model, tokenizer = loaded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vattn.serve.limits.Connection.idle_s", 1.5)
        told: dict[str, Any] = {"keys": ("another", KEY), "max_body_bytes": MAX_BODY, "body_timeout_s": 0.5}
        with running(lambda: Engine(model, max_batch=4, memory_limit=64 << 20), tokenizer, **told) as found:
            yield found
            assert status_of(raw(found, post("/v1/completions", BODY, AUTH))) == 200  # after all of it


def get(path: str, *headers: str, method: str = "GET", host: str = "Host: localhost") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *([host] if host else []), "Connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


# -- bodies ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "x"', "not JSON"),
        (b'{"prompt": "x"}}', "not JSON"),
        (b"{'prompt': 'x'}", "not JSON"),
        (b'{"prompt": "\xff\xfe"}', "byte 12 is not UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"x"', "object"),
        (b"[" * 9000 + b"]" * 9000, "JSON"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": Infinity}', "temperature"),
        (b'{"prompt": "x", "top_p": -Infinity}', "top_p"),
        (b'{"prompt": "x", "presence_penalty": 1e999}', "presence_penalty"),
        (b'{"prompt": "x", "logit_bias": {"1": NaN}}', "logit_bias"),
        (b'{"prompt": "x", "max_tokens": Infinity}', "max_tokens"),
        (b'{"prompt": "x", "max_tokens": 1.5}', "max_tokens"),
        (b'{"prompt": "x", "max_tokens": 1e3}', "max_tokens"),
        (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"prompt": "x", "n": ' + b"9" * 4000 + b"}", "n: "),
        (b'{"prompt": "x", "seed": -' + b"9" * 40 + b"}", "seed"),
        (b'{"prompt": "x", "metadata": {"a": [NaN]}}', "metadata"),
        (b'{"prompt": "x", "metadata": ' + b'{"a":' * 100 + b"1" + b"}" * 101, "metadata"),
        (b'{"prompt": "x", "response_format": {"type": -Infinity}}', "response_format"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_bodies_that_are_wrong(guarded: Running, data: bytes, said: str) -> None:
    answer = raw(guarded, post("/v1/completions", data, AUTH))
    assert status_of(answer) == 400
    assert said in error_of(answer)["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/json5"])
def test_other_types(guarded: Running, kind: str) -> None:
    request = post("/v1/completions", BODY, AUTH).replace(
        b"Content-Type: application/json", b"Content-Type: %b" % kind.encode()
    )
    answer = raw(guarded, request)
    assert status_of(answer) == 415
    assert "JSON" in error_of(answer)["message"]


def test_large_bodies(guarded: Running) -> None:
    body = json.dumps(BODY).encode().ljust(MAX_BODY)
    assert status_of(raw(guarded, post("/v1/completions", body, AUTH))) == 200
    answer = raw(guarded, post("/v1/completions", body + b" ", AUTH))
    assert (status_of(answer), error_of(answer)["code"]) == (413, "body_too_large")


def test_a_length_that_no_body_has_is_refused_at_once(guarded: Running) -> None:
    head = post("/v1/completions", b"", AUTH)
    for length in (b"99999999999", b"9" * 18):
        answer = raw(guarded, head.replace(b"Content-Length: 0", b"Content-Length: " + length))
        assert status_of(answer) == 413


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b"9" * 5000, b"1, 2", b"", b"+5"])
def test_lengths_that_are_none(guarded: Running, length: bytes) -> None:
    request = post("/v1/completions", b"", AUTH).replace(b"Content-Length: 0", b"Content-Length: " + length)
    assert status_of(raw(guarded, request)) in (400, 413)


def test_a_large_body_in_chunks(guarded: Running) -> None:
    head = post("/v1/completions", b"", AUTH, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    assert status_of(raw(guarded, head, *[chunk] * 8)) == 413


def test_slow_bodies(guarded: Running) -> None:
    data = json.dumps(BODY).encode()
    request = post("/v1/completions", data, AUTH)
    answer = raw(guarded, request[: -len(data) // 2])
    assert (status_of(answer), error_of(answer)["code"]) == (408, "timeout")


# -- keys and names ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization: Bearer wrong",),
        (f"Authorization: Bearer {KEY}x",),
        (f"Authorization: Bearer {KEY[:-1]}",),
        (f"Authorization: Basic {KEY}",),
        (f"Authorization: {KEY}",),
        ("Authorization: Bearer",),
        ("Authorization:",),
        ("Authorization: Bearer \xe4\xf6",),
        (f"Authorization: Bearer wrong, Bearer {KEY}",),
        ("Authorization: Bearer wrong", AUTH),
        (AUTH, "Authorization: Bearer wrong"),
        (f"X-Api-Key: {KEY}",),
        (f"Cookie: Authorization=Bearer {KEY}",),
    ],
)
def test_without_the_key(guarded: Running, headers: tuple[str, ...]) -> None:
    for request in (get("/v1/models", *headers), post("/v1/completions", BODY, *headers)):
        answer = raw(guarded, request)
        assert status_of(answer) == 401
        assert error_of(answer)["code"] == "invalid_api_key"
        assert b"\r\nwww-authenticate: Bearer\r\n" in answer


def test_with_a_key(guarded: Running) -> None:
    for headers in ([AUTH], ["authorization: bearer another"], [f"AUTHORIZATION:   Bearer   {KEY}  "]):
        assert status_of(raw(guarded, get("/v1/models", *headers))) == 200
    assert [model.id for model in guarded.client(KEY).models.list()] == [NAME]
    assert status_of(raw(guarded, get("/health"))) == 200  # for probes, which have none


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1/models/",
        "/V1/MODELS",
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "/%2e%2e/v1/models",
        "/./v1/models",
        "/health;/v1/models",
        "/health?/v1/models",
        "/health#/v1/models",
        "/health%00/v1/models",
        "/health\\..\\v1\\models",
        "http://localhost/v1/models",
        "/metrics",
        "/status.json",
        "/docs",
        "/openapi.json",
        "/tokenize",
    ],
)
def test_path_tricks_open_nothing(guarded: Running, path: str) -> None:
    answer = raw(guarded, get(path))
    assert NAME.encode() not in answer
    assert status_of(answer) in (400, 401, 404) or path.startswith("/health")
    with_key = raw(guarded, get(path, AUTH))
    assert b"location:" not in with_key.lower()  # no redirect, which would believe the host that is named


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"])
def test_other_methods(guarded: Running, method: str) -> None:
    answer = raw(guarded, get("/v1/completions", AUTH, "Content-Type: application/json", method=method))
    assert status_of(answer) == 405
    if method != "HEAD":
        assert method in error_of(answer)["message"]


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / FTP/1.1\r\nHost: localhost\r\n\r\n",
        get("/v1/models", host=""),
        get("/v1/models", AUTH, "Host: other"),
        get("/v1/models", "A b: c", AUTH),
        get("/v1/models", "A: b\x00c", AUTH),
        get("/v1/models", "Content-Length: 1", "Content-Length: 2", AUTH),
        get("/v1/models", "Transfer-Encoding: gzip, chunked", AUTH),
        get("/v1/models", "Filler: " + "x" * 200_000, AUTH),
        get("/" + "x" * 200_000, AUTH),
        get("/v1/models", *[f"H{i}: {'y' * 100}" for i in range(2000)], AUTH),
        post("/v1/completions", b"", AUTH, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        + b"ZZ\r\n",
    ],
    ids=lambda value: repr(value[:30]),
)
def test_what_is_no_http(guarded: Running, request_: bytes) -> None:
    answer = raw(guarded, request_)
    assert answer == b"" or status_of(answer) in (400, 408, 413, 431, 501)


def test_a_length_beside_chunks_smuggles_nothing(guarded: Running) -> None:
    inner = get("/v1/models", AUTH)
    request = post("/v1/completions", b"0\r\n\r\n" + inner, AUTH, "Transfer-Encoding: chunked", close=False)
    answer = raw(guarded, request)
    assert (status_of(answer), answer.count(b"HTTP/1.1")) == (400, 1)


def test_upgrades_are_not_made(guarded: Running) -> None:
    asked = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA"]
    request = get("/v1/models", *asked).replace(b"Connection: close\r\n", b"")
    assert status_of(raw(guarded, request)) == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:80", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("10.0.0.1", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("", 403),
    ],
)
def test_a_page_whose_name_points_here(server: Running, host: str, status: int) -> None:
    """The server without a key."""
    assert status_of(raw(server, get("/v1/models", host=f"Host: {host}"))) == status


# -- connections -------------------------------------------------------------------------------------------------------
def test_slow_headers(guarded: Running) -> None:
    assert raw(guarded, b"GET /health HTTP/1.1\r\nHost:") == b""


def test_slow_headers_of_a_second_request(guarded: Running) -> None:
    with socket.create_connection(guarded.address, timeout=60) as connection:
        connection.sendall(get("/health").replace(b"Connection: close\r\n", b""))
        while not (answer := connection.recv(65536)).endswith(b"{}"):
            assert answer
        connection.sendall(b"GET /hea")
        assert until_closed(connection) == b""


def test_a_thousand_idle_connections(guarded: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2500:
        pytest.skip(f"this machine allows {hard} open files; both ends of a thousand connections are in this process")
    idle = [socket.create_connection(guarded.address, timeout=60) for _ in range(1000)]
    try:
        assert status_of(raw(guarded, post("/v1/completions", BODY, AUTH))) == 200
        assert [until_closed(connection) for connection in idle] == [b""] * 1000
    finally:
        for connection in idle:
            connection.close()


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(loaded: tuple[Llama, Tokenizer]) -> None:
    model, tokenizer = loaded
    text, one = "x" * 100_000, {"max_tokens": 1}
    long_chat = {"messages": [{"role": "user", "content": text}]}
    # Not for the server: a variable of the template.
    chat = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"most_tokens": 0}}
    with running(lambda: Engine(model, max_batch=4, memory_limit=64 << 20), tokenizer, max_model_len=200) as server:
        for path, body, field in (
            ("completions", {"prompt": ["x", text]}, "prompt"),
            ("chat/completions", long_chat, "messages"),
        ):
            answer = raw(server, post(f"/v1/{path}", {**body, **one}))
            error = error_of(answer)
            assert (status_of(answer), error["code"], error["param"]) == (400, "context_length_exceeded", field)
            assert "the text has at least" in error["message"]
        assert status_of(raw(server, post("/v1/completions", {"prompt": "x" * 199, **one}))) == 200
        assert status_of(raw(server, post("/v1/chat/completions", {**chat, **one}))) == 200
        assert status_of(raw(server, post("/tokenize", chat))) == 200
