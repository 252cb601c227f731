"""What a page costs: each driver call by handle size, and ``ensure_batch`` by slots and crossings. See README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records, time_us

import vattn
from vattn.driver import CudaDriver, Driver, HostDriver, LedgerDriver
from vattn.driver.cuda import unavailable

MIB = 1 << 20
CALLS = ("create", "map", "set_access", "unmap", "release")


def layout(num_layers: int = 32, max_seq_len: int = 4096) -> vattn.KVLayout:
    """Llama-3.1-8B's shape: 16 tokens to a page of 2 MiB with 32 layers."""
    return vattn.KVLayout(num_layers, 8, 128, max_seq_len, torch.bfloat16)


def driver_calls(records: Records, driver: Driver, sizes_mib: tuple[int, ...], repeats: int) -> None:
    """Each kind of call, many handles at a time, as a cache makes them."""
    for size_mib in sizes_mib:
        size = size_mib * MIB
        count = max(4, min(repeats, 4096 // size_mib))
        base = driver.reserve(count * size)
        samples: dict[str, list[float]] = {call: [] for call in CALLS}
        for _ in range(3):
            handles: list[int] = []
            samples["create"] += time_us(lambda: handles.append(driver.create(size)), count)  # noqa: B023
            for call, action in (
                ("map", lambda index: driver.map(base + index * size, size, handles[index])),  # noqa: B023
                ("set_access", lambda index: driver.set_access(base + index * size, size)),  # noqa: B023
                ("unmap", lambda index: driver.unmap(base + index * size, size)),  # noqa: B023
                ("release", lambda index: driver.release(handles[index])),  # noqa: B023
            ):
                for index in range(count):
                    samples[call] += time_us(lambda: action(index), 1)  # noqa: B023
        driver.free_range(base, count * size)
        for call in CALLS:
            records.add(f"driver={driver.name} handle={size_mib}MiB", "vattn", call, "us", samples[call])


def ensure_batches(records: Records, open_driver, num_slots: int, num_layers: int = 32, repeats: int = 7) -> None:
    """``ensure_batch`` over all slots, with no, 1 % and all of them crossing into a new page."""
    driver = open_driver()
    case = f"driver={driver.name} slots={num_slots} layers={num_layers}"
    tokens_per_page = 2 * MIB // layout(num_layers).bytes_per_token
    with vattn.KVCache(layout(num_layers), num_slots, driver=driver) as cache:
        slots = np.array([cache.acquire() for _ in range(num_slots)])
        rows = np.ones(num_slots, np.int64)
        cache.ensure_batch(slots, rows)
        samples = []
        for step in range(2, tokens_per_page):
            rows = np.full(num_slots, step)
            samples += time_us(lambda: cache.ensure_batch(slots, rows), 1)  # noqa: B023
        records.add(f"{case} crossing=none", "vattn", "ensure_batch", "us", samples)
        for share, label in ((100, "1%"), (1, "all")):
            crossing = max(1, num_slots // share)
            samples = []
            for _ in range(repeats):
                rows = rows.copy()
                rows[:crossing] += tokens_per_page
                samples += time_us(lambda: cache.ensure_batch(slots, rows), 1)  # noqa: B023
            records.add(f"{case} crossing={label}", "vattn", "ensure_batch", "us", samples)
            per_page = [sample / crossing for sample in samples]
            records.add(f"{case} crossing={label}", "vattn", "per_page", "us", per_page)
        pages = -(-int(rows[0]) // tokens_per_page)
        samples = [time_us(lambda: cache.release(int(slot)), 1)[0] / pages for slot in slots[: crossing // 100 or 1]]  # noqa: B023
        records.add(f"{case} release", "vattn", "per_page", "us", samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes")
    options = parser.parse_args()
    records = Records("02_allocator", options.quick)
    repeats = 32 if options.quick else 256
    openers = {"host": HostDriver, "ledger": lambda: LedgerDriver(1 << 50)}
    if reason := unavailable():
        print(f"no CUDA driver here: {reason}")
        driver_calls(records, HostDriver(), (2, 4, 16, 64), repeats)
    else:
        openers["cuda"] = lambda: CudaDriver(torch.device("cuda"))
        driver_calls(records, CudaDriver(torch.device("cuda")), (2, 4, 8, 16, 64, 256, 1024), repeats)
        driver_calls(records, HostDriver(), (2, 4, 16, 64), repeats)
    for name, open_driver in openers.items():
        for num_slots in (64, 1024, 10_000) if name == "ledger" else (64, 1024):
            ensure_batches(records, open_driver, num_slots, repeats=3 if name == "host" else 7)
    # Cost follows crossings: the same number of them among more slots, or with more layers to a page.
    for num_layers in (16, 64):
        ensure_batches(records, openers["ledger"], 1024, num_layers)
    records.write()


if __name__ == "__main__":
    main()
