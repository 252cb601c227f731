"""What sharing and parking save: forks of a prompt, and driver calls per request under churn. See README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records, time_us

import vattn
from vattn.driver import CudaDriver, Driver, HostDriver, LedgerDriver
from vattn.driver.cuda import unavailable

MIB = 1 << 20
NUM_SLOTS, NUM_BUSY = 64, 48
DRIVER_CALLS = ("create", "release", "map", "unmap")


def layout(max_seq_len: int) -> vattn.KVLayout:
    """Llama-3.1-8B's shape: 16 tokens to a page of 2 MiB."""
    return vattn.KVLayout(32, 8, 128, max_seq_len, torch.bfloat16)


def forks(records: Records, open_driver: Callable[[], Driver], prompt: int, ways: int, repeats: int) -> None:
    """A prompt forked so many ways, into fresh slots and into slots where the same was forked before; and copied."""
    driver = open_driver()
    case = f"driver={driver.name} prompt={prompt} ways={ways}"
    with vattn.KVCache(layout(prompt + 256), ways + 1, driver=driver, memory_limit=1 << 40) as cache:
        parent = cache.acquire(0)
        cache.ensure(parent, prompt)
        alone = cache.stats().physical_bytes
        for how in ("fresh", "again"):
            samples = []
            for _ in range(repeats):
                samples += [
                    sum(time_us(lambda slot=slot: cache.fork(parent, into=slot), 1)[0] for slot in range(1, ways + 1))
                ]
                shared = cache.stats().physical_bytes - alone
                for slot in range(1, ways + 1):
                    cache.release(slot)
                if how == "fresh":
                    cache.trim()
            records.add(f"{case} slots={how}", "vattn", "fork_all", "us", samples)
        records.add(case, "vattn", "extra_bytes", "MiB", [shared / MIB])
        records.add(case, "full", "extra_bytes", "MiB", [ways * alone / MIB])  # what as many copies would take


def churn(records: Records, limit_share: float, parks: bool, num_warm_up: int, num_requests: int) -> None:
    """Requests with log-normal lengths in place of those that end, 16 tokens a round: driver calls of each.

    Args:
        limit_share: memory limit, as a multiple of what the busy slots' sequences take on average at their end.
        parks: whether released sequences leave their pages mapped; else ``trim`` follows every release.
    """
    draw = np.random.default_rng(1)
    count = num_warm_up + num_requests
    prompts = np.clip(draw.lognormal(np.log(300), 0.7, count), 1, 768).astype(int)
    ends = prompts + np.clip(draw.lognormal(np.log(100), 0.7, count), 1, 256).astype(int)
    limit = int(limit_share * NUM_BUSY * np.ceil(ends / 16).mean() * 2 * MIB)
    live: dict[int, list[int]] = {}
    calls: list[float] = []
    started = dict.fromkeys(DRIVER_CALLS, 0)
    with vattn.KVCache(layout(1024), NUM_SLOTS, driver=LedgerDriver(1 << 40), memory_limit=limit) as cache:
        for request in range(count):
            while len(live) == NUM_BUSY:
                for rows in live.values():
                    rows[0] = min(rows[0] + 16, rows[1])
                cache.ensure_batch(list(live), [rows for rows, _ in live.values()])
                for slot in [slot for slot, (rows, end) in live.items() if rows == end]:
                    cache.release(slot)
                    del live[slot]
                    if not parks:
                        cache.trim(keep_bytes=limit)
            slot = cache.acquire(expect_len=int(ends[request]))
            cache.ensure(slot, int(prompts[request]))
            live[slot] = [int(prompts[request]), int(ends[request])]
            made = {call: getattr(cache.driver.counts, f"num_{call}") for call in DRIVER_CALLS}
            if request >= num_warm_up:
                calls.append(float(sum(made.values()) - sum(started.values())))
            started = made
    case = f"slots={NUM_SLOTS} busy={NUM_BUSY} limit={limit_share}"
    records.add(case, "vattn" if parks else "vattn-no-parking", "calls_mean", "calls/request", [float(np.mean(calls))])
    records.add(case, "vattn" if parks else "vattn-no-parking", "calls", "calls/request", calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and requests")
    options = parser.parse_args()
    records = Records("06_sharing", options.quick)
    openers: list[Callable[[], Driver]] = [lambda: LedgerDriver(1 << 50)]
    if reason := unavailable():
        print(f"no CUDA driver here: {reason}")
        openers.append(HostDriver)
    else:
        openers.append(lambda: CudaDriver(torch.device("cuda")))
    for open_driver in openers:
        for prompt in (1024, 1000) if options.quick else (1024, 1000, 16_384, 16_380):
            forks(records, open_driver, prompt, ways=16, repeats=3 if options.quick else 9)
    for limit_share in (8.0, 2.0, 1.6):
        for parks in (True, False):
            churn(records, limit_share, parks, *((500, 500) if options.quick else (3000, 3000)))
    records.write()


if __name__ == "__main__":
    main()
