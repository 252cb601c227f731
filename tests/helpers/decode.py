"""Sequences for the decode loop, and what the eager engine makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from helpers.llama import random_tokens, run
from vattn.attention import get
from vattn.decode.loop import DecodedToken
from vattn.engine.engine import Engine, Request
from vattn.kv_cache import KVCache
from vattn.models import Llama


def prompts_for(model: Llama, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths, the first a single token."""
    return [random_tokens(1 + 7 * i % 40, model.config.vocab_size, seed + i) for i in range(count)]


def eager(model: Llama, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[tuple[int, ...]]:
    """Greedy tokens of each prompt by the engine, one prompt at a time."""
    with KVCache(model.kv_layout(), 1, model.device) as cache:
        engine = Engine(model, cache, get("reference" if model.dtype == torch.float32 else "sdpa"))
        return [engine.generate([Request(prompt, max_new_tokens=num_tokens)])[0].tokens for prompt in prompts]


def prefill(model: Llama, cache: KVCache, prompt: Sequence[int], slot: int | None = None) -> int:
    """A slot with the K and V of all but the prompt's last token."""
    slot = cache.acquire(slot)
    if len(prompt) > 1:
        run(model, cache, [slot], [prompt[:-1]])
    return slot


def by_slot(tokens: Iterable[DecodedToken]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for each in tokens:
        found.setdefault(each.slot, []).append(each.token)
    return found
