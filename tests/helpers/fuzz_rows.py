"""What the fuzz writes into rows and expects to read from them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

import vattn
from helpers.failing_driver import FailingDriver
from helpers.fuzz_readers import FIRST_STREAM, Readers, are_mapped, pages_of
from helpers.page_model import PageModel
from helpers.stream_driver import StreamDriver

_ROW_STEP, _TAG_STEP = 1 << 7, 1 << 21  # a value is tag, row, and which tensor, exact in float64
_GARBAGE = 3e300


class PatternedRows:
    """Every row written holds who wrote it, which row it is, and in which tensor.

    Attributes:
        tags: per live slot and row, the last write; 0: never written.
        past: per slot and row, every tag that this sequence had there.
        faults: work that came to run where its pages were gone.
    """

    random: random.Random
    cache: vattn.KVCache
    layout: vattn.KVLayout
    model: PageModel
    driver: FailingDriver
    queued: StreamDriver | None
    readers: Readers | None
    over_read: int
    masked: bool
    tags: dict[int, list[int]]
    past: dict[int, list[set[int]]]
    faults: list[str]
    next_tag: int

    def _tensors(self) -> Iterator[tuple[int, torch.Tensor]]:
        for position, layer in enumerate(self.layout.layers):
            yield 2 * position, self.cache.k(layer)
            yield 2 * position + 1, self.cache.v(layer)

    def settle(self) -> None:
        """Run the work that the cache queued, as late as it may be: now that rows are looked at. Reads wait longer."""
        for stream in range(FIRST_STREAM) if self.queued else ():
            if stream in self.queued.streams:
                self.queued.run(stream)

    def patterns(self, tags: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the rows of tensor 0 hold, one value each, and which rows were written."""
        by_row = torch.tensor(tags, dtype=torch.float64, device=self.cache.device)
        return by_row * _TAG_STEP + self._rows(0, len(tags)), by_row > 0

    def expected(self, patterns: tuple[torch.Tensor, torch.Tensor], number: int) -> torch.Tensor:
        """What the rows of tensor ``number`` hold, one value each."""
        return torch.where(patterns[1], patterns[0] + number, 0.0)

    def _rows(self, start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end, dtype=torch.float64, device=self.cache.device) * _ROW_STEP

    def write(self, slot: int, start: int, end: int) -> None:
        self.settle()
        if self.readers:
            self.readers.order()
        tag, self.next_tag = self.next_tag, self.next_tag + 1
        rows = self._rows(start, end)
        for number, tensor in self._tensors():
            tensor[slot, start:end] = (rows + (tag * _TAG_STEP + number))[:, None, None]
        for row in range(start, end):
            self.tags[slot][row] = tag
            self.past[slot][row].add(tag)

    def check_rows(self, slot: int) -> None:
        self.settle()
        tags, wrong = self.tags[slot], []
        assert self.cache.seq_len(slot) == len(tags)
        patterns = self.patterns(tags)
        for position, layer in enumerate(self.layout.layers):
            for side, tensor in enumerate(self.cache.rows(slot, layer)):
                expected = self.expected(patterns, 2 * position + side)
                wrong.append((tensor != expected[:, None, None]).any())
        assert not torch.stack(wrong).any(), f"slot {slot}: wrong are {[bool(each) for each in wrong]}"

    def check_over_read(self, slot: int, rows: int) -> None:
        """What a kernel reads past the end is there; unless kernels mask it, it is zeros."""
        self.settle()
        for _, tensor in self._tensors():
            beyond = tensor.as_strided(
                (self.over_read, *tensor.shape[2:]),
                tensor.stride()[1:],
                tensor[slot].storage_offset() + rows * tensor.stride(1),
            )
            assert not beyond.any() or self.masked

    def expose(self, slot: int, end: int) -> None:
        """Rows beyond the old length: zeros, or what this sequence itself once had in that row; then mostly written."""
        self.settle()
        start = len(self.tags[slot])
        while len(self.past[slot]) < end:
            self.past[slot].append(set())
        views = [(number, tensor[slot, start:end]) for number, tensor in self._tensors()]
        clean = end <= start or not torch.stack([view.any() for _, view in views]).any()
        if not clean:
            for number, view in views:
                elsewhere = (view % _TAG_STEP != (self._rows(start, end) + number)[:, None, None]) & (view != 0.0)
                assert not elsewhere.any(), f"slot {slot}, rows {start} to {end}: another row's data, tensor {number}"
                for left in set(view.unique().tolist()) - {0.0}:
                    tag, rest = divmod(int(left), _TAG_STEP)
                    row = rest // _ROW_STEP
                    assert tag in self.past[slot][row], f"slot {slot} row {row} holds another sequence's data"
        self.tags[slot] += [0] * (end - start)
        if end > start and self.over_read:
            self.check_over_read(slot, end)
        if end > start and not (clean and self.random.random() < 0.3):
            self.write(slot, start, end)

    def launch_late_work(self, slot: int) -> None:
        """Work on a sequence about to end, which runs as late as it may; it writes, unless others may read the rows."""
        if self.queued and self.tags[slot]:
            rows = len(self.tags[slot])
            value = None if self.readers or self.model.is_shared(slot, 0, rows) else _GARBAGE
            for _, tensor in self._tensors():
                view = tensor[slot, :rows]
                pages = pages_of(view)
                self.queued.launch(lambda view=view, pages=pages: self._work(view, pages, value))

    def _work(self, view: torch.Tensor, pages: range, value: float | None) -> None:
        if not are_mapped(self.driver, pages, writing=value is not None):
            self.faults.append(f"work at {pages} found no pages")
        elif value is not None:
            view.fill_(value)
