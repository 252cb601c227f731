"""Caches that end early, late, in another thread, by Ctrl-C, or while somebody still looks."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import vattn
from vattn.interrupts import SIGNALS

LAYOUT = vattn.KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, max_seq_len=4096, dtype=torch.float32)
LONG_RACE_SECONDS = 20 if os.environ.get("VATTN_SHORT") else 60  # under compute-sanitizer


def open_cache(device: str, max_slots: int = 4, **options: object) -> vattn.KVCache:
    return vattn.KVCache(LAYOUT, max_slots, device=device, **options)  # type: ignore[arg-type]


def test_an_exception_in_the_block_closes_the_cache(device):
    cache = open_cache(device)

    def fail() -> None:
        with cache:
            cache.ensure(cache.acquire(), 100)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(vattn.ConfigError, match="closed"):
        cache.stats()
    assert not cache.driver.book.handles


@pytest.mark.parametrize("seed", range(6))
def test_garbage_goes_in_any_order(device, seed):
    cache = open_cache(device)
    driver = cache.driver
    slot = cache.acquire()
    cache.ensure(slot, 1000)
    things = [cache, cache.k(0), cache.v(1)[slot, :5], *cache.rows(slot, 1), cache.k(1).view(torch.uint8)]
    cycle: list[object] = []
    cycle.append((cycle, things[seed % len(things)]))
    random.Random(seed).shuffle(things)
    del cache
    while things:
        assert driver.book.ranges
        things.pop()
    del cycle
    gc.collect()
    assert not driver.book.ranges
    assert not driver.book.handles


def test_a_cache_dropped_in_another_thread(device):
    held = [open_cache(device)]
    held[0].ensure(held[0].acquire(), 1000)
    driver = held[0].driver
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert not driver.book.ranges


_INTERRUPTED = """
import itertools, os, random, signal, sys, threading, time
import torch, vattn

layout = vattn.KVLayout(2, 2, 64, 4096, torch.float32, order="layer")
cache = vattn.KVCache(layout, 8, device=sys.argv[1], memory_limit=256 << 20)
done = False

RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit, signal.SIGALRM: TimeoutError}

def interrupt():
    for number in itertools.cycle(RAISED):
        if done:
            break
        time.sleep(random.random() * 0.002)
        os.kill(os.getpid(), number)

inside = False

def interrupted(number, frame):
    global inside
    if inside:  # not in the test's own bookkeeping
        inside = False
        raise RAISED[number]

def one_operation():
    slots = [slot for slot in range(8) if cache._slots.state[slot] == 1]
    for _ in range(3):
        with cache.step(slots):
            pass
    if len(slots) < 4:
        cache.acquire()
    elif draw.random() < 0.5:
        cache.ensure_batch(slots, [draw.randrange(4096) for _ in slots])
    elif draw.random() < 0.5 and len(slots) < 8:
        cache.fork(draw.choice(slots))
    else:
        with cache.step(slots[:1]):
            cache.truncate(slots[0], 0)
        cache.release(draw.choice(slots))

for number in RAISED:
    signal.signal(number, interrupted)
interrupts = finished = 0
thread = threading.Thread(target=interrupt)
thread.start()
draw = random.Random(3)
end = time.monotonic() + 4
while time.monotonic() < end:
    try:
        inside = True
        one_operation()
        inside = False
        finished += 1
    except (KeyboardInterrupt, SystemExit, TimeoutError):
        interrupts += 1
    cache.check_integrity()
    assert not cache._slots.work.open_steps
done = True
thread.join()
assert {signal.getsignal(number) for number in RAISED} == {interrupted}
cache.close()
print(interrupts, finished)
"""


def test_handlers_that_raise_during_any_operation_leave_the_books_right(device):
    child = subprocess.run([sys.executable, "-c", _INTERRUPTED, device], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stderr) == (0, ""), child.stderr
    interrupts, finished = map(int, child.stdout.split())
    assert interrupts > 50
    assert finished > 50


# As a server ends: the handler raises SystemExit, wherever that is, and the cache is closed on the way out.
_TERMINATED = """
import os, random, signal, sys, threading, time
import torch, vattn

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
layout = vattn.KVLayout(2, 2, 64, 4096, torch.float32, order="layer")

def serve(seed):
    cache = vattn.KVCache(layout, 8, "cpu", memory_limit=64 << 20)
    slot, delay = cache.acquire(), random.Random(seed).random() * 0.01
    cache.ensure(slot, 100)
    threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    try:
        while True:
            with cache.step([slot]):
                pass
    finally:
        cache.check_integrity()
        cache.close()

codes = []
for seed in range(int(sys.argv[1])):
    if (pid := os.fork()) == 0:
        try:
            serve(seed)
        except SystemExit as error:
            os._exit(error.code)
        finally:
            os._exit(1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert set(codes) == {7}, codes
"""


@pytest.mark.parametrize("num_servers", [25, pytest.param(100, marks=pytest.mark.slow)])
def test_a_server_that_is_terminated_closes_its_cache(num_servers):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _TERMINATED, str(num_servers)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stderr) == (0, ""), child.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_reaches_the_handler_that_was_there(device, number, monkeypatch):
    """Once: after the operation that it came in, and at once outside of one."""
    seen = []
    before = signal.signal(number, lambda number, frame: seen.append(number))
    try:
        with open_cache(device) as cache:
            map_pages = cache.driver.map_pages
            monkeypatch.setattr(
                cache.driver,
                "map_pages",
                lambda *arguments: (map_pages(*arguments), signal.raise_signal(number), seen.append("mapped")),
            )
            cache.ensure(cache.acquire(), 1)
            assert seen == ["mapped", number]
            signal.raise_signal(number)
            assert seen == ["mapped", number, number]
    finally:
        signal.signal(number, before)


def test_a_handler_may_wait_for_another_thread_s_operation(device):
    """One that does not raise but closes something, which joins a thread that waits for the cache."""
    with open_cache(device) as cache:
        slot, leave = cache.acquire(), threading.Event()

        def work() -> None:
            while not leave.is_set():
                cache.ensure(slot, 1)

        thread = threading.Thread(target=work)

        def end(number: int, frame: object) -> None:
            leave.set()
            thread.join()

        before = signal.signal(signal.SIGTERM, end)
        try:
            thread.start()
            deadline = time.monotonic() + 30
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
            timer.start()
            while not leave.is_set() and time.monotonic() < deadline:
                cache.release(cache.acquire())
            assert leave.is_set()
        finally:
            signal.signal(signal.SIGTERM, before)
        timer.join()
        cache.check_integrity()


def test_gradients_are_not_recorded_into_the_cache(device):
    with open_cache(device) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 4)
        new = torch.ones(2, 64, device=cache.device, requires_grad=True)
        for tensor in (cache.k(0)[slot], cache.rows(slot, 0)[0]):
            with pytest.raises(RuntimeError, match="no_grad"):
                tensor[0] = new * 2
        with torch.no_grad():
            cache.rows(slot, 0)[0][0] = new * 2
        # Reading into a graph is fine: gradients flow past the cache.
        (cache.rows(slot, 0)[0][0] * new).sum().backward()
        assert (new.grad == 2).all()
        assert not cache.k(0).requires_grad


def test_a_compiled_function_reads_and_writes_rows(device):
    """``rows`` may go into compiled code. The full views may not: functionalised, a write to one may become a
    copy of all of it."""
    with open_cache(device) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 8)

        # Traced and functionalised as under inductor, without its code generator.
        @torch.compile(backend="aot_eager")
        def append(k: torch.Tensor, index: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            k[index] = row
            return k.sum()

        index = torch.tensor([5], device=cache.device)
        total = append(cache.rows(slot, 1)[0], index, torch.full((1, 2, 64), 2.0, device=cache.device))
        assert total.item() == 256
        assert (cache.rows(slot, 1)[0][5] == 2).all()


def test_compiled_code_writes_the_full_views_through_an_uncompiled_function(device):
    with open_cache(device) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 8)

        @torch.compiler.disable
        def append(k: torch.Tensor, index: torch.Tensor, row: torch.Tensor) -> None:
            k[slot, index] = row

        @torch.compile(backend="aot_eager")
        def layer(k: torch.Tensor, index: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            append(k, index, row * 2)
            return row + 1

        index = torch.tensor([5], device=cache.device)
        layer(cache.k(1), index, torch.ones(1, 2, 64, device=cache.device))
        assert (cache.rows(slot, 1)[0][5] == 2).all()


@pytest.mark.parametrize("seconds", [8, pytest.param(LONG_RACE_SECONDS, marks=pytest.mark.slow)])
def test_threads_share_one_cache(seconds, device):
    """Six threads live whole lives of sequences on one cache; each finds its own rows as it left them."""
    failures: list[BaseException] = []
    finished = [0] * 6
    with open_cache(device, 12, memory_limit=64 << 20) as cache:
        end = time.monotonic() + seconds

        def write(slot: int, start: int, rows: int, value: float) -> None:
            for layer in range(2):
                for tensor in cache.rows(slot, layer):
                    tensor[start:rows] = value

        def check(slot: int, values: list[tuple[int, float]]) -> None:
            for layer in range(2):
                for tensor in cache.rows(slot, layer):
                    start = 0
                    for rows, value in values:
                        assert (tensor[start:rows] == value).all()
                        start = rows

        def live(thread: int) -> None:
            draw = random.Random(thread)
            while time.monotonic() < end and not failures:
                slots: list[int] = []
                try:
                    slots.append(cache.acquire())
                    rows, value = draw.randint(1, 2000), float(draw.randint(1, 1000))
                    cache.ensure(slots[0], rows)
                    write(slots[0], 0, rows, value)
                    slots.append(cache.fork(slots[0]))
                    longer = draw.randint(rows, 3000)
                    cache.ensure_batch(slots, [longer, longer])
                    for number, slot in enumerate(slots):
                        write(slot, rows, longer, value + number + 1)
                    for number, slot in enumerate(slots):
                        check(slot, [(rows, value), (longer, value + number + 1)])
                    cache.truncate(slots[1], draw.randint(0, rows))
                    cache.make_writable(slots[1], 0, cache.seq_len(slots[1]))
                    write(slots[1], 0, cache.seq_len(slots[1]), -1.0)
                    with cache.step([slots[0]]):
                        check(slots[0], [(rows, value), (longer, value + 1)])
                        cache.release(slots.pop(0))
                    check(slots[0], [(cache.seq_len(slots[0]), -1.0)])
                    finished[thread] += 1
                except (vattn.OutOfPages, vattn.OutOfSlots):
                    pass
                finally:
                    for slot in slots:
                        cache.release(slot)

        def guarded(thread: int) -> None:
            stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else None
            try:
                if stream is None:
                    live(thread)
                else:
                    with stream:
                        live(thread)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(thread,)) for thread in range(6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            cache.check_integrity()
            stats = cache.stats()
            assert stats.physical_bytes == stats.in_use_bytes + stats.parked_bytes + stats.free_bytes
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert min(finished) > 3
        cache.check_integrity()
        assert cache.stats().in_use_bytes == 0


@pytest.mark.gpu
def test_a_cache_on_a_device_that_is_not_current():
    """With one GPU: the index is honoured, and another current stream does not matter."""
    with torch.cuda.stream(torch.cuda.Stream()), vattn.KVCache(LAYOUT, 2, device="cuda:0") as cache:
        slot = cache.acquire()
        cache.ensure(slot, 3000)
        cache.rows(slot, 0)[0].fill_(1)
        cache.release(slot)
        slot = cache.acquire()
        cache.ensure(slot, 3000)
        assert not cache.rows(slot, 0)[0].any()
    if torch.cuda.device_count() > 1:
        with torch.cuda.device(0), vattn.KVCache(LAYOUT, 2, device="cuda:1") as cache:
            slot = cache.acquire()
            cache.ensure(slot, 3000)
            cache.rows(slot, 0)[0].fill_(1)
            child = cache.fork(slot)
            cache.make_writable(child, 0, 3000)
            assert (cache.rows(child, 0)[0] == 1).all()
            assert cache.k(0).device == torch.device("cuda:1")
