"""One trace of requests, so many at a time, at a server of OpenAI's interface or at an engine; and when tokens came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import aiohttp

from vattn import Engine, Request


@dataclass(frozen=True)
class Case:
    """Sizes: one for the 8B shape, one to try the program with."""

    name: str
    vocab_size: int
    requests: int
    streams: int  # at a time
    prompt: tuple[int, int] = (256, 1024)  # tokens, at least and at most
    answer: tuple[int, int] = (128, 384)
    repeats: int = 3

    def trace(self, seed: int) -> list[tuple[list[int], int]]:
        """(prompt, new tokens); two traces share nothing that a server could have stored."""
        draw = random.Random(seed)
        lengths = [(draw.randint(*self.prompt), draw.randint(*self.answer)) for _ in range(self.requests)]
        return [
            ([draw.randrange(self.vocab_size // 4, self.vocab_size) for _ in range(count)], new)
            for count, new in lengths
        ]


@dataclass
class Answer:
    """When a request was sent, when parts of its answer came, and how many tokens they were."""

    begin: float
    came: list[float] = field(default_factory=list)
    num_tokens: int = 0


@dataclass
class Run:
    """A trace's answers, and how long all of it took."""

    answers: list[Answer]
    seconds: float

    def metrics(self) -> dict[str, float]:
        first = [(each.came[0] - each.begin) * 1e3 for each in self.answers]
        between = [(b - a) * 1e3 for each in self.answers for a, b in pairwise(each.came)]
        return {
            "tokens_per_s": sum(each.num_tokens for each in self.answers) / self.seconds,
            "first_token": _percentile(first, 50),
            "first_token_p99": _percentile(first, 99),
            "between_tokens": _percentile(between, 50),
            "between_tokens_p99": _percentile(between, 99),
        }


def _percentile(samples: Sequence[float], percent: int) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def at_server(url: str, model: str, trace: Sequence[tuple[list[int], int]], streams: int) -> Run:
    """The trace through ``/v1/completions``, as streams of which each has a connection."""
    return asyncio.run(_at_server(url, model, trace, streams))


async def _at_server(url: str, model: str, trace: Sequence[tuple[list[int], int]], streams: int) -> Run:
    waiting, answers = iter(trace), list[Answer]()
    connector, timeout = aiohttp.TCPConnector(limit=streams), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        begin = time.perf_counter()
        await asyncio.gather(*[_client(session, url, model, waiting, answers) for _ in range(streams)])
        return Run(answers, time.perf_counter() - begin)


async def _client(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    waiting: Iterator[tuple[list[int], int]],
    answers: list[Answer],
) -> None:
    for prompt, new in waiting:
        body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = Answer(time.perf_counter())
        answers.append(answer)
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now, part = time.perf_counter(), json.loads(line[6:])
                if "error" in part:
                    raise RuntimeError(part["error"])
                if part["choices"]:
                    answer.came.append(now)
                if part.get("usage"):
                    answer.num_tokens = part["usage"]["completion_tokens"]
        if answer.num_tokens != new:
            raise RuntimeError(f"{answer.num_tokens} tokens came, {new} were asked for")


def at_engine(engine: Engine, trace: Sequence[tuple[list[int], int]], streams: int) -> Run:
    """The same trace without a server: as many requests at a time, submitted between steps."""
    waiting, answers, under_way = iter(trace), list[Answer](), dict[int, Answer]()
    begin = time.perf_counter()
    while True:
        while len(under_way) < streams and (asked := next(waiting, None)) is not None:
            answers.append(Answer(time.perf_counter()))
            under_way[engine.submit(Request(asked[0], max_new_tokens=asked[1]))] = answers[-1]
        if not under_way:
            return Run(answers, time.perf_counter() - begin)
        tokens, now = engine.step(), time.perf_counter()
        for token in tokens:
            if token.error is not None:
                raise token.error
            answer = under_way[token.request_id]
            if token.token is not None:
                answer.came.append(now)
                answer.num_tokens += 1
            if token.finish_reason is not None:
                del under_way[token.request_id]
