"""A seeded random walk over the cache's contract, with a pattern in every live row and a page account beside it.

``cd tests && python fuzz.py --operations 1000000 --seed 1`` (``make fuzz``) runs it at length.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections import Counter

import torch
from helpers.failing_driver import FailingDriver
from helpers.fuzz_cases import LARGEST, LAYOUTS, MAX_SEQ_LEN, UNITS, VARIANTS, make_layout
from helpers.fuzz_readers import FIRST_STREAM, Readers
from helpers.fuzz_rows import PatternedRows
from helpers.page_model import DoesNotFit, PageModel, Unit
from helpers.stream_driver import StreamDriver

import vattn
from vattn.driver import open_driver
from vattn.memory.pages import Page

_DRIVER_CALLS = ("create", "release", "map", "set_access", "unmap", "zero", "copy")


class Fuzz(PatternedRows):
    """One cache, its page model, and what every row must read.

    Args:
        fail: also make driver calls fail now and then, and check that nothing changed.
        streams: without a GPU, queue the work of three streams and run it as late as it may.
        readers: with reads of every live row in flight on two more.
        sizes: with pages of several sizes, and rows enough for them.
        guard: with shared pages read-only.
    """

    def __init__(
        self,
        seed: int,
        kind: str,
        device: str = "cpu",
        fail: bool = False,
        over_read: int = 0,
        masked: bool = True,
        streams: bool = False,
        readers: bool = False,
        sizes: bool = False,
        guard: bool = False,
    ) -> None:
        self.random = random.Random(f"{seed} {kind}")
        self.fail = fail
        queued = StreamDriver() if streams and device == "cpu" else None
        self.queued = queued
        self.driver = FailingDriver(queued or open_driver(device))
        page_bytes = max(4096, self.driver.granularity_bytes)
        self.over_read, self.masked = over_read, masked
        self.layout = make_layout(kind, page_bytes * UNITS[kind] if sizes else page_bytes)
        largest = LARGEST if sizes else 1
        lanes = [
            lane.row_bytes for group in self.layout.groups for lane in self.layout.plan(group, 1, page_bytes).lanes
        ]
        per_slot = sum(-(-(MAX_SEQ_LEN + over_read) * row_bytes // page_bytes) for row_bytes in lanes)
        self.max_slots = 5
        limit_pages = per_slot * 2 + self.random.randrange(per_slot)  # a third to a half of what the slots could take
        self.cache = vattn.KVCache(
            self.layout,
            self.max_slots,
            page_bytes=page_bytes,
            max_page_bytes=largest * page_bytes,
            memory_limit=limit_pages * page_bytes,
            over_read_tokens=over_read,
            over_read_masked=masked,
            guard=guard,
            driver=self.driver,
        )
        self.model = PageModel(lanes, page_bytes, limit_pages, over_read, masked, largest)
        self.tags, self.past, self.faults = {}, {}, []
        self.next_tag = 1
        self.counts: Counter[str] = Counter()
        self.readers = None
        if readers:
            self.readers = Readers(
                self.cache, queued, self._tensors, self.tags, self.patterns, self.expected, self.counts, self.faults
            )
        parking = self.cache._slots.parking
        self._unparked, parking.finish_unpark = parking.finish_unpark, self._finish_unpark  # type: ignore[method-assign]
        self._out_of_memory = False  # an injected failure says so

    # -- operations ----------------------------------------------------------------------------------------------
    def _length(self, low: int = 0) -> int:
        return min(MAX_SEQ_LEN, low + int(self.random.expovariate(1 / 25)))

    def acquire(self) -> None:
        wanted = self.random.choice([None, self.random.randrange(self.max_slots)])
        expected = self.random.choice([None, self._length()])
        if len(self.tags) == self.max_slots or wanted in self.tags:
            self._refused(vattn.OutOfSlots, lambda: self.cache.acquire(wanted))
            return
        slot = self.cache.acquire(wanted, expect_len=expected)
        assert slot not in self.tags
        assert wanted in (None, slot)
        self.tags[slot], self.past[slot], self.model.rows[slot] = [], [], 0

    def ensure(self, slot: int) -> None:
        rows = self._length(self.random.choice([0, len(self.tags[slot])]))
        if self._fits(lambda: self.model.ensure([(slot, rows)]), lambda: self.cache.ensure(slot, rows)):
            self.expose(slot, rows)

    def ensure_batch(self) -> None:
        slots = self.random.sample(sorted(self.tags), self.random.randint(0, len(self.tags)))
        self._ensure_all([(slot, self._length(len(self.tags[slot]))) for slot in slots])

    def _ensure_all(self, requests: list[tuple[int, int]]) -> None:
        slots, lengths = [slot for slot, _ in requests], [rows for _, rows in requests]
        if self._fits(lambda: self.model.ensure(requests), lambda: self.cache.ensure_batch(slots, lengths)):
            for slot, rows in requests:
                self.expose(slot, rows)

    def fork(self, parent: int) -> None:
        rows = self.random.choice([None, self.random.randint(0, len(self.tags[parent]))])
        if len(self.tags) == self.max_slots:
            self._refused(vattn.OutOfSlots, lambda: self.cache.fork(parent, rows))
            return
        num_rows = len(self.tags[parent]) if rows is None else rows
        into = self.random.choice([None, *(slot for slot in range(self.max_slots) if slot not in self.tags)])
        # Whether it fits does not depend on the slot; the page account does.
        children = [min(slot for slot in range(self.max_slots) if slot not in self.tags) if into is None else into]
        if self._fits(
            lambda: self.model.fork(parent, children[-1], num_rows),
            lambda: children.append(self.cache.fork(parent, rows, into)),
        ):
            child = children[-1]
            assert child not in self.tags
            assert into in (None, child)
            self.tags[child] = self.tags[parent][:num_rows]
            self.past[child] = [{tag} for tag in self.tags[child]]
            if num_rows and self.over_read:
                self.check_over_read(child, num_rows)

    def truncate(self, slot: int, in_step: bool = False) -> None:
        self._cut(slot, self.random.randint(0, len(self.tags[slot])), in_step)

    def _cut(self, slot: int, rows: int, in_step: bool = False) -> None:
        self.cache.truncate(slot, rows)
        mappings = self._mappings()
        for kept, page in self.model.truncate(slot, rows, in_step):
            if mappings[kept.slot, kept.lane, kept.first][1] > self.model.size_at(kept):
                assert self.fail  # it could not be split now
                self.model.unsplit(kept, page)
            else:
                self.counts["split"] += 1
        del self.tags[slot][rows:]

    def release(self, slot: int) -> None:
        self.launch_late_work(slot)
        calls = self.cache.stats().num_driver_calls
        self.cache.release(slot)
        assert self.cache.stats().num_driver_calls == calls
        self.model.release(slot)
        del self.tags[slot], self.past[slot]

    def rewrite(self, slot: int) -> None:
        end = self.random.randint(0, len(self.tags[slot]))
        start = self.random.randint(0, end)
        if self._fits(
            lambda: self.model.make_writable(slot, start, end), lambda: self.cache.make_writable(slot, start, end)
        ):
            self.write(slot, start, end)

    def step(self, slot: int) -> None:
        """Release or truncate inside a step: the pages stay until it ends."""
        step = self.cache.step([slot])
        if not self._fits(lambda: self.model.step(slot), step.__enter__):
            return
        try:
            self.settle()
            rows = len(self.tags[slot])
            if self.over_read and rows:
                self.check_over_read(slot, rows)
            views = [tensor[slot, :rows] for _, tensor in self._tensors()]
            kept = torch.stack([view.sum() for view in views])
            if self.random.random() < 0.5:
                self.release(slot)
            else:
                self.truncate(slot, in_step=True)
            again = torch.stack([view.sum() for view in views])  # not backed any more, but for the open step
            assert torch.equal(kept, again)
        finally:
            if self.readers:
                self.readers.collect()  # pages cut off in a step go when it is left, if the work on them has ended
            step.__exit__(None, None, None)
            if self.cache.device.type == "cuda":  # an event takes a moment, even behind no work
                self.driver.synchronize()
                with self.cache.step([]):
                    pass

    def family(self, parent: int) -> None:
        """Several forks of one sequence, all cut inside pages that they share, grow in one batch."""
        relatives = [parent]
        while len(self.tags) < self.max_slots and len(relatives) < 4:
            before = set(self.tags)
            self.fork(self.random.choice(relatives))
            relatives += set(self.tags) - before
            if set(self.tags) == before:
                return  # no memory
        rows = self.random.randint(0, min(len(self.tags[slot]) for slot in relatives))
        for slot in relatives:
            self._cut(slot, rows)
        self.random.shuffle(relatives)
        requests = [(slot, self._length(rows)) for slot in relatives[: self.random.randint(1, len(relatives))]]
        self._ensure_all(requests)

    def trim(self) -> None:
        reclaimed = self.counts["reclaimed"]
        self.cache.trim(self.random.choice([0, 4096 * self.random.randrange(64)]))
        assert not self.model.parked
        self.counts["trimmed"] += self.counts["reclaimed"] - reclaimed
        self.counts["reclaimed"] = reclaimed

    # -- checks --------------------------------------------------------------------------------------------------
    def _fits(self, in_model, in_cache) -> bool:
        """Run an operation on both; they agree on whether the memory limit allows it."""
        saved = self.model.save()
        try:
            in_model()
        except DoesNotFit:  # but room was looked for, and pages may have been split
            if self.fail:  # or not all of them
                self.model.restore(saved)
            self._refused(vattn.OutOfPages, in_cache)
            if self.fail:
                self._note_splits()
            return False
        self.model.restore(saved)
        try:
            in_cache()
        except vattn.OutOfPages:
            assert self._out_of_memory, "it fits in the limit"
            self.counts["device out of memory"] += 1
            self._note_splits()
            return False
        in_model()  # after what the cache may have taken from other slots
        return True

    def _refused(self, error: type[Exception], operation) -> None:
        try:
            operation()
        except error:
            self.counts[error.__name__] += 1
        else:
            raise AssertionError(f"{error.__name__} was due")

    def _note_splits(self) -> None:
        """The cache was refused something; before, it may have split pages to make room."""
        mappings = self._mappings()
        for kept in self.model.kept():
            if mappings[kept.slot, kept.lane, kept.first][1] < self.model.size_at(kept):
                self.model.split(kept)

    def _mappings(self) -> dict[Unit, tuple[int, int]]:
        """(slot, lane, unit) -> (handle, units that it has) of everything that the driver has mapped."""
        backing, found, number = self.cache._slots.backing, {}, 0
        for reservation, plan in zip(backing.reservations, backing.plans, strict=True):
            for lane in plan.lanes:
                start = reservation.address + lane.offset_bytes
                for address, mapping in self.driver.book.mappings.items():
                    slot, offset = divmod(address - start, lane.slot_stride_bytes)
                    if 0 <= slot < self.max_slots:
                        first, size = offset // self.model.page_bytes, mapping.size_bytes // self.model.page_bytes
                        for unit in range(first, first + size):
                            found[slot, number, unit] = mapping.handle, size
                number += 1
        return found

    def _finish_unpark(self, slot: int, taken: list[Page], tops: list[int]) -> None:
        """Stands in the cache's place: parked pages of a slot were unmapped, and the model is told."""
        self._unparked(slot, taken, tops)
        mappings = self._mappings()
        keys = {key for key in self.model.parked if key[0] == slot and key not in mappings}
        assert len(keys) == sum(page.size for page in taken)
        self.model.unparked(keys)
        self.counts["reclaimed"] += len(keys)

    def check_pages(self, stats: vattn.CacheStats) -> None:
        """The driver's mappings are the model's, page by page.

        But for an alias in the way of a sequence that could not be wiped of stale rows when it was cut: it goes later.
        """
        mappings, model = self._mappings(), self.model
        for key in model.parked.keys() - mappings.keys():
            assert self.fail
            assert model.parked.pop(key) in model.table.values()
        self.counts["adopted"] = stats.num_adopted
        self.counts["parked aliases"] += len(model.parked) - len(set(model.parked.values()) - set(model.table.values()))
        assert mappings.keys() == model.table.keys() | model.parked.keys()
        pages = {**model.table, **model.parked}
        pairs = {(pages[key], handle) for key, (handle, _) in mappings.items()}
        assert len(pairs) == len({page for page, _ in pairs}) == len({handle for _, handle in pairs}), (
            "who shares a page with whom is not as the model says"
        )
        assert all(size == model.sizes[pages[key]] for key, (_, size) in mappings.items()), "a page has another size"
        if any(size > 1 for _, size in mappings.values()):
            self.counts["large pages"] += 1
        if model.kept():
            self.counts["kept"] += 1

    def check(self, every_row: bool) -> None:
        assert not self.faults, self.faults
        self.cache.check_integrity()
        stats = self.cache.stats()
        self.check_pages(stats)
        for name, value in self.model.expected_stats(self.layout.bytes_per_token).items():
            assert getattr(stats, name) == value, f"{name}: {getattr(stats, name)}, the model says {value}"
        assert stats.physical_bytes == stats.in_use_bytes + stats.parked_bytes + stats.free_bytes + stats.index_bytes
        if every_row:
            for slot in self.tags:
                self.check_rows(slot)
            if self.readers:
                self.readers.collect()

    def one(self) -> None:
        names = [
            "acquire",
            "ensure",
            "ensure",
            "ensure",
            "ensure_batch",
            "fork",
            "truncate",
            "release",
            "rewrite",
            "family",
            "step",
            "trim",
        ]
        name = self.random.choice(names if self.tags else ["acquire"])
        arguments = () if name in ("acquire", "ensure_batch", "trim") else (self.random.choice(sorted(self.tags)),)
        if self.queued:
            self.queued.streams.setdefault(self.random.randrange(FIRST_STREAM), type(self.queued.streams[0])())
            self.queued.current = self.random.choice(
                [each for each in sorted(self.queued.streams) if each < FIRST_STREAM]
            )
        if self.readers and self.random.random() < 0.5:
            self.readers.launch()
        if self.fail and self.random.random() < 0.2 and name != "step":
            self._out_of_memory = self.random.random() < 0.3
            call, at = self.random.choice(_DRIVER_CALLS), self.random.choice([1, 1, 2, 4])
            self.driver.fail(call, at=at, out_of_memory=self._out_of_memory)
        self.counts[name] += 1
        try:
            getattr(self, name)(*arguments)
        except vattn.DriverError as error:
            if error.result != "INJECTED":
                raise
            self.counts["DriverError"] += 1
            self._note_splits()
            self.check(every_row=True)
        finally:
            self.driver.heal()
            self._out_of_memory = False
        if arguments and arguments[0] in self.tags:
            self.check_rows(arguments[0])

    def run(self, operations: int) -> None:
        for number in range(operations):
            self.one()
            self.check(every_row=number % 16 == 0)
        self.check(every_row=True)

    def close(self) -> None:
        self.cache.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000, help="in all, over layouts and variants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for kind in LAYOUTS:
        for variant, settings in VARIANTS.items():
            start = time.perf_counter()
            with contextlib.closing(Fuzz(options.seed, kind, options.device, **settings)) as fuzz:
                fuzz.run(options.operations // (len(VARIANTS) * len(LAYOUTS)))
                print(f"{kind}, {variant}: {time.perf_counter() - start:.1f} s, {fuzz.counts}", flush=True)


if __name__ == "__main__":
    main()
