"""Decode steps with a thread beside them that maps, shares and gives back pages of other sequences; and without."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from common import Records
from decoding import WARM_UP, step_ms
from traces import SHAPES

from vattn import KVCache, KVLayout
from vattn.decode import DecodeLoop, Start
from vattn.driver import LedgerDriver
from vattn.models import FusedLlama, Llama
from vattn.ops.ops_table import Ops
from vattn.tuning.table import default_decode

ROWS = 256  # of a sequence of the thread's
NUM_OTHERS = 16  # slots for them


@dataclass(frozen=True)
class Beside:
    """What runs beside the steps: sequences in ``where``, at a rate of pages.

    Attributes:
        pages_per_s: put behind its sequences: mapped, shared or taken over.
        parks: whether released sequences leave their pages mapped; else all are unmapped, and mapped again.
        forks: whether every second sequence shares the first half of another.
        switch_ms: of ``sys.setswitchinterval`` meanwhile, after which a thread that runs Python lets others; None: 5.
    """

    where: str
    pages_per_s: int
    parks: bool
    forks: bool = True
    switch_ms: float | None = None

    @property
    def system(self) -> str:
        how = ("parked" if self.parks else "mapping") + ("" if self.forks else "-no-forks")
        switch = "" if self.switch_ms is None else f"-switch-{self.switch_ms:g}ms"
        return f"{self.where}-{how}-{self.pages_per_s}{switch}"


BESIDE = (
    Beside("same-cache", 1000, parks=True, forks=False),
    Beside("same-cache", 1000, parks=True),
    Beside("same-cache", 1000, parks=False),
    Beside("same-cache", 1000, parks=False, forks=False),
    Beside("same-cache", 10_000, parks=False),
    Beside("own-cache", 10_000, parks=False),
    Beside("ledger", 10_000, parks=False),
    Beside("ledger", 10_000, parks=False, switch_ms=0.5),
)


class Churn:
    """A thread of sequences that come, are forked, grow and go, at a steady rate, while the block lasts.

    Args:
        cache: where; the thread touches no slot but those that it acquired.
        beside: what it does.

    Attributes:
        rate: pages a second that it came to, once the block has ended.
    """

    def __init__(self, cache: KVCache, beside: Beside) -> None:
        self.cache, self.beside = cache, beside
        page_tokens = int(cache.layout.tokens_per_page(cache.page_bytes))
        self.rate = 0.0
        self._shared_rows = ROWS // 2 - page_tokens // 2  # ends inside a page
        self._grown_rows = self._shared_rows + page_tokens
        self._cycle_pages = sum(-(-(rows + cache.over_read_tokens) // page_tokens) for rows in (ROWS, self._grown_rows))
        self._cycle_s = self._cycle_pages / beside.pages_per_s
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="churn")
        self._switch_s = sys.getswitchinterval()

    def _cycle(self) -> None:
        parent = self.cache.acquire(expect_len=ROWS)
        self.cache.ensure(parent, ROWS)
        if self.beside.forks:
            child = self.cache.fork(parent, self._shared_rows)
        else:
            child = self.cache.acquire(expect_len=self._grown_rows)
        self.cache.ensure(child, self._grown_rows)
        self.cache.release(parent)
        self.cache.release(child)
        if not self.beside.parks:
            self.cache.trim(keep_bytes=1 << 50)  # unmaps what was parked, keeps the pages

    def _work(self) -> None:
        try:
            stream = None
            if self.cache.device.type == "cuda":
                torch.cuda.set_device(self.cache.device)
                stream = torch.cuda.Stream(self.cache.device)  # waits for no one else's work
            with torch.cuda.stream(stream):
                begin = due = time.perf_counter()
                done = 0
                while not self._stop.is_set():
                    self._cycle()
                    done += 1
                    now = time.perf_counter()
                    due = max(
                        due + self._cycle_s, now - self._cycle_s
                    )  # what cannot be kept up with is not made up for
                    self._stop.wait(max(0.0, due - now))
                self.rate = done * self._cycle_pages / (time.perf_counter() - begin)
        except BaseException as failure:
            self._failure = failure

    def __enter__(self) -> Churn:
        if self.beside.switch_ms is not None:
            sys.setswitchinterval(self.beside.switch_ms / 1e3)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        sys.setswitchinterval(self._switch_s)
        if self._failure is not None and error is None:
            raise self._failure


@contextmanager
def open_loop(
    model: Llama, ops: Ops, batch: int, length: int, steps: int, open_cache: Callable[..., KVCache] = KVCache
) -> Iterator[tuple[DecodeLoop, list[int]]]:
    """A loop whose sequences have ``length`` rows, in a cache with slots for others."""
    layout = model.kv_layout(length + steps + WARM_UP + 100)
    fused = FusedLlama(model, layout.max_seq_len, ops=ops)
    attention = default_decode(layout, model.device, batch, length, model.config.num_heads)
    with open_cache(
        layout,
        batch + 1 + NUM_OTHERS,
        model.device,
        over_read_tokens=attention.over_read_tokens,
        over_read_masked=attention.masks_over_read,
    ) as cache:
        slots = [cache.acquire() for _ in range(batch)]
        cache.ensure_batch(slots, [length - i for i in range(batch)])  # their next pages come at different steps
        for slot in slots:
            for layer in range(model.config.num_layers):
                for rows in cache.rows(slot, layer):
                    rows.normal_()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        with DecodeLoop(fused, cache, attention=attention, max_batch=batch, buckets=[batch]) as loop:
            yield loop, slots


def block_of(loop: DecodeLoop, slots: Sequence[int], length: int, steps: int) -> list[float]:
    """The same steps over again: from the same lengths, with the same pages to be mapped on the way."""
    loop.start_batch([Start(slot, 5 + slot, WARM_UP + steps + 1) for slot in slots])
    samples = step_ms(loop, steps)
    for slot in slots:
        loop.cancel(slot)
    loop.drain()
    for i, slot in enumerate(slots):
        loop.cache.truncate(slot, length - i)
    return samples


def levelled(blocks: dict[str, list[list[float]]], base: Sequence[str]) -> dict[str, list[list[float]]]:
    """Samples without the growth within a block, which is taken from the blocks of ``base``: a line through the medians
    of their steps."""
    medians = np.median([block for system in base for block in blocks[system]], axis=0)
    index = np.arange(len(medians))
    slope, _ = np.polyfit(index, medians, 1)
    growth = slope * (index - index.mean())
    return {system: [(np.array(each) - growth).tolist() for each in all_] for system, all_ in blocks.items()}


def p99(samples: Sequence[float]) -> float:
    return sorted(samples)[int(0.99 * len(samples))]


def run_beside(
    records: Records, model: Llama, ops: Ops, batch: int = 32, length: int = 1024, steps: int = 500, rounds: int = 4
) -> None:
    """Blocks in turn, in an order drawn anew for each round. ``none`` comes twice: how far its two differ is noise."""
    case = f"beside 8B B={batch} L={length} steps={rounds * steps}"
    systems: dict[str, Beside | None] = {"none": None, **{each.system: each for each in BESIDE}, "none-again": None}
    blocks: dict[str, list[list[float]]] = {system: [] for system in systems}
    rates: dict[str, list[float]] = {system: [] for system in systems}
    others = KVLayout(*SHAPES["8B"], 1024, torch.bfloat16)
    with ExitStack() as stack:
        loop, slots = stack.enter_context(open_loop(model, ops, batch, length, steps))
        own = stack.enter_context(KVCache(others, NUM_OTHERS, model.device, memory_limit=2 << 30))
        ledger = stack.enter_context(KVCache(others, NUM_OTHERS, driver=LedgerDriver(1 << 40), memory_limit=2 << 30))
        caches = {"same-cache": loop.cache, "own-cache": own, "ledger": ledger}
        block_of(loop, slots, length, steps)  # makes the pages
        drawn = records.drawn(case)
        for _ in range(rounds):
            for system in drawn.sample(list(systems), len(systems)):
                beside = systems[system]
                if beside is None:
                    blocks[system].append(block_of(loop, slots, length, steps))
                    continue
                with Churn(caches[beside.where], beside) as churn:
                    samples = block_of(loop, slots, length, steps)
                blocks[system].append(samples)
                rates[system].append(churn.rate)
                caches[beside.where].trim(keep_bytes=1 << 50)  # the next begins with nothing parked
        loop.cache.check_integrity()
    level = levelled(blocks, ("none", "none-again"))
    base = [sample for block in level["none"] for sample in block]
    for system, found in level.items():
        samples = [sample for block in found for sample in block]
        records.add(case, system, "decode_step", "ms", samples)
        records.add(case, system, "decode_step_p99", "ms", [p99(samples)])
        records.add(case, system, "decode_step_max", "ms", [max(samples)])
        records.add(case, system, "p50_ratio", "ratio", [float(np.median(samples) / np.median(base))])
        records.add(case, system, "p99_ratio", "ratio", [p99(samples) / p99(base)])
        records.add(case, system, "block_p99_ratio", "ratio", [p99(list(block)) / p99(base) for block in found])
        if rates[system]:
            records.add(case, system, "churn_rate", "pages/s", rates[system])
