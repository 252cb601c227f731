"""What zeroing recycled pages takes the GPU, and what that is of a decode step."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import torch
from common import Records, percentiles
from decoding import Setting, decoding, step_ms
from traces import SHAPES

import vattn
from vattn.driver import Driver
from vattn.models import Llama
from vattn.ops.ops_table import Ops

PAGE_BYTES, PAGE_TOKENS = 2 << 20, 16
NUM_PAGES = 64
HOLD_CYCLES = 40_000_000  # about 20 ms: the host has submitted everything before the GPU begins
BATCHES = (1, 8, 64)


def gpu_us(work: Callable[[], object]) -> float:
    """Microseconds of the GPU for what ``work`` submits to the current stream, with nothing to wait for in between."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HOLD_CYCLES)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def run_scrub(records: Records, driver: Driver, repeats: int) -> float:
    """Microseconds a page by each way of zeroing; returns the one of a decode step, a call for each page."""
    layout = vattn.KVLayout(*SHAPES["8B"], NUM_PAGES * PAGE_TOKENS, torch.bfloat16)
    slots = np.arange(NUM_PAGES)
    apart, together, dirty, clean = [], [], [], []
    with vattn.KVCache(layout, NUM_PAGES + 1, driver=driver, memory_limit=1 << 40) as cache:
        long = cache.acquire(NUM_PAGES)
        cache.ensure(long, NUM_PAGES * PAGE_TOKENS)
        address = cache.k(0)[long].data_ptr()

        def zero_apart() -> None:
            for index in range(NUM_PAGES):
                driver.zero(address + index * PAGE_BYTES, PAGE_BYTES)

        def grow() -> None:
            cache.ensure_batch(slots, np.full(NUM_PAGES, PAGE_TOKENS))

        for _ in range(repeats + 1):
            apart.append(gpu_us(zero_apart))
            together.append(gpu_us(lambda: driver.zero(address, NUM_PAGES * PAGE_BYTES)))
            for samples in (clean, dirty):
                for slot in slots.tolist():
                    cache.acquire(slot)
                samples.append(gpu_us(grow))
                for slot in slots.tolist():
                    cache.release(slot)
            cache.trim()  # the next are new again
    differences = [one - other for one, other in zip(dirty, clean, strict=True)]
    found = {"zero": apart, "zero-in-one": together, "ensure-clean": clean, "ensure-parked": dirty}
    for how, samples in {**found, "scrubbing": differences}.items():
        per_page = [sample / NUM_PAGES for sample in samples[1:]]
        records.add(f"scrub pages={NUM_PAGES} how={how}", "vattn", "gpu_per_page", "us", per_page)
    return percentiles(differences[1:])[1] / NUM_PAGES


def run_share(records: Records, model: Llama, ops: Ops, scrub_us: float, length: int = 1024) -> None:
    """Of a decode step, as if nothing of it ran beside: each sequence comes to a page every 16 steps."""
    for batch in BATCHES:
        with decoding(model, batch, length, Setting(ops)) as loop:
            step = step_ms(loop)
        case = f"scrub 8B B={batch} L={length}"
        records.add(case, "vattn", "decode_step", "ms", step)
        share = batch / PAGE_TOKENS * scrub_us / (percentiles(step)[1] * 1e3)
        records.add(case, "vattn", "scrub_share", "%", [share * 100])
        gc.collect()
