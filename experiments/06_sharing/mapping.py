"""What mapping takes per page: ``ensure_batch`` with a driver, with the ledger, and the calls without any books.

The ledger's time is Python's alone. The bare calls are those that a mapper in native code would have to make too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from common import Records, time_us
from traces import SHAPES

import vattn
from vattn.driver import Driver
from vattn.driver.ruled import RuledDriver

PAGE_BYTES, PAGE_TOKENS = 2 << 20, 16
COUNTS = (1, 16, 256)
KINDS = ("new", "free", "parked")  # created; mapped and scrubbed; only scrubbed


def _rounds(repeats: int, count: int) -> int:
    """Fewer of many pages: a CPU zeroes them in milliseconds each."""
    return repeats if count < 100 else -(-repeats // 4)


def run_mapping(records: Records, open_driver: Callable[[], Driver], repeats: int) -> None:
    """So many slots, each growing into a page."""
    layout = vattn.KVLayout(*SHAPES["8B"], 4 * PAGE_TOKENS, torch.bfloat16)
    driver = open_driver()
    with vattn.KVCache(layout, max(COUNTS), driver=driver, memory_limit=1 << 40) as cache:
        for count in COUNTS:
            slots = np.arange(count)
            rows = np.full(count, PAGE_TOKENS)
            for kind in KINDS:

                def begin(slots: np.ndarray = slots) -> None:
                    for slot in slots.tolist():
                        cache.acquire(slot)
                    driver.synchronize()

                def end(slots: np.ndarray = slots, kind: str = kind) -> None:
                    for slot in slots.tolist():
                        cache.release(slot)
                    if kind != "parked":
                        cache.trim(keep_bytes=0 if kind == "new" else 1 << 40)

                samples = []
                for _ in range(_rounds(repeats, count) + 2):
                    begin()
                    samples += time_us(lambda: cache.ensure_batch(slots, rows), 1)  # noqa: B023
                    end()
                per_page = [sample / count for sample in samples[2:]]  # the first ones find what the last kind left
                records.add(
                    f"mapping driver={driver.name} pages={count} kind={kind}", "vattn", "per_page", "us", per_page
                )


def run_bare(records: Records, open_driver: Callable[[], RuledDriver], repeats: int) -> None:
    """The same calls of the driver by themselves."""
    driver = open_driver()
    address = driver.reserve(max(COUNTS) * PAGE_BYTES)
    for count in COUNTS:
        places = [address + index * PAGE_BYTES for index in range(count)]
        samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(_rounds(repeats, count) + 1):
            handles: list[int] = []

            def create(count: int = count, handles: list[int] = handles) -> None:
                handles += [driver._create(PAGE_BYTES) for _ in range(count)]

            def map_all(places: list[int] = places, handles: list[int] = handles) -> None:
                for place, handle in zip(places, handles, strict=True):
                    driver._map(place, PAGE_BYTES, handle)
                    driver._set_access(place, PAGE_BYTES)

            def zero(places: list[int] = places) -> None:
                for place in places:
                    driver._zero(place, PAGE_BYTES)

            def unmap(places: list[int] = places) -> None:
                for place in places:
                    driver._unmap(place, PAGE_BYTES)

            (created,) = time_us(create, 1)
            (mapped,) = time_us(map_all, 1)
            driver.synchronize()
            (zeroed,) = time_us(zero, 1)  # on a CPU with the page faults of a new mapping
            driver.synchronize()
            (again,) = time_us(zero, 1)
            driver.synchronize()
            for kind, sample in (("new", created + mapped), ("free", mapped + zeroed), ("parked", again)):
                samples[kind].append(sample / count)
            unmap()
            for handle in handles:
                driver._release(handle, PAGE_BYTES, still_mapped=False)
        for kind in KINDS:
            records.add(
                f"mapping driver={driver.name} pages={count} kind={kind}",
                "calls-only",
                "per_page",
                "us",
                samples[kind][1:],
            )
    driver.free_range(address, max(COUNTS) * PAGE_BYTES)
    driver.close()
