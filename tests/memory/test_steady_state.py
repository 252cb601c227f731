"""A server that has warmed up: requests come and go, and hardly ever does one of them need the driver."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import vattn
from vattn.driver import LedgerDriver

LAYOUT = vattn.KVLayout(32, 8, 128, 1024, torch.bfloat16)  # 16 tokens to a page of 2 MiB
NUM_SLOTS, NUM_BUSY = 64, 48


@dataclass
class Outcome:
    calls: float
    """Driver calls per request: create, release, map and unmap."""
    pages: float
    """What a request takes at its end."""
    peak_bytes: int
    num_short: int
    """How often a request had to wait for memory, or for being tried again."""


def serve(limit_bytes: int, num_warm_up: int, num_requests: int, knows_length: bool, seed: int = 1) -> Outcome:
    """Requests with log-normal lengths, one after another in place of those that end, 16 tokens a round."""
    draw = np.random.default_rng(seed)
    count = num_warm_up + num_requests
    prompts = np.clip(draw.lognormal(np.log(300), 0.7, count), 1, 768).astype(int)
    ends = prompts + np.clip(draw.lognormal(np.log(100), 0.7, count), 1, 256).astype(int)
    next_request, num_short = 0, 0
    live: dict[int, list[int]] = {}  # slot -> rows, rows at the end
    with vattn.KVCache(LAYOUT, NUM_SLOTS, driver=LedgerDriver(1 << 40), memory_limit=limit_bytes) as cache:
        before = cache.stats()
        while live or next_request < count:
            while len(live) < NUM_BUSY and next_request < count:
                prompt, end = int(prompts[next_request]), int(ends[next_request])
                slot = cache.acquire(expect_len=end if knows_length else None)
                try:
                    cache.ensure(slot, prompt)
                except vattn.OutOfPages:
                    cache.release(slot)
                    num_short += 1
                    break
                live[slot] = [prompt, end]
                next_request += 1
                if next_request == num_warm_up:
                    before = cache.stats()
            for rows in live.values():
                rows[0] = min(rows[0] + 16, rows[1])
            try:
                cache.ensure_batch(list(live), [rows for rows, _ in live.values()])
                done = [slot for slot, (rows, end) in live.items() if rows == end]
            except vattn.OutOfPages:
                num_short += 1
                done = [next(reversed(live))]
            for slot in done:
                cache.release(slot)
                del live[slot]
        cache.check_integrity()
        after = cache.stats()
        names = ("num_create", "num_release", "num_map", "num_unmap")
        calls = sum(getattr(after, name) - getattr(before, name) for name in names)
        pages = float(np.ceil(ends / 16).mean())
        return Outcome(calls / num_requests, pages, after.peak_physical_bytes, num_short)


@pytest.mark.parametrize("knows_length", [True, False])
def test_with_room_to_spare_hardly_any_request_needs_the_driver(knows_length):
    outcome = serve(32 << 30, 3000, 3000, knows_length)
    assert outcome.pages > 20
    assert outcome.calls < 0.1
    assert outcome.num_short == 0


def test_where_memory_is_short_pages_are_still_found_in_place_and_the_limit_holds():
    limit = int(1.6 * NUM_BUSY * 28 * (2 << 20))
    known, unknown = (serve(limit, 500, 1000, knows_length) for knows_length in (True, False))
    assert known.peak_bytes <= limit
    assert known.num_short == unknown.num_short == 0  # parked pages never stood in the way of a request
    assert known.calls < unknown.calls < known.pages / 4


def test_a_full_cache_looks_at_few_of_its_parked_pages(monkeypatch):
    """A warmed-up server's cache is full of them; a page more must not cost a look at each."""
    with vattn.KVCache(LAYOUT, NUM_SLOTS, driver=LedgerDriver(1 << 40), memory_limit=60 * 64 * (2 << 20)) as cache:
        slots = [cache.acquire() for _ in range(60)]
        cache.ensure_batch(slots, [1024] * 60)
        for slot in slots:
            cache.release(slot)
        assert cache.stats().free_bytes == 0
        parking, looked_at = cache._slots.parking, 0
        pages_of = parking.pages_of

        def counted(slot):
            nonlocal looked_at
            for each in pages_of(slot):
                looked_at += 1
                yield each

        monkeypatch.setattr(parking, "pages_of", counted)
        empty = cache.acquire(63)
        for rows in range(16, 1024, 16):
            cache.ensure(empty, rows)
        assert cache.stats().in_use_bytes >= 60 * (2 << 20)
        assert 0 < looked_at < 1000


def num_lines(call):
    """How many lines of Python a call runs, loops and generators included."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_statistics_cost_the_same_however_many_pages_there_are():
    """A monitor asks every second, and whoever decodes waits for the answer."""
    lines = set()
    for rows in (16, 1024):
        with vattn.KVCache(LAYOUT, NUM_SLOTS, driver=LedgerDriver(1 << 40), memory_limit=1 << 40) as cache:
            slots = [cache.acquire() for _ in range(NUM_SLOTS)]
            cache.ensure_batch(slots, [rows] * NUM_SLOTS)
            for slot in slots[2:]:
                cache.release(slot)
            child = cache.fork(slots[0])
            cache.check_integrity()  # the counters say what a look at every page says
            stats = cache.stats()
            assert (stats.in_use_bytes, stats.shared_bytes) == (2 * rows // 16 * (2 << 20), rows // 16 * (2 << 20))
            assert stats.parked_bytes == (NUM_SLOTS - 3) * rows // 16 * (2 << 20)
            lines.add(num_lines(cache.stats))
            assert cache.seq_len(child) == rows
    assert len(lines) == 1, lines
