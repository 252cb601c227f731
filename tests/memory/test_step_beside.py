"""Steps beside the operations of other threads: they wait for none but one on their own slots."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from helpers.stream_driver import StreamDriver
from test_streams import LAYOUT, PAGE, new

import vattn

_LONG_S = 30  # what waits so long does not come


class PausingDriver(StreamDriver):
    """One call of a kind, the first but for ``num_skipped``, waits until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.stop_in: str | None = None
        self.num_skipped = 0
        self.stopped, self.go_on = threading.Event(), threading.Event()

    def _pause(self, call: str) -> None:
        if self.stop_in == call:
            self.num_skipped -= 1
        if self.stop_in == call and self.num_skipped < 0:
            self.stop_in = None
            self.stopped.set()
            assert self.go_on.wait(_LONG_S), "nobody let it go on"

    def _create(self, size_bytes: int) -> int:
        self._pause("create")
        return super()._create(size_bytes)

    def _release(self, handle: int, size_bytes: int, still_mapped: bool) -> None:
        self._pause("release")
        super()._release(handle, size_bytes, still_mapped)

    def _map(self, address: int, size_bytes: int, handle: int) -> None:
        self._pause("map")
        super()._map(address, size_bytes, handle)

    def _unmap(self, address: int, size_bytes: int) -> None:
        self._pause("unmap")
        super()._unmap(address, size_bytes)

    def _zero(self, address: int, size_bytes: int) -> None:
        self._pause("zero")
        super()._zero(address, size_bytes)

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        self._pause("copy")
        super()._copy(target, source, size_bytes)

    @contextmanager
    def stopped_in(self, call: str, operation: Callable[[], object]) -> Iterator[threading.Thread]:
        """Another thread is in the middle of the operation, and has the cache, while the block runs or until
        ``go_on``."""
        failures: list[BaseException] = []

        def work() -> None:
            try:
                operation()
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=work)
        self.stop_in = call
        thread.start()
        try:
            assert self.stopped.wait(_LONG_S), "the operation makes no such call"
            yield thread
        finally:
            self.go_on.set()
            thread.join(_LONG_S)
        assert not failures, failures


@pytest.fixture
def driver():
    return PausingDriver()


@pytest.fixture
def cache(driver):
    with vattn.KVCache(LAYOUT, 6, memory_limit=16 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        yield cache
        cache.check_integrity()


def family(cache: vattn.KVCache) -> tuple[int, int]:
    """A sequence, and one that shares its first page."""
    parent = new(cache, 128)
    return parent, cache.fork(parent, 64)


ELSEWHERE = {
    "ensure": ("create", lambda cache, slot: lambda: cache.ensure(cache.acquire(), 64)),
    "truncate": ("unmap", lambda cache, slot: lambda: cache.truncate(slot, 0)),
    "fork": ("map", lambda cache, slot: lambda: cache.fork(slot)),
    "copy on write": ("copy", lambda cache, slot: lambda: cache.make_writable(slot, 0, 1)),
    "trim": ("release", lambda cache, slot: lambda: (cache.release(slot), cache.trim())),
}


@pytest.mark.parametrize("operation", ELSEWHERE)
def test_a_step_waits_for_no_operation_elsewhere(cache, driver, operation):
    mine, (slot, _) = new(cache, 64), family(cache)
    call, begin = ELSEWHERE[operation]
    with driver.stopped_in(call, begin(cache, slot)) as thread:
        for _ in range(3):
            with cache.step([mine], versions=cache.versions([mine])), cache.step([mine]):
                assert cache._slots.work.is_open(mine)
        assert thread.is_alive()
        assert not driver.go_on.is_set()


@pytest.mark.parametrize("call", ["create", "map", "zero"])
def test_a_step_does_not_wait_for_pages_that_its_own_slot_gets(cache, driver, call):
    """They are mapped ahead of it."""
    cache.release(new(cache, 128))
    slot = new(cache, 64)
    with driver.stopped_in(call, lambda: cache.ensure(slot, 192)), cache.step([slot]):
        assert not driver.go_on.is_set()
    assert cache.seq_len(slot) == 192


def test_a_step_does_not_wait_for_a_fork_of_its_own_slot(cache, driver):
    slot = new(cache, 100)
    with driver.stopped_in("map", lambda: cache.fork(slot, into=5)), cache.step([slot]):
        assert not driver.go_on.is_set()
    assert cache.seq_len(5) == 100


@pytest.mark.parametrize("leaving", ["entered before", "entered meanwhile"])
def test_a_step_is_left_beside_an_operation(cache, driver, leaving):
    slot, other = new(cache, 64), new(cache, 128)
    step = cache.step([slot])
    if leaving == "entered before":
        step.__enter__()
    with driver.stopped_in("unmap", lambda: cache.truncate(other, 0)):
        if leaving == "entered meanwhile":
            step.__enter__()
        step.__exit__(None, None, None)
        assert not driver.go_on.is_set()
        assert not cache._slots.work.open_steps


# -- operations on the slots of the step -------------------------------------------------------------------------------
@contextmanager
def entering(cache: vattn.KVCache, slot: int, versions: np.ndarray | None = None) -> Iterator[list[str]]:
    """Another thread, which waits to enter a step when the block begins, and has left it, or failed, at its end."""
    seen: list[str] = []

    def enter() -> None:
        try:
            with cache.step([slot], versions=versions):
                seen.append("entered")
        except vattn.ConfigError as error:
            seen.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    deadline = time.monotonic() + _LONG_S
    while thread.ident not in cache._lock.hurrying and not seen and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not seen, "a step did not wait for an operation on its slot"
    yield seen
    thread.join(_LONG_S)
    assert seen


@pytest.mark.parametrize("pinned", [False, True])
def test_a_step_waits_for_rows_of_its_own_slot_to_go(cache, driver, pinned):
    slot = new(cache, 192)
    versions = cache.versions([slot]) if pinned else None
    truncate = driver.stopped_in("unmap", lambda: cache.truncate(slot, 64))
    with truncate as thread, entering(cache, slot, versions) as seen:
        driver.go_on.set()
        thread.join(_LONG_S)
    assert "has lost rows" in seen[0] if pinned else seen == ["entered"]
    with cache.step([slot]):  # nothing is held any more
        pass


@pytest.mark.parametrize("call", ["unmap", "map", "copy"])
def test_a_step_waits_for_copies_of_its_own_slots_pages(cache, driver, call):
    _, slot = family(cache)
    with driver.stopped_in(call, lambda: cache.make_writable(slot, 0, 64)) as thread, entering(cache, slot) as seen:
        driver.go_on.set()
        thread.join(_LONG_S)
    assert seen == ["entered"]
    assert driver.streams[0].queue, "the copy was made"


@pytest.mark.parametrize("num_wiped", [0, 1])
def test_a_step_waits_until_what_its_kernels_read_past_the_end_is_wiped(driver, num_wiped):
    layout = {"memory_limit": 16 * PAGE, "page_bytes": PAGE, "driver": driver, "over_read_tokens": 30}
    with vattn.KVCache(LAYOUT, 2, **layout) as cache:
        slots = [new(cache, 60), new(cache, 60)]
        with cache.step(slots):
            for slot in slots:
                cache.truncate(slot, 10)  # what lies behind them is still to be wiped
        driver.num_skipped = num_wiped
        ensure = driver.stopped_in("zero", lambda: cache.ensure_batch(slots, [12, 12]))
        with ensure as thread, entering(cache, slots[0]) as seen:
            driver.go_on.set()
            thread.join(_LONG_S)
        assert seen == ["entered"]
        cache.check_integrity()


def test_a_step_that_comes_while_another_thread_closes_is_told_that_it_is_closed(driver):
    cache = vattn.KVCache(LAYOUT, 2, memory_limit=16 * PAGE, page_bytes=PAGE, driver=driver)
    slot = new(cache, 64)
    with driver.stopped_in("unmap", cache.close) as thread, entering(cache, slot) as seen:
        driver.go_on.set()
        thread.join(_LONG_S)
    assert "is closed" in seen[0]


def test_an_operation_that_failed_holds_nothing(cache, driver):
    parent, slot = family(cache)
    with cache.step([parent]), pytest.raises(vattn.ConfigError, match="before step"):
        cache.make_writable(parent, 0, 1)
    assert not cache._slots.work.held
    with pytest.raises(vattn.OutOfPages):
        cache.ensure_batch([slot, cache.acquire(), cache.acquire()], [400, 400, 400])
    assert not cache._slots.work.held


# -- what was left for later -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["release", "truncate"])
def test_what_waits_for_a_step_is_done_by_the_operation_that_goes_on_when_it_is_left(cache, driver, end):
    """The step does not wait for it, and nobody has to call again."""
    slot, other = new(cache, 192), new(cache, 128)
    step = cache.step([slot])
    step.__enter__()
    cache.release(slot) if end == "release" else cache.truncate(slot, 64)
    before = cache.stats().mapped_bytes
    with driver.stopped_in("unmap", lambda: cache.truncate(other, 64)):
        step.__exit__(None, None, None)
        driver.run(0)
        assert not driver.go_on.is_set()
    assert cache.stats().mapped_bytes == before - (PAGE if end == "release" else 3 * PAGE)
    assert cache._slots.lock.left_over is None
    cache.check_integrity()


@pytest.mark.parametrize("use", ["stored", "resume", "fork", "drop"])
def test_what_was_stored_in_a_step_is_there_for_the_turn_after_it(cache, driver, use):
    """A turn was going on when the step was left, and another one begins before the first looks what was left over."""
    slot = new(cache, 192)
    (version,) = cache.versions([slot])
    lock = cache._lock
    with pytest.MonkeyPatch.context() as patch:
        with cache.step([slot]):
            cache.store(slot)
            patch.setattr(lock, "_catch_up", lambda: None)
        assert lock.left_over is not None
        match use:
            case "stored":
                versions, rows = cache.stored()
                assert (versions[slot], rows[slot]) == (version, 192)
            case "resume":
                assert cache.resume(slot, 192, version=version) == slot
            case "fork":
                assert cache.seq_len(cache.fork(slot, 100, version=version)) == 100
            case "drop":
                cache.drop(slot, version=version)
    assert (cache.stored()[1][slot] == 192) == (use in ("stored", "fork"))


# -- all of it at once -------------------------------------------------------------------------------------------------
class ThreadedDriver(StreamDriver):
    """A current stream for every thread."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._running = threading.RLock()
        super().__init__()

    @property
    def current(self) -> int:
        return getattr(self._mine, "stream", 0)

    @current.setter
    def current(self, number: int) -> None:
        self._mine.stream = number

    def run(self, stream: int, position: int | None = None) -> None:
        with self._running:
            super().run(stream, position)


def test_work_finds_its_pages_whatever_other_threads_do():
    """Threads launch work in steps while others truncate, grow, fork, write to and release the same slots.

    Whatever order they come in: a step of a version that still is has its rows, and their pages are the same when the
    work runs, however late that is.
    """
    driver, failures, num_ran, all_there = ThreadedDriver(), [], [0] * 3, threading.Barrier(5)
    with vattn.KVCache(LAYOUT, 5, memory_limit=24 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        slots = [new(cache, 100) for _ in range(4)]
        address, stride = cache.k(0).data_ptr(), cache.k(0).stride(0) * 4

        def pages(slot: int, rows: int) -> list[int | None]:
            first = address + slot * stride
            found = (driver.book.mappings.get(each) for each in range(first, first + rows * PAGE // 64, PAGE))
            return [None if mapping is None else mapping.handle for mapping in found]

        def work(number: int, slot: int, rows: int, before: list[int | None]) -> None:
            num_ran[number] += 1
            if None in before or pages(slot, rows) != before:
                failures.append((slot, rows, before, pages(slot, rows)))

        def launch(number: int) -> None:
            drawn = random.Random(number)
            with driver.stream(1 + number):
                for time_ in range(400):
                    if time_ == 1:
                        all_there.wait(_LONG_S)
                    slot = drawn.choice(slots)
                    versions = cache.versions([slot])
                    with suppress(vattn.ConfigError):  # it has no sequence, or has lost rows meanwhile
                        rows = cache.seq_len(slot)
                        with cache.step([slot], versions=versions):
                            time.sleep(0)
                            before = pages(slot, rows)
                            driver.launch(lambda now=(number, slot, rows, before): work(*now))
                            time.sleep(0)
                    if drawn.random() < 0.3:
                        driver.run(1 + number)

        def change(number: int) -> None:
            drawn = random.Random(100 + number)
            all_there.wait(_LONG_S)  # everybody has launched work by then
            with driver.stream(10 + number):
                for _ in range(400):
                    slot, rows = drawn.choice(slots), drawn.randint(1, 300)
                    with suppress(vattn.ConfigError, vattn.OutOfPages, vattn.OutOfSlots):  # another thread was faster
                        match drawn.randrange(6):
                            case 0 | 1:
                                cache.truncate(slot, min(rows, cache.seq_len(slot)))
                            case 2:
                                cache.ensure(slot, rows)
                            case 3:
                                cache.make_writable(slot, 0, min(rows, cache.seq_len(slot)))
                            case 4:
                                cache.release(cache.fork(slot))
                            case 5:
                                other = drawn.choice(slots)
                                cache.release(other)
                                cache.trim() if drawn.random() < 0.2 else cache.fork(slot, into=other)
                    with suppress(vattn.ConfigError, vattn.OutOfSlots):
                        cache.acquire(drawn.choice(slots))

        def guarded(function: Callable[[int], None], number: int) -> None:
            try:
                function(number)
            except BaseException as failure:
                failures.append(failure)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=guarded, args=(launch, number)) for number in range(3)]
            threads += [threading.Thread(target=guarded, args=(change, number)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        driver.synchronize()
        assert not failures, failures[:3]
        assert all(num_ran), "no work was launched"
        assert not cache._slots.work.open_steps
        assert not cache._slots.work.held
        cache.check_integrity()
