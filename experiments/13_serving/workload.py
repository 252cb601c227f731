"""The same work for every system, timed from outside: no system is imported here, each is driven through ``System``."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Protocol

MANY_TOKENS = 256  # of an answer, for decode steps to be timed in its middle
FIRST_TOKENS = 24  # of an answer, for prefill
ENDLESS_TOKENS = 4096  # of an answer that is going to be cancelled


class System(Protocol):
    """What serves: greedy, no stop tokens."""

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Queue a request; its id."""
        ...

    def step(self) -> list[tuple[int, int]]:
        """(id, new tokens) of what came since the last call; may wait for it."""
        ...

    def cancel(self, request: int) -> None:
        """End a request."""
        ...


@dataclass(frozen=True)
class Case:
    """The sizes of an experiment: one for the 8B shape, one to try the program with."""

    name: str
    vocab_size: int
    steps: Sequence[tuple[int, int]]  # batch, context
    prefill: Sequence[tuple[int, int]]  # prompts, tokens of each
    running: tuple[int, int]  # requests that decode, tokens of their prompts, when a long prompt comes
    long_prompt: int
    requests: int  # of the trace
    median_prompt: int = 512
    median_answer: int = 128
    most: tuple[int, int] = (6144, 1024)  # tokens of a prompt and of an answer
    repeats: int = 3

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest request."""
        lengths = [context + MANY_TOKENS for _, context in self.steps] + [n + FIRST_TOKENS for _, n in self.prefill]
        return max(*lengths, self.running[1] + ENDLESS_TOKENS, self.long_prompt + 2, sum(self.most))


CASES = {
    "8B": Case(
        "8B",
        128256,
        steps=[(1, 1024), (8, 1024), (64, 1024), (32, 4096)],
        prefill=[(8, 936), (64, 936), (32, 4008)],
        running=(8, 1024),
        long_prompt=16384,
        requests=256,
    ),
    "tiny": Case(
        "tiny",
        500,
        steps=[(1, 200), (4, 200)],
        prefill=[(4, 60)],
        running=(2, 40),
        long_prompt=300,
        requests=12,
        median_prompt=24,
        median_answer=10,
        most=(100, 60),
        repeats=1,
    ),
}


@dataclass
class Times:
    """When a request was submitted, and when each of its tokens came."""

    begin: float
    tokens: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.tokens[0] - self.begin

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.tokens)]


def tokens(case: Case, count: int, seed: int) -> list[int]:
    """A prompt."""
    draw = random.Random(seed)
    low, high = min(1000, case.vocab_size // 4), case.vocab_size - case.vocab_size // 64
    return [draw.randrange(low, high) for _ in range(count)]


def trace(case: Case) -> list[tuple[list[int], int]]:
    """(prompt, new tokens) of requests with log-normal lengths."""
    draw, found = random.Random(0), []
    for i in range(case.requests):
        prompt = int(draw.lognormvariate(math.log(case.median_prompt), 0.8))
        answer = int(draw.lognormvariate(math.log(case.median_answer), 0.8))
        prompt, answer = min(max(prompt, 16), case.most[0]), min(max(answer, 4), case.most[1])
        found.append((tokens(case, prompt, 10_000 + i), answer))
    return found


def run(
    system: System,
    requests: Sequence[tuple[Sequence[int], int]],
    arrivals: Sequence[float] | None = None,
    on_step: Callable[[float, list[tuple[int, int]]], None] | None = None,
) -> list[Times]:
    """Every request to its end; times in the order of the requests.

    Args:
        requests: (prompt, new tokens).
        arrivals: seconds from now at which each is submitted, rising; None: all at once. A request's time begins when
            it was due, however late the driver comes to submit it.
        on_step: told when each step's tokens came, and them.
    """
    begin, pending, times, missing = time.perf_counter(), list(range(len(requests)))[::-1], {}, {}
    found: list[Times] = []
    while pending or missing:
        while pending and (arrivals is None or begin + arrivals[pending[-1]] <= time.perf_counter()):
            index = pending.pop()
            prompt, count = requests[index]
            found.append(Times(begin if arrivals is None else begin + arrivals[index]))
            request = system.submit(prompt, count)
            times[request], missing[request] = found[-1], count
        if not missing:
            time.sleep(max(0.0, begin + arrivals[pending[-1]] - time.perf_counter()) if arrivals else 0)
            continue
        came = system.step()
        now = time.perf_counter()
        for request, count in came:
            times[request].tokens += [now] * count
            missing[request] -= count
            if missing[request] <= 0:
                del missing[request]
        if on_step is not None and came:
            on_step(now, came)
    return found


def step_ms(system: System, case: Case, batch: int, context: int) -> list[float]:
    """Milliseconds between steps in which each of so many requests got a token."""
    length = context - MANY_TOKENS // 2
    steps: list[tuple[float, bool]] = []
    requests = [(tokens(case, length, 7 + i), MANY_TOKENS) for i in range(batch)]
    run(system, requests, on_step=lambda now, came: steps.append((now, len(came) == batch)))
    between = [(later - earlier) * 1e3 for (earlier, before), (later, after) in pairwise(steps) if before and after]
    return between[8:-2]


def prefill_tokens_per_s(system: System, case: Case, count: int, length: int, one_step_ms: float) -> list[float]:
    """From the time to everybody's 24th token, less 23 steps."""
    found = []
    for repeat in range(case.repeats + 1):  # the first one warms up
        requests = [(tokens(case, length, (count * 100 + repeat) * 1000 + i), FIRST_TOKENS) for i in range(count)]
        begin = time.perf_counter()
        run(system, requests)
        took = time.perf_counter() - begin - (FIRST_TOKENS - 1) * one_step_ms / 1e3
        found.append(count * length / took)
    return found[1:]


def silence(system: System, case: Case) -> tuple[list[float], list[float], list[float]]:
    """(longest time without a token of those that decode, time to the first token of a long prompt that arrives beside
    them, its time alone), milliseconds each."""
    longest, beside, alone = [], [], []
    for repeat in range(case.repeats + 1):
        long = (tokens(case, case.long_prompt, 77 + repeat), 2)
        (only,) = run(system, [long])
        many = _silence(system, case, long, repeat)
        if repeat or case.repeats == 1:
            alone.append(only.first * 1e3)
            longest.append(many[0] * 1e3)
            beside.append(many[1] * 1e3)
    return longest, beside, alone


def _silence(system: System, case: Case, long: tuple[list[int], int], seed: int) -> tuple[float, float]:
    """(longest time without a token, time to the long prompt's first), seconds."""
    count, length = case.running
    came: dict[int, list[float]] = {
        system.submit(tokens(case, length, 100 * seed + i), ENDLESS_TOKENS): [] for i in range(count)
    }
    arrived, newcomer, first = math.inf, -1, 0.0
    while not first:
        step = system.step()
        now = time.perf_counter()
        for request, number in step:
            if request == newcomer:
                first = now - arrived
            else:
                came[request] += [now] * number
        if newcomer < 0 and all(len(each) >= 16 for each in came.values()):
            arrived = now
            newcomer = system.submit(*long)
        assert all(len(each) < ENDLESS_TOKENS for each in came.values()), "the long prompt took too long"
    for request in (*came, newcomer):
        system.cancel(request)
    gaps = [y - x for each in came.values() for x, y in pairwise([*each, arrived + first]) if y > arrived]
    return max(gaps), first


def trace_tokens_per_s(system: System, case: Case) -> list[float]:
    """New tokens of all requests, submitted at once, over the time to the last."""
    requests, found = trace(case), []
    for _ in range(case.repeats):
        begin = time.perf_counter()
        run(system, requests)
        found.append(sum(count for _, count in requests) / (time.perf_counter() - begin))
    return found


def poisson(system: System, case: Case, requests_per_s: float) -> tuple[list[float], list[float]]:
    """(times to first tokens, times between tokens), milliseconds, of the trace's requests arriving at random."""
    draw, at, arrivals = random.Random(1), 0.0, []
    requests = trace(case)
    for _ in requests:
        at += draw.expovariate(requests_per_s)
        arrivals.append(at)
    times = run(system, requests, arrivals)
    return [each.first * 1e3 for each in times], [gap * 1e3 for each in times for gap in each.gaps]


def prefill(
    system: System, case: Case, steps: dict[tuple[int, int], float]
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """(case, metric -> samples); ``steps``: milliseconds of a decode step by (batch, context)."""
    for count, length in case.prefill:
        one = next(ms for (batch, context), ms in steps.items() if batch == count and context >= length)
        rates = prefill_tokens_per_s(system, case, count, length, one)
        yield f"{case.name} prompts={count} tokens={length}", {"prefill_tokens_per_s": rates}


def measure(
    system: System, case: Case, requests_per_s: float | None = None
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """(case, metric -> samples), as they come.

    Args:
        requests_per_s: at which the trace's requests arrive; None: 80 % of those that this system gets through.
    """
    steps: dict[tuple[int, int], float] = {}
    for batch, context in case.steps:
        samples = step_ms(system, case, batch, context)
        steps[batch, context] = median(samples)
        yield f"{case.name} B={batch} L={context}", {"engine_step": samples}
    yield from prefill(system, case, steps)
    longest, beside, alone = silence(system, case)
    times = {"longest_silence": longest, "prompt_beside": beside, "prompt_alone": alone}
    yield f"{case.name} B={case.running[0]} prompt={case.long_prompt}", times
    rates = trace_tokens_per_s(system, case)
    yield f"{case.name} trace={case.requests}", {"trace_tokens_per_s": rates}
    if requests_per_s is None:
        requests_per_s = 0.8 * median(rates) * case.requests / sum(count for _, count in trace(case))
    first, between = poisson(system, case, requests_per_s)
    yield (
        f"{case.name} poisson={case.requests}",
        {
            "arrivals": [requests_per_s],
            "first_token": first,
            "first_token_p99": [_p99(first)],
            "between_tokens": between,
            "between_tokens_p99": [_p99(between)],
        },
    )


def _p99(samples: list[float]) -> float:
    return sorted(samples)[min(len(samples) - 1, math.ceil(0.99 * len(samples)) - 1)]


UNITS = {
    "engine_step": "ms",
    "prefill_tokens_per_s": "tokens/s",
    "longest_silence": "ms",
    "prompt_beside": "ms",
    "prompt_alone": "ms",
    "trace_tokens_per_s": "tokens/s",
    "arrivals": "requests/s",
    "first_token": "ms",
    "first_token_p99": "ms",
    "between_tokens": "ms",
    "between_tokens_p99": "ms",
    "open_to_first_token": "s",
    "warm_up": "s",
}
