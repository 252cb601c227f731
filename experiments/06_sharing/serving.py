"""Requests that come and go over the slots of a cache, on the ledger: how often one of them needs the driver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from common import Records
from traces import SHAPES

import vattn
from vattn.driver import LedgerDriver

PAGE_BYTES, PAGE_TOKENS = 2 << 20, 16
NUM_SLOTS, NUM_BUSY = 64, 48
ROUND_TOKENS = 16  # by which every sequence grows at once
WINDOW, GOAL = 1000, 0.1  # warmed up: never again so many requests in a row with more calls each on average
SIGMA = math.log(16) / 2.3263478740408408  # between the median and the 99th percentile
MAX_SEQ_LEN = 16_384

LIMITS = (4, 2, 1)
# Requests to warm up, and then to count. The goal is for lengths that are known; the others show what that is worth.
SYSTEMS = {"vattn": (20_000, 100_000), "vattn-unknown-length": (10_000, 10_000), "vattn-no-parking": (1000, 9000)}

Lengths = tuple[np.ndarray, np.ndarray]  # of prompts, and of whole sequences


def bounded(draw: np.random.Generator, count: int) -> Lengths:
    """Prompts of up to 768 tokens and answers of up to 256, all equally likely."""
    prompts = draw.integers(1, 769, count)
    return prompts, prompts + draw.integers(1, 257, count)


def long_tailed(draw: np.random.Generator, count: int) -> Lengths:
    """Log-normal with median 256 and 99th percentile 4,096, at most 16,384; three quarters are the prompt."""
    ends = np.clip(draw.lognormal(math.log(256), SIGMA, count), 4, MAX_SEQ_LEN).astype(np.int64)
    return ends * 3 // 4, ends


LENGTHS: dict[str, Callable[[np.random.Generator, int], Lengths]] = {"bounded": bounded, "log-normal": long_tailed}


@dataclass
class Outcome:
    calls: np.ndarray
    """Driver calls from each request's admission to the next one's: create, release, map, set_access and unmap."""
    busy: float
    """Slots in use, on average over the rounds."""
    peak_bytes: int


def pages_and_rounds(lengths: Lengths) -> Lengths:
    """Pages that each request comes to, and rounds that it stays."""
    prompts, ends = lengths
    return -(-ends // PAGE_TOKENS), -(-(ends - prompts) // ROUND_TOKENS)


def limit_for(lengths: Lengths, share: float) -> int:
    """Bytes: so many times what ``NUM_BUSY`` sequences come to, those that stay longer being met more often."""
    pages, num_rounds = pages_and_rounds(lengths)
    average = float((pages * num_rounds).sum() / num_rounds.sum())
    return max(int(share * NUM_BUSY * average), int(pages.max())) * PAGE_BYTES


def serve(lengths: Lengths, limit_bytes: int, system: str, seed: int = 2) -> Outcome:
    """Requests that arrive at random, as many as keep ``NUM_BUSY`` slots in use, and wait for a slot and for memory.

    One is admitted, in order of arrival, when the pages of its whole length fit beside those of all others'.
    """
    prompts, ends = (array.tolist() for array in lengths)
    pages, num_rounds = (array.tolist() for array in pages_and_rounds(lengths))
    gaps = np.random.default_rng(seed).exponential(sum(num_rounds) / len(ends) / NUM_BUSY, len(ends))
    arrivals = gaps.cumsum().tolist()
    limit_pages = limit_bytes // PAGE_BYTES
    layout = vattn.KVLayout(*SHAPES["8B"], MAX_SEQ_LEN, torch.bfloat16)
    live: dict[int, list[int]] = {}  # slot -> rows, rows at the end, pages at the end
    promised, now, num_admitted, total_busy, num_passed = 0, 0.0, 0, 0, 0
    calls, seen = np.zeros(len(ends), np.int64), 0
    with vattn.KVCache(layout, NUM_SLOTS, driver=LedgerDriver(1 << 45), memory_limit=limit_bytes) as cache:
        counts = cache.driver.counts
        while num_admitted < len(ends):
            if not live:
                now = max(now, arrivals[num_admitted])
            while num_admitted < len(ends) and arrivals[num_admitted] <= now and len(live) < NUM_SLOTS:
                prompt, end, num_pages = prompts[num_admitted], ends[num_admitted], pages[num_admitted]
                if promised + num_pages > limit_pages:
                    break
                slot = cache.acquire(expect_len=None if system == "vattn-unknown-length" else end)
                cache.ensure(slot, prompt)
                live[slot] = [prompt, end, num_pages]
                promised += num_pages
                made = counts.num_create + counts.num_release + counts.num_map + counts.num_unmap
                made += counts.num_set_access
                calls[num_admitted], seen = made - seen, made
                num_admitted += 1
            for each in live.values():
                each[0] = min(each[0] + ROUND_TOKENS, each[1])
            cache.ensure_batch(list(live), [rows for rows, *_ in live.values()])
            for slot in [slot for slot, (rows, end, _) in live.items() if rows == end]:
                cache.release(slot)
                promised -= live.pop(slot)[2]
                if system == "vattn-no-parking":
                    cache.trim(keep_bytes=limit_bytes)
            now += 1
            total_busy += len(live)
            num_passed += 1
        cache.check_integrity()
        stats = cache.stats()
        assert stats.num_oom == 0
        return Outcome(calls, total_busy / num_passed, stats.peak_physical_bytes)


def warmed_up_after(calls: np.ndarray) -> int | None:
    """Requests until every ``WINDOW`` in a row take fewer than ``GOAL`` calls each; None if the last ones do not."""
    sums = np.convolve(calls, np.ones(WINDOW), "valid")
    above = np.flatnonzero(sums >= GOAL * WINDOW)
    after = 0 if not above.size else int(above[-1]) + 1
    return after if after < len(sums) else None


def run_serving(records: Records, quick: bool) -> None:
    """Every distribution, limit and system."""
    for name, draw_lengths in LENGTHS.items():
        for share in LIMITS:
            for system, (num_warm_up, count) in SYSTEMS.items():
                if quick:
                    num_warm_up, count = num_warm_up // 20, count // 50
                lengths = draw_lengths(np.random.default_rng(1), num_warm_up + count)
                limit = limit_for(lengths, share)
                outcome = serve(lengths, limit, system)
                calls, after = outcome.calls[num_warm_up:], warmed_up_after(outcome.calls)
                case = f"serving lengths={name} limit={share}"
                for metric, unit, value in (
                    ("warm_up", "requests", num_warm_up),
                    ("requests", "requests", count),
                    ("calls_mean", "calls/request", calls.mean()),
                    ("calls_any", "%", (calls > 0).mean() * 100),
                    ("pages", "pages/request", pages_and_rounds(lengths)[0].mean()),
                    ("busy", "slots", outcome.busy),
                    ("limit", "GiB", limit / (1 << 30)),
                    ("peak_memory", "GiB", outcome.peak_bytes / (1 << 30)),
                    ("warmed_up_after", "requests", after),
                ):
                    if value is not None:
                        records.add(case, system, metric, unit, [float(value)])
