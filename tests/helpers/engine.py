"""Engines over small caches, requests of every kind, and what each of them gives alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from helpers.llama import random_tokens
from vattn import Completion, Engine, KVCache, Request, Sampling, StepToken
from vattn.driver import Driver
from vattn.models import FusedLlama, Llama

PAGE_BYTES = 4096  # 16 tokens of the small model
TOKENS_PER_PAGE = 16


def cache_of(
    model: Llama,
    max_slots: int = 5,
    num_pages: int = 64,
    order: str = "token",
    driver: Driver | None = None,
    **options: int,
) -> KVCache:
    """With a slot for the decode loop among ``max_slots``."""
    page_bytes = PAGE_BYTES if model.device.type == "cpu" else 2 << 20
    layout, limit = model.kv_layout(order=order), num_pages * page_bytes
    return KVCache(layout, max_slots, model.device, limit, page_bytes=page_bytes, driver=driver, **options)  # type: ignore[arg-type]


def requests_of(count: int, max_new_tokens: int = 40, **settings: object) -> list[Request]:
    """Prompts of 1, 8, 15, … tokens; every other one sampled."""
    return [
        Request(random_tokens(1 + 7 * i, 128, seed=i), max_new_tokens, Sampling(1.0 * (i % 2), seed=i), **settings)  # type: ignore[arg-type]
        for i in range(count)
    ]


def alone(model: Llama, requests: Iterable[Request]) -> list[list[Completion]]:
    """What each request gives by itself, with all the memory that it may want: its samples."""
    with Engine(model, memory_limit=64 << 20) as engine:
        return [engine.generate([replace(request, deadline_s=None)]) for request in requests]


def tokens_of(completions: Iterable[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


def run_out(engine: Engine, max_steps: int = 5000) -> list[StepToken]:
    """Step until there is nothing left to do."""
    tokens: list[StepToken] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return tokens
        tokens += engine.step()
    raise AssertionError(f"still {engine.num_running} running and {engine.num_waiting} waiting after {max_steps} steps")


def by_sample(tokens: Iterable[StepToken]) -> dict[tuple[int, int], tuple[int, ...]]:
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for each in tokens:
        key = each.request_id, each.index
        found[key] = found.get(key, ()) + (() if each.token is None else (each.token,))
    return found


def ends(tokens: Iterable[StepToken]) -> dict[tuple[int, int], str]:
    return {(each.request_id, each.index): each.finish_reason for each in tokens if each.finish_reason is not None}


def any_sampling(rng: random.Random) -> Sampling:
    """Greedy, seeded, cut, penalised, biased, in all mixtures."""
    penalised = rng.random() < 0.3
    return Sampling(
        temperature=rng.choice((0.0, 0.0, 0.7, 1.3)),
        top_k=rng.choice((0, 0, 5)),
        top_p=rng.choice((1.0, 1.0, 0.9)),
        min_p=rng.choice((0.0, 0.0, 0.05)),
        seed=rng.randrange(2**40),
        repetition_penalty=1.3 if penalised else 1.0,
        presence_penalty=rng.choice((0.0, 0.5)) if penalised else 0.0,
        frequency_penalty=rng.choice((0.0, 0.3)) if penalised else 0.0,
        logit_bias={rng.randrange(128): rng.choice((-5.0, 3.0, float("-inf")))} if rng.random() < 0.2 else {},
        min_new_tokens=rng.choice((0, 0, 1)),
    )


def any_request(rng: random.Random, longest: int = 60) -> Request:
    """Short and long prompts, several samples, stop tokens that some meet."""
    num_prompt = rng.choice((1, 2, rng.randrange(1, 16), rng.randrange(1, longest)))
    return Request(
        random_tokens(num_prompt, 128, seed=rng.randrange(1000)),
        rng.choice((1, 2, rng.randrange(1, 30), rng.randrange(1, longest))),
        any_sampling(rng),
        stop_tokens=tuple(rng.sample(range(128), rng.choice((0, 0, 3, 8)))),
        num_logprobs=rng.choice((None, None, None, 0, 2)),
        n=rng.choice((1, 1, 1, 1, 2, 4)),
    )


@dataclass
class Fate:
    """What became of a sample so far."""

    expected: Completion
    num_tokens: int = 0
    finish_reason: str | None = None

    def add(self, new: StepToken) -> None:
        """Check one more token, or the end, against what the sample gives alone."""
        assert self.finish_reason is None, "a token after the end"
        if new.token is not None:
            assert new.token == self.expected.tokens[self.num_tokens]
            if self.expected.logprobs:
                assert new.logprob is not None
                assert abs(new.logprob - self.expected.logprobs[self.num_tokens]) < 1e-3
            self.num_tokens += 1
        self.finish_reason = new.finish_reason
        if new.finish_reason in ("stop", "length"):
            assert new.finish_reason == self.expected.finish_reason
            assert self.num_tokens == len(self.expected.tokens)
        else:
            assert new.finish_reason in (None, "deadline")
            assert self.num_tokens < len(self.expected.tokens) or new.finish_reason is not None


class Faulty(FusedLlama):
    """Raises where the test says so."""

    on_prefill: Callable[[tuple[int, ...]], None] | None = None
    on_decode: Callable[[], None] | None = None

    def prefill(self, tokens: torch.Tensor, batch: Any, cache: KVCache, attention: Any) -> None:
        if self.on_prefill is not None:
            self.on_prefill(tuple(tokens.tolist()))
        super().prefill(tokens, batch, cache, attention)

    def decode(self, residual: torch.Tensor, batch: Any, cache: KVCache, attention: Any) -> torch.Tensor:
        if self.on_decode is not None:
            self.on_decode()
        return super().decode(residual, batch, cache, attention)

    def prefill_and_decode(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        if self.on_prefill is not None:
            self.on_prefill(tuple(tokens.tolist()))
        if self.on_decode is not None:
            self.on_decode()
        return super().prefill_and_decode(tokens, *others)
