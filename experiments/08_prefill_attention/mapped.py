"""A prompt's attention with mapping beside it, in turn with the same without and with blocks; and mapping before it."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from common import Records, time_us

from vattn import KVCache, KVLayout

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128  # of every cache; what is timed is one layer
PAGE_TOKENS = 16
BUSY_CYCLES, BUSY_MS = 2_000_000, 1.0  # of waiting on the GPU while the host launches what is timed
STEP_PAGES = 8  # that the thread maps at a time
PAUSE_S = 0.1  # before each call, so that all find the GPU as hot
ROUNDS = 8
PEER = "flash-attn-3-paged-16"

Launch = Callable[[], torch.Tensor]
Events = tuple[torch.cuda.Event, torch.cuda.Event]


def timed(launch: Launch, busy: bool = True) -> Events:
    """Events around a launch. ``busy``: the GPU has something to do until the host is done launching."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if busy:
        torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    launch()
    end.record()
    return start, end


@contextmanager
def mapping_beside(cache: KVCache) -> Iterator[list[int]]:
    """A sequence of this cache gets pages meanwhile, as fast as a thread can map them; yields how many it has.

    They were another's: mapped, and zeroed on a stream of the thread's. It never waits for the GPU, as it would have to
    for unmapping: the zeroing comes when the kernel leaves room for it.
    """
    pages, done = [0], threading.Event()
    slot = cache.acquire()

    def grow() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not done.is_set() and pages[0] * PAGE_TOKENS < cache.layout.max_seq_len:
                cache.ensure(slot, (pages[0] + STEP_PAGES) * PAGE_TOKENS)
                pages[0] += STEP_PAGES

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        while not pages[0]:
            time.sleep(1e-4)
        yield pages
    finally:
        done.set()
        thread.join()
        torch.cuda.synchronize()
        cache.truncate(slot, 0)
        cache.release(slot)


def run_mapping(records: Records, cache: KVCache, slot: int, total: int, systems: dict[str, Launch]) -> None:
    """Beside: another prompt as long gets its pages. Before: those of the prompt itself, of which a layer bears its
    share."""
    case = f"8B new={total} total={total}"
    calls = {"vattn": systems["vattn"], "vattn-mapping-beside": systems["vattn"]}
    if PEER in systems:
        calls[PEER] = systems[PEER]
    ms: dict[str, list[float]] = {name: [] for name in calls}
    rates = []
    drawn = records.drawn(f"mapping {case}")
    others = KVLayout(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, total, torch.bfloat16)
    with KVCache(others, 1, "cuda", memory_limit=total // PAGE_TOKENS << 21) as other:
        other.ensure(other.acquire(), total)  # makes the pages
        other.truncate(0, 0)
        other.release(0)
        for _ in range(ROUNDS):
            for name in drawn.sample(list(calls), len(calls)):
                torch.cuda.synchronize()
                time.sleep(PAUSE_S)
                with mapping_beside(other) if name == "vattn-mapping-beside" else nullcontext([0]) as pages:
                    before = pages[0]
                    start, end = timed(calls[name])
                    end.synchronize()
                    num_mapped = pages[0] - before
                ms[name].append(start.elapsed_time(end))
                if name == "vattn-mapping-beside":
                    rates.append(num_mapped / (ms[name][-1] + BUSY_MS))
    beside = ms["vattn-mapping-beside"]
    records.add(case, "vattn-mapping-beside", "prefill_attention", "ms", beside)
    for name, over, under in (("vattn-mapping-beside", beside, ms["vattn"]), (PEER, ms.get(PEER, ()), beside)):
        if over:
            pairs = zip(over, under, strict=True)
            records.add(case, name, "prefill_attention_ratio", "1", [one / other for one, other in pairs])
    records.add(case, "vattn-mapping-beside", "mapping", "pages/ms", rates)
    us = time_us(lambda: cache.ensure(slot, total), 5, before=lambda: cache.truncate(slot, 0))
    inline = [statistics.median(ms["vattn"]) + each / 1e3 / NUM_LAYERS for each in us]
    records.add(case, "vattn-mapping-inline", "prefill_attention", "ms", inline)
