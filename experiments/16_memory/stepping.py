"""Steps with a thread beside them that maps, forks and unmaps all the time; and how long they wait for the cache."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from backing import is_of, native
from beside import block_of, levelled, open_loop
from common import Records
from traces import SHAPES

from vattn import KVCache, KVLayout
from vattn.driver import HostDriver, LedgerDriver
from vattn.memory.lock import locked
from vattn.memory.steps import Steps
from vattn.memory.work import OpenStep
from vattn.models import Llama
from vattn.ops.ops_table import Ops

LAYOUT = KVLayout(4, 2, 64, 4096, torch.bfloat16)  # 32 tokens to a page
PAGE_BYTES = 65536
LEDGER_LAYOUT = KVLayout(32, 4, 128, 4096, torch.bfloat16)  # the same of the ledger, whose pages are of 2 MiB
ROWS = 4096  # of the thread's sequences: 128 pages
NUM_OTHERS = 2
WORK = bytes(1 << 20)  # hashed in every step, outside of the interpreter's lock


class StepsInTurn(Steps):
    def _enter_step(self, *arguments: object) -> bool:
        return False

    @locked(urgent=True, from_finaliser=True)
    def _leave(self, step: OpenStep, dropped: bool) -> None:
        self._opened.slots.work.leave(step)
        self._opened.slots.finish_deferred(wait=False)


class OneLock(KVCache):
    """Entering and leaving a step take turns with all operations."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._steps = StepsInTurn(self._opened, self._lock)


SYSTEMS = {"vattn": KVCache, "vattn-one-lock": OneLock}


@dataclass(frozen=True)
class Thread:
    """What the thread works on, and after how long one that runs Python lets others (``sys.setswitchinterval``)."""

    where: str
    switch_ms: float = 5.0

    @property
    def words(self) -> str:
        return f"thread={self.where} switch={self.switch_ms:g}ms"


KINDS = [("vattn", Thread(where, ms)) for where in ("same-cache", "own-cache", "ledger") for ms in (5.0, 0.5)]
KINDS += [("vattn-one-lock", Thread("same-cache", ms)) for ms in (5.0, 0.5)]


@contextmanager
def churning(cache: KVCache, rows: int = ROWS) -> Iterator[list[int]]:
    """A thread of sequences that come, are forked and go, while the block lasts; how many there were so far."""
    done, end, failures = [0], threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            stream = None
            if cache.device.type == "cuda":
                torch.cuda.set_device(cache.device)
                stream = torch.cuda.Stream(cache.device)  # waits for no one else's work
            with torch.cuda.stream(stream):
                churn()
        except BaseException as failure:
            failures.append(failure)

    def churn() -> None:
        while not end.is_set():
            parent = cache.acquire()
            cache.ensure(parent, rows)
            child = cache.fork(parent, rows - 1)  # a page is copied
            cache.truncate(child, rows // 2)
            cache.release(parent)
            cache.release(child)
            cache.trim(keep_bytes=1 << 50)  # unmaps what they left, and keeps the pages
            done[0] += 1

    thread = threading.Thread(target=work, name="churn")
    thread.start()
    try:
        yield done
    finally:
        end.set()
        thread.join()
    if failures:
        raise failures[0]


@contextmanager
def switching(milliseconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(milliseconds / 1e3)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def steps(cache: KVCache, slots: Sequence[int], count: int) -> tuple[list[float], list[float]]:
    """(microseconds of each step, and of it those that entering and leaving took)."""
    whole, waited = [], []
    named = np.array(slots)
    for _ in range(count):
        begin = time.perf_counter()
        with cache.step(named):
            inside = time.perf_counter()
            hashlib.sha256(WORK).digest()
            left = time.perf_counter()
        end = time.perf_counter()
        whole.append((end - begin) * 1e6)
        waited.append((inside - begin + end - left) * 1e6)
    return whole, waited


def cuda_beside(records: Records, model: Llama, ops: Ops, count: int, rounds: int) -> None:
    """Steps of a decode loop; blocks with nothing beside them, with a thread in the loop's cache, and with one in a
    cache of its own take turns."""
    batch, length = 32, 1024
    layout = KVLayout(*SHAPES["8B"], 1024, torch.bfloat16)
    for system in ("vattn", "vattn-python", "vattn-one-lock"):
        with records.going_on(f"beside {system}"), ExitStack() as stack:
            with native(system != "vattn-python"):
                opened = open_loop(model, ops, batch, length, count, SYSTEMS.get(system, KVCache))
                loop, slots = stack.enter_context(opened)
                own = stack.enter_context(KVCache(layout, NUM_OTHERS, model.device, memory_limit=1 << 30))
            if not is_of(loop.cache.driver, system):
                continue
            blocks: dict[str, list[list[float]]] = {"none": [], "same-cache": [], "own-cache": []}
            block_of(loop, slots, length, count)  # makes the pages
            drawn = records.drawn(f"beside {system}")
            for _ in range(rounds):
                for where in drawn.sample(list(blocks), len(blocks)):
                    beside = {"none": None, "same-cache": loop.cache, "own-cache": own}[where]
                    with nullcontext() if beside is None else churning(beside, 1024):
                        blocks[where].append(block_of(loop, slots, length, count))
            loop.cache.check_integrity()
            level = levelled(blocks, ["none"])
            alone = share([sample for block in level.pop("none") for sample in block], 0.99)
            for where, found in level.items():
                case = f"beside driver=cuda 8B B={batch} L={length} thread={where}"
                records.add(case, system, "p99_ratio", "ratio", [share(block, 0.99) / alone for block in found])
                records.add(case, system, "step_max", "ms", [max(block) for block in found])


def share(samples: Sequence[float], of: float) -> float:
    """A percentile, as one of the samples."""
    return sorted(samples)[int(of * len(samples))]


def host_beside(records: Records, count: int, rounds: int) -> None:
    """Steps alone and then with the thread, in caches of their own; in an order drawn anew for each round."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    drawn = records.drawn("beside")
    for _ in range(rounds):
        for system, thread in drawn.sample(KINDS, len(KINDS)):
            with (
                SYSTEMS[system](LAYOUT, 8 + NUM_OTHERS, driver=HostDriver(), page_bytes=PAGE_BYTES) as cache,
                KVCache(LAYOUT, NUM_OTHERS, driver=HostDriver(), page_bytes=PAGE_BYTES) as own,
                KVCache(LEDGER_LAYOUT, NUM_OTHERS, driver=LedgerDriver(1 << 40)) as ledger,
                switching(thread.switch_ms),
            ):
                slots = [cache.acquire() for _ in range(8)]
                cache.ensure_batch(slots, [64] * len(slots))
                alone, _ = steps(cache, slots, count)
                with churning({"same-cache": cache, "own-cache": own, "ledger": ledger}[thread.where]) as done:
                    while not done[0]:  # it has its pages
                        time.sleep(0.001)
                    beside, waited = steps(cache, slots, count)
                cache.check_integrity()
            round_ = {"p99_ratio": share(beside, 0.99) / share(alone, 0.99)}
            round_ |= {"wait_p50": share(waited, 0.5), "wait_p90": share(waited, 0.9), "wait_p99": share(waited, 0.99)}
            found.setdefault((system, thread.words), []).append(round_ | {"wait_max": max(waited)})
    for (system, words), each in sorted(found.items()):
        for metric in each[0]:
            unit = "ratio" if metric.endswith("ratio") else "us"
            records.add(f"beside driver=host {words}", system, metric, unit, [round_[metric] for round_ in each])
