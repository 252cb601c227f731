"""A prompt in so many sequences: forked, and copied."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from common import Records, time_us
from traces import SHAPES

import vattn
from vattn.driver import Driver

MIB = 1 << 20


def run_forks(records: Records, open_driver: Callable[[], Driver], prompt: int, ways: int, repeats: int) -> None:
    """Forks into fresh slots, for which no page is at hand, and into slots where the same was forked before."""
    driver = open_driver()
    case = f"forks driver={driver.name} prompt={prompt} ways={ways}"
    layout = vattn.KVLayout(*SHAPES["8B"], prompt + 256, torch.bfloat16)
    children = range(1, ways + 1)
    with vattn.KVCache(layout, ways + 1, driver=driver, memory_limit=1 << 40) as cache:
        parent = cache.acquire(0)
        cache.ensure(parent, prompt)
        alone = cache.stats().physical_bytes

        def fork_all() -> None:
            for slot in children:
                cache.fork(parent, into=slot)
            driver.synchronize()  # rows that end inside a page are copied on the device

        def release_all(fresh: bool) -> None:
            for slot in children:
                cache.release(slot)
            if fresh:
                cache.trim()

        fork_all()
        for how in ("fresh", "again"):
            samples, calls = [], []
            for _ in range(repeats + 1):
                release_all(how == "fresh")
                before = cache.stats().num_driver_calls
                samples += time_us(fork_all, 1)
                calls.append(cache.stats().num_driver_calls - before)
            records.add(f"{case} slots={how}", "vattn", "all_ways", "us", samples[1:])  # the first comes from the other
            records.add(f"{case} slots={how}", "vattn", "driver_calls", "calls", calls[1:])
        records.add(case, "vattn", "extra_bytes", "MiB", [(cache.stats().physical_bytes - alone) / MIB])
        cache.check_integrity()


def run_copies(records: Records, device: torch.device, prompt: int, ways: int, repeats: int) -> None:
    """K and V of the prompt copied into as many tensors, whose memory was taken and touched before."""
    layers, heads, head_dim = SHAPES["8B"]
    shape = (prompt, layers, 2, heads, head_dim)
    parent = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    children = [torch.zeros_like(parent) for _ in range(ways)]
    samples = []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        for child in children:
            child.copy_(parent)
        _synchronize(device)
        samples.append((time.perf_counter() - start) * 1e6)
    name = "host" if device.type == "cpu" else device.type
    case = f"forks driver={name} prompt={prompt} ways={ways}"
    records.add(case, "copy", "all_ways", "us", samples[1:])
    records.add(case, "copy", "extra_bytes", "MiB", [ways * parent.nbytes / MIB])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
