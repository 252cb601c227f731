"""A driver of streams that notes what comes too late, and work that looks whether its pages are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import vattn
from helpers.stream_driver import StreamDriver

PAGE = 4096
LAYOUT = vattn.KVLayout(1, 1, 8, 400, torch.float32)  # 64 tokens to a page


class WatchfulDriver(StreamDriver):
    """Its copies and scrubbing do nothing where the pages are gone by the time that they run, but for noting it."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[tuple[int, ...]] = []

    def _zero(self, address: int, size_bytes: int) -> None:
        self.launch(lambda: self._watch(super(StreamDriver, self)._zero, size_bytes, address))

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        self.launch(lambda: self._watch(super(StreamDriver, self)._copy, size_bytes, target, source))

    def _watch(self, perform, size_bytes: int, *addresses: int) -> None:
        spans = [range(each // PAGE * PAGE, each + size_bytes, PAGE) for each in addresses]
        if all(page in self.book.mappings for span in spans for page in span):
            perform(*addresses, size_bytes)
        else:
            self.late.append(addresses)


@contextmanager
def watched_cache(driver: WatchfulDriver) -> Iterator[vattn.KVCache]:
    """Of six slots and four pages; its own work must have found its pages."""
    with vattn.KVCache(LAYOUT, 6, memory_limit=4 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        yield cache
        driver.synchronize()
        assert not driver.late, "the cache's own work found its pages gone"
        cache.check_integrity()


def new(cache: vattn.KVCache, rows: int, slot: int | None = None) -> int:
    slot = cache.acquire(slot)
    cache.ensure(slot, rows)
    return slot


def launch(cache: vattn.KVCache, slot: int, rows: int, value: float | None = None) -> list[bool]:
    """Work on the current stream that writes rows, or reads them. Running, it notes whether their pages are there."""
    view, found = cache.k(0)[slot, :rows], []
    pages = range(view.data_ptr() // PAGE * PAGE, view.data_ptr() + rows * LAYOUT.bytes_per_token, PAGE)

    def work() -> None:
        found.append(all(address in cache.driver.book.mappings for address in pages))
        if found[0] and value is not None:
            view.fill_(value)

    cache.driver.launch(work)
    return found


def num_left(driver: StreamDriver, stream: int) -> int:
    return len(driver.streams[stream].queue) - driver.streams[stream].num_done
