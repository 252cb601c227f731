"""Sequences for the decode loop, and what the model's own forward makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch

from helpers.llama import random_tokens, run
from vattn.decode import DecodedToken, DecodeLoop
from vattn.errors import OutOfPages
from vattn.kv_cache import KVCache
from vattn.models import FusedLlama, Llama


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


def walk(fused: FusedLlama, model: Llama, num_events: int, seed: int, num_pages: int = 24, **options: int) -> None:
    """A loop in which sequences start, end, stop and are cancelled at random, in a cache that runs out of pages.

    Args:
        num_pages: of the cache on the CPU, where one holds 16 rows: not enough for nine long sequences.
        options: of the loop.
    """
    rng = random.Random(seed)
    prompts = prompts_for(model, 12)
    expected = eager(model, prompts, 60)
    on_cpu = model.device.type == "cpu"
    cache = KVCache(
        model.kv_layout(160),
        12,
        model.device,
        memory_limit=num_pages * 4096 if on_cpu else 10 << 21,
        page_bytes=4096 if on_cpu else None,
    )
    seen = {"started": 0, "ended": 0, "cancelled": 0, "refused": 0, "stopped": 0}
    with cache, DecodeLoop(fused, cache, max_batch=9, ahead_tokens=20, **options) as loop:
        running: dict[int, tuple[int, int, int | None, list[int]]] = {}  # slot -> prompt, tokens to come, stop, so far

        def note(tokens: list[DecodedToken]) -> None:
            for each in tokens:
                prompt, count, stop, found = running[each.slot]
                found.append(each.token)
                assert each.token == expected[prompt][len(found) - 1]
                reason = "stop" if each.token == stop else "length" if len(found) == count else None
                assert each.finish_reason == reason
                if reason:
                    seen["stopped" if reason == "stop" else "ended"] += 1
                    assert cache.seq_len(each.slot) == len(prompts[prompt]) - 1 + len(found)
                    cache.release(each.slot)
                    del running[each.slot]

        while seen["started"] + seen["cancelled"] < num_events:
            event = rng.random()
            if event < 0.3 and len(running) < 9:
                prompt, count = rng.randrange(12), rng.randrange(1, 61)
                stop = rng.choice(expected[prompt]) if rng.random() < 0.3 else None
                slot = rng.choice([slot for slot in range(12) if slot not in running and slot != loop.own_slot])
                try:
                    slot = cache.acquire(slot)
                    if len(prompts[prompt]) > 1:
                        run(model, cache, [slot], [prompts[prompt][:-1]])
                    loop.start(slot, prompts[prompt][-1], count, stop_tokens=() if stop is None else (stop,))
                except OutOfPages:
                    cache.release(slot)
                    seen["refused"] += 1
                    continue
                running[slot] = (prompt, count, stop, [])
                seen["started"] += 1
            elif event < 0.4 and running:
                slot = rng.choice(list(running))
                loop.cancel(slot)
                prompt, _, _, found = running.pop(slot)
                assert cache.seq_len(slot) == len(prompts[prompt]) - 1 + len(found)
                cache.release(slot)
                seen["cancelled"] += 1
            elif event < 0.43:
                note(loop.drain())
            try:
                note(loop.step())
            except OutOfPages:
                seen["refused"] += 1
                loop.cancel(slot := rng.choice(list(running)))
                cache.release(slot)
                del running[slot]
            if rng.random() < 0.05:
                cache.check_integrity()
        while running:
            slot = next(iter(running))
            loop.cancel(slot)
            cache.release(slot)
            del running[slot]
        assert loop.run() == []
        cache.check_integrity()
        assert cache.stats().num_live_slots == 1
    assert min(seen[key] for key in ("ended", "cancelled", "stopped")) > num_events / 50
    assert seen["refused"] or not on_cpu
