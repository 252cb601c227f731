"""Sixty-four clients, of which a third vanish and a third send what is wrong."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.server import NAME, Elsewhere, post, raw, running_elsewhere, status_of, until_closed
from soak import what_grew

from vattn import Engine, Request, Sampling
from vattn.models import Llama, Tokenizer

# By what factor, and how much beyond it, the last third of a soak may exceed the middle third; the first warms up. Of
# the server's process alone: one with 64 threads of clients as well grows by 1 MiB for each 1,000 requests.
TOLERANCES = {"MiB resident": (1.0, 4.0), "descriptors": (1.0, 32.0), "objects": (1.0, 2000.0)}
WRONG: list[dict[str, Any]] = [
    {"temperature": -1},
    {"prompt": 5},
    {"model": "another"},
    {"max_tokens": 10**9},
    {"logit_bias": {"9999": 1}},
    {"response_format": {"type": "xml"}},
    {"no_such_field": 1},
]


def vanish(server: Elsewhere, request: bytes, rng: random.Random) -> None:
    """Go before the request is sent, while it is answered, or in the middle of its stream."""
    with socket.create_connection(server.address, timeout=120) as connection:
        connection.sendall(request[: rng.choice((10, len(request) // 2, len(request), len(request)))])
        if rng.random() < 0.5:
            connection.settimeout(rng.random() / 10)
            with suppress(TimeoutError):
                connection.recv(100)


def answered(server: Elsewhere, request: bytes, stream: bool) -> str:
    with socket.create_connection(server.address, timeout=300) as connection:
        connection.sendall(request)
        answer = until_closed(connection)
    assert status_of(answer) == 200, answer
    body = answer.partition(b"\r\n\r\n")[2]
    if not stream:
        return json.loads(body)["choices"][0]["text"]
    events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@contextmanager
def clients(
    folder: Path, loaded: tuple[Llama, Tokenizer]
) -> Iterator[tuple[Elsewhere, Callable[[Iterable[int]], None]]]:
    """A server, and what lets clients with those numbers have their way with it, sixty-four at a time."""
    model, tokenizer = loaded
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    prompts = [" ".join(words[i : i + 3]) for i in range(6)]
    with Engine(model, memory_limit=64 << 20) as engine:
        alone = engine.generate([Request(tokenizer.encode(p), 20, Sampling(), tokenizer.stop_tokens) for p in prompts])
    expected = [tokenizer.decode(each.tokens[:-1] if each.finish_reason == "stop" else each.tokens) for each in alone]

    def one(number: int) -> None:
        rng = random.Random(number)
        which, stream = number % len(prompts), rng.random() < 0.5
        body: dict[str, Any] = {"model": NAME, "prompt": prompts[which], "temperature": 0, "max_tokens": 20}
        kind = number % 3
        if kind == 0:
            assert answered(server, post("/v1/completions", {**body, "stream": stream}), stream) == expected[which]
        elif kind == 1:
            assert status_of(raw(server, post("/v1/completions", {**body, **rng.choice(WRONG)}))) in (400, 404)
        else:
            more = {"stream": stream, "max_tokens": 2000, "n": rng.choice((1, 1, 3)), "ignore_eos": True}
            vanish(server, post("/v1/completions", {**body, **more}), rng)

    # Room for all of them: a full queue is another test's.
    with (
        running_elsewhere(folder, max_batch=16, memory_limit=256 << 20, max_waiting=1000) as server,
        ThreadPoolExecutor(64) as threads,
    ):
        yield server, lambda numbers: list(threads.map(one, numbers)) and None
        assert status_of(raw(server, post("/v1/completions", {"prompt": "x", "max_tokens": 1}))) == 200


def churn(folder: Path, loaded: tuple[Llama, Tokenizer], num_requests: int) -> None:
    with clients(folder, loaded) as (server, come):
        come(range(64))
        before = server.measure()["descriptors"]
        come(range(64, num_requests))
        assert server.measure()["descriptors"] <= before + 64


def test_a_short_churn(folder: Path, loaded: tuple[Llama, Tokenizer]) -> None:
    churn(folder, loaded, 150)


@pytest.mark.slow
def test_a_thousand_requests(folder: Path, loaded: tuple[Llama, Tokenizer]) -> None:
    churn(folder, loaded, 1000)


@pytest.mark.slow
def test_a_soak(folder: Path, loaded: tuple[Llama, Tokenizer]) -> None:
    minutes = float(os.environ.get("VATTN_SOAK_MINUTES", "0"))
    if not minutes:
        pytest.skip("a soak takes the minutes that VATTN_SOAK_MINUTES says: make soak-serve")
    lines: list[dict[str, float]] = []
    end = time.monotonic() + minutes * 60
    with clients(folder, loaded) as (server, come):
        while time.monotonic() < end or len(lines) < 6:
            come(range(200 * len(lines), 200 * len(lines) + 200))
            lines.append(server.measure())
            print(f"{200 * len(lines)} requests: {lines[-1]}", flush=True)
    assert what_grew(lines, TOLERANCES) == []
