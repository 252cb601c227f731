"""Reads of every live row on two streams of their own, in flight while the fuzz goes on, and looked at later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

import vattn
from helpers.stream_driver import StreamDriver
from vattn.driver import Driver

FIRST_STREAM = 3  # of two, on the queued driver; those before it are the fuzz's own


def pages_of(view: torch.Tensor) -> range:
    """The addresses of the pages of 4,096 bytes that a view touches."""
    return range(view.data_ptr() // 4096 * 4096, view[-1].data_ptr() + view[-1].nbytes, 4096)


def are_mapped(driver: Driver, pages: range, writing: bool = False) -> bool:
    """Whether there is memory behind all of these addresses that may be read, or written."""
    try:
        driver.book.check_accessible("look", pages.start, len(pages) * 4096, writing)
    except vattn.DriverError:
        return False
    return True


@dataclass
class _Read:
    slot: int
    tags: list[int]  # as they were when it was launched
    results: list[torch.Tensor] = field(default_factory=list)  # per tensor the least and the greatest of every row


class Readers:
    """Every ``launch`` reads, within a step, all live rows on the next of the streams.

    From then on the cache has to see that the pages stay as they are until the read has run, whatever becomes of the
    sequences; whoever writes to rows himself calls ``order`` first. On the queued driver reads run as late as they may.

    Args:
        tags: the fuzz's own, per live slot and row.
        patterns, expected: tags -> patterns, and (patterns, number of the tensor) -> what the rows hold.
        counts: gets ``late reads``: on the queued driver, those that ran when their sequence had ended or was cut.
        faults: gets those that found no pages.
    """

    def __init__(
        self,
        cache: vattn.KVCache,
        queued: StreamDriver | None,
        tensors: Callable[[], Iterator[tuple[int, torch.Tensor]]],
        tags: dict[int, list[int]],
        patterns: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]],
        expected: Callable[[tuple[torch.Tensor, torch.Tensor], int], torch.Tensor],
        counts: Counter[str],
        faults: list[str],
    ) -> None:
        self.cache, self.queued, self.tensors = cache, queued, tensors
        self.tags, self.patterns, self.expected, self.counts, self.faults = tags, patterns, expected, counts, faults
        self.streams = [] if queued else [torch.cuda.Stream(cache.device) for _ in range(2)]
        self.num_launched = 0
        self.reads: list[_Read] = []

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """The next of the two, behind what the fuzz itself has written on the current one."""
        self.num_launched += 1
        if self.queued:
            with self.queued.stream(FIRST_STREAM + self.num_launched % 2):
                yield
        else:
            stream = self.streams[self.num_launched % 2]
            stream.wait_stream(torch.cuda.current_stream(self.cache.device))
            with torch.cuda.stream(stream):
                yield

    def launch(self) -> None:
        slots = sorted(slot for slot, tags in self.tags.items() if tags)
        with self._stream(), self.cache.step(slots):
            if not self.queued:
                torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host goes on
            for slot in slots:
                read, tags = _Read(slot, list(self.tags[slot])), self.tags[slot]
                views = [tensor[slot, : len(tags)] for _, tensor in self.tensors()]
                self.reads.append(read)
                if self.queued:
                    self.queued.launch(lambda read=read, tags=tags, views=views: self._run_late(read, tags, views))
                else:
                    self._run(read, views)

    def _run(self, read: _Read, views: list[torch.Tensor]) -> None:
        read.results = [torch.stack([view.amin((1, 2)), view.amax((1, 2))]) for view in views]

    def _run_late(self, read: _Read, tags: list[int], views: list[torch.Tensor]) -> None:
        self.counts["late reads"] += self.tags.get(read.slot) is not tags or len(tags) < len(read.tags)
        if all(are_mapped(self.cache.driver, pages_of(view)) for view in views):
            self._run(read, views)
        else:
            self.faults.append(f"a read of slot {read.slot} found no pages")

    def order(self) -> None:
        """What the current stream, or the host that has no streams, does from here on comes after the reads."""
        if self.queued:
            self._run_queued()
        for stream in self.streams:
            torch.cuda.current_stream(self.cache.device).wait_stream(stream)

    def _run_queued(self) -> None:
        for stream in (FIRST_STREAM, FIRST_STREAM + 1):
            if stream in self.queued.streams:
                self.queued.run(stream)

    def collect(self) -> None:
        """Wait for all reads; every one saw the rows as they were when it was launched."""
        if self.queued:
            self._run_queued()
        for stream in self.streams:
            stream.synchronize()
        assert not self.faults, self.faults
        for read in self.reads:
            patterns, wrong = self.patterns(read.tags), []
            for (number, _), result in zip(self.tensors(), read.results, strict=True):
                wrong.append((result != self.expected(patterns, number)).any())
            assert not torch.stack(wrong).any(), f"slot {read.slot}: a read in flight saw other rows, {wrong}"
        self.reads.clear()
