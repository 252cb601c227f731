"""What the host pays for pages: those of a prompt, those of a shared prefix, and a lone one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from common import Records, time_us
from traces import SHAPES

from vattn import KVCache, KVLayout
from vattn.driver import CudaDriver, Driver, HostDriver, LedgerDriver

GIB, MIB = 1 << 30, 1 << 20
PROMPT = 8192  # tokens of the 8B shape that take 1 GiB
PREFIX = 16384  # and 2 GiB
KEEP = 1 << 50  # for trim: every page stays the cache's
OPENERS: dict[str, Callable[[], Driver]] = {
    "cuda": lambda: CudaDriver(torch.device("cuda")),
    "host": HostDriver,
    "ledger": lambda: LedgerDriver(1 << 40),
}


@contextmanager
def native(used: bool) -> Iterator[None]:
    """Whether drivers that are opened in the block use the library of ``native/``."""
    before = os.environ.pop("VATTN_NATIVE", None)
    if not used:
        os.environ["VATTN_NATIVE"] = "0"
    try:
        yield
    finally:
        os.environ.pop("VATTN_NATIVE", None)
        if before is not None:
            os.environ["VATTN_NATIVE"] = before


def is_of(driver: Driver, system: str) -> bool:
    """Whether the driver is what the system's name says; it is not where the library was not built."""
    reason = getattr(driver, "why_not_native", "this version has none")
    right = reason is None or system == "vattn-python" or driver.name == "ledger"
    if not right:
        print(f"{driver.name} {system}: the library of native/ is not used: {reason}")
    return right


def open_cache(name: str, system: str) -> KVCache:
    with native(system != "vattn-python"):
        driver = OPENERS[name]()
    largest = 64 * MIB if system == "vattn-large-pages" else None
    layout = KVLayout(*SHAPES["8B"], PREFIX + 1024, torch.bfloat16)
    return KVCache(layout, 3, driver=driver, memory_limit=5 * GIB, max_page_bytes=largest)


def pages(records: Records, name: str, system: str, repeats: int) -> None:
    """``ensure``, ``fork`` and a step's ``ensure`` into new pages, and into pages that are the cache's and mapped
    nowhere."""
    if name == "ledger" and system == "vattn-python":
        return  # it makes no calls
    with open_cache(name, system) as cache:
        if not is_of(cache.driver, system):
            return
        for kind in ("new", "free"):
            case = f"pages driver={name} pages={kind}"
            keep = KEEP if kind == "free" else 0
            backed(records, cache, case, system, keep, repeats)
            aliased(records, cache, case, system, keep, repeats)
            lone(records, cache, case, system, keep, 64)
        cache.check_integrity()


def timed(
    cache: KVCache, what: Callable[[], object], before: Callable[[], object], repeats: int
) -> tuple[list[float], list[int]]:
    """(milliseconds of each time, driver calls of one)."""
    before()
    what()  # makes what is free afterwards
    samples = time_us(what, repeats, before)
    before()
    calls = cache.stats().num_driver_calls
    what()
    return [each / 1e3 for each in samples], [cache.stats().num_driver_calls - calls]


def backed(records: Records, cache: KVCache, case: str, system: str, keep: int, repeats: int) -> None:
    slot = cache.acquire(0)

    def empty() -> None:
        cache.release(slot)
        cache.trim(keep_bytes=keep)
        cache.acquire(slot)

    samples, calls = timed(cache, lambda: cache.ensure(slot, PROMPT), empty, repeats)
    records.add(case, system, "back_1gib", "ms", samples)
    records.add(case, system, "back_1gib_calls", "calls", calls)
    cache.release(slot)
    cache.trim(keep_bytes=keep)


def aliased(records: Records, cache: KVCache, case: str, system: str, keep: int, repeats: int) -> None:
    """Into a slot in which nothing is mapped."""
    parent, child = cache.acquire(0), cache.acquire(1)
    cache.ensure(parent, PREFIX)

    def empty() -> None:
        cache.release(child)
        cache.trim(keep_bytes=keep)

    samples, calls = timed(cache, lambda: cache.fork(parent, PREFIX, into=child), empty, repeats)
    records.add(case, system, "alias_16k", "ms", samples)
    records.add(case, system, "alias_16k_calls", "calls", calls)
    cache.release(child)
    cache.release(parent)
    cache.trim(keep_bytes=keep)


def lone(records: Records, cache: KVCache, case: str, system: str, keep: int, repeats: int) -> None:
    """A sequence that grows by a page a call, as one that decodes does."""
    slot = cache.acquire(0)
    tokens = int(cache.layout.tokens_per_page(cache.page_bytes))
    samples = []
    for start in range(0, 3 * repeats, repeats):  # the first time makes what is free afterwards
        cache.truncate(slot, 0)
        cache.trim(keep_bytes=keep)
        cache.ensure(slot, 1)
        found = [time_us(lambda rows=rows: cache.ensure(slot, rows), 1)[0] for rows in _rows(tokens, repeats)]
        samples += found if start else []
    records.add(case, system, "lone_page", "us", samples)
    cache.release(slot)
    cache.trim(keep_bytes=keep)


def _rows(tokens: int, count: int) -> list[int]:
    return [1 + tokens * page for page in range(1, count + 1)]
