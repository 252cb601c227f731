"""Sequences for the decode loop, and what the model's own forward makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from helpers.llama import random_tokens, run
from vattn.decode import DecodedToken
from vattn.kv_cache import KVCache
from vattn.models import Llama


def prompts_for(model: Llama, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths, the first a single token."""
    return [random_tokens(1 + 7 * i % 40, model.config.vocab_size, seed + i) for i in range(count)]


def eager(model: Llama, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[tuple[int, ...]]:
    """Greedy tokens of each prompt by the model's own forward, one prompt and one token at a time."""
    attention = "reference" if model.dtype == torch.float32 else "sdpa"
    found = []
    with KVCache(model.kv_layout(), 1, model.device) as cache:
        for prompt in prompts:
            slot, chunk, tokens = cache.acquire(), list(prompt), []
            for _ in range(num_tokens):
                chunk = [int(run(model, cache, [slot], [chunk], attention=attention).argmax())]
                tokens += chunk
            cache.release(slot)
            found.append(tuple(tokens))
    return found


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
