"""Threads that wait for a cache get into it before the one that has just been there."""

from __future__ import annotations

import gc
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.llama import open_cache, small_model

import vattn
from vattn.decode.loop import DecodeLoop
from vattn.memory.lock import FairLock, locked
from vattn.memory.opened import Opened
from vattn.models import FusedLlama


class Room:
    def __init__(self) -> None:
        self._lock = FairLock()
        self.num_done = 0

    @locked
    def work(self) -> None:
        time.sleep(0.002)
        self.num_done += 1

    @locked(urgent=True)
    def hurry(self) -> int:
        return self.num_done


@contextmanager
def over_and_over(work: Callable[[], object]) -> Iterator[None]:
    """A thread that does nothing else."""
    end = threading.Event()
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            while not end.is_set():
                work()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("call", [Room.work, Room.hurry])
def test_who_waits_comes_next(call: Callable[[Room], object]) -> None:
    room = Room()
    overtaken = []
    with over_and_over(room.work):
        while room.num_done < 3:
            time.sleep(0.001)
        for _ in range(20):
            before = room.num_done
            call(room)
            overtaken.append(room.num_done - before - (call is Room.work))
            time.sleep(0.001)
    assert statistics.median(overtaken) <= 1, overtaken  # the one that was inside; a plain lock: tens of them


@pytest.mark.parametrize("operation", ["step", "ensure"])
def test_a_thread_that_maps_does_not_keep_a_step_waiting(operation: str) -> None:
    layout = vattn.KVLayout(4, 8, 128, 4096, torch.bfloat16)
    num_done = 0
    with vattn.KVCache(layout, 4, "cpu", memory_limit=256 << 20, page_bytes=65536) as cache:
        mine = cache.acquire()
        cache.ensure(mine, 16)

        def churn() -> None:
            nonlocal num_done
            slot = cache.acquire()
            for rows in range(256, 4097, 256):
                cache.ensure(slot, rows)
                num_done += 1
            cache.release(slot)
            cache.trim(keep_bytes=256 << 20)

        overtaken = []
        with over_and_over(churn):
            while num_done < 3:
                time.sleep(0.001)
            for i in range(40):
                before = num_done
                if operation == "step":
                    with cache.step([mine]):
                        overtaken.append(num_done - before)
                else:
                    cache.ensure(mine, 17 + i)
                    overtaken.append(num_done - before)
                time.sleep(0.002)
        cache.check_integrity()
        assert statistics.median(overtaken) <= 2, overtaken


def test_who_waits_in_vain_keeps_nobody() -> None:
    room = Room()
    room._lock.waiting.add(-1)  # a thread that never comes
    start = time.perf_counter()
    room.work()
    assert time.perf_counter() - start < 1.0
    assert room.num_done == 1


def test_an_interrupt_while_waiting_leaves_the_line() -> None:
    """Ctrl-C in an operation that waits for another thread's: it waits no more, and neither does anyone for it."""
    with vattn.KVCache(vattn.KVLayout(1, 1, 64, 64, torch.float32), 1, "cpu", memory_limit=8 << 20) as cache:
        slot = cache.acquire()
        inside, leave = threading.Event(), threading.Event()

        def stay() -> None:
            with cache._lock.lock:
                inside.set()
                leave.wait(30)

        def interrupt() -> None:
            deadline = time.monotonic() + 30
            while not cache._lock.waiting and time.monotonic() < deadline:
                time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        threads = [threading.Thread(target=stay), threading.Thread(target=interrupt)]
        threads[0].start()
        inside.wait(30)
        threads[1].start()
        try:
            with pytest.raises(KeyboardInterrupt):
                cache.seq_len(slot)
            assert not cache._lock.waiting
        finally:
            leave.set()
            for thread in threads:
                thread.join()
        assert cache.seq_len(slot) == 0


def test_a_turn_within_a_turn_comes_after_it_or_not_at_all() -> None:
    """A finaliser's: it would find half of the outer one done."""
    done = []

    class Nested(Room):
        @locked
        def outer(self) -> None:
            self.inner()
            with pytest.raises(vattn.ConfigError, match=r"work\(\) in the middle of another operation of the same"):
                self.work()
            done.append("outer")

        @locked(from_finaliser=True)
        def inner(self) -> None:
            done.append("inner")

    Nested().outer()
    assert done == ["outer", "inner"]


def test_the_collector_runs_while_threads_take_lock() -> None:
    num_collected, end = 0, threading.Event()

    def count(phase: str, info: dict[str, int]) -> None:
        nonlocal num_collected
        num_collected += phase == "stop"

    def work(slot: int) -> None:
        while not end.is_set():
            for _ in range(20):
                cycle: list[object] = []
                cycle.append(cycle)
            with cache.step([slot]):
                pass
            cache.release(cache.acquire())

    layout = vattn.KVLayout(1, 1, 64, 64, torch.float32)
    with vattn.KVCache(layout, 12, "cpu", memory_limit=8 << 20) as cache:
        threads = [threading.Thread(target=work, args=(cache.acquire(),)) for _ in range(4)]
        gc.collect()
        gc.callbacks.append(count)
        try:
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 20
            while num_collected < 20 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            gc.callbacks.remove(count)
            end.set()
            for thread in threads:
                thread.join()
    assert num_collected >= 20


@pytest.mark.parametrize("look", ["stats", "seq_len", "ensure", "step"])
def test_the_collector_ends_a_loop_after_the_turn_that_it_runs_in(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending it waits for its mapper's thread, which waits for this very turn to end."""
    model = small_model()
    with open_cache(model, 4) as cache:
        slot = cache.acquire()
        cycle: list[object] = [DecodeLoop(FusedLlama(model), cache)]
        mapper = cycle[0]._mapper  # type: ignore[attr-defined]
        thread = mapper._thread
        mapper.track(slot, 0, 9)
        cycle.append(cycle)
        del cycle
        live_slots = Opened.slots

        def collect(self: Opened) -> object:
            monkeypatch.undo()
            mapper._jobs.put((np.array([slot]), np.array([9]), mapper._generation[[slot]]))
            deadline = time.monotonic() + 30
            # It waits for a turn; beside a step it has one, and waits for the books.
            while thread.ident not in (*cache._lock.waiting, cache._lock.owner) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert time.monotonic() < deadline
            gc.collect()
            assert thread.is_alive()
            return live_slots.fget(self)  # type: ignore[attr-defined]

        monkeypatch.setattr(Opened, "slots", property(collect))
        if look == "step":
            with cache.step([slot]):
                pass
        else:
            {"stats": cache.stats, "seq_len": lambda: cache.seq_len(slot), "ensure": lambda: cache.ensure(slot, 2)}[
                look
            ]()
        assert not thread.is_alive()
        assert cache.stats().num_live_slots == 1  # the loop's own went with it
        cache.check_integrity()
