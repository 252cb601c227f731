"""Operations that a signal's handler or the garbage collector would come into: before them or after, not into them."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from helpers.stream_driver import StreamDriver
from test_streams import LAYOUT, PAGE, launch_fill, new

import vattn
from vattn.memory.steps import Steps


@pytest.fixture
def driver():
    return StreamDriver()


@pytest.fixture
def cache(driver):
    with vattn.KVCache(LAYOUT, 6, memory_limit=64 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        yield cache


class InterruptingDriver(StreamDriver):
    """Sends Ctrl-C in the middle of a call, once."""

    during: str | None = None

    def _interrupt(self, call: str) -> None:
        if self.during == call:
            self.during = None
            os.kill(os.getpid(), signal.SIGINT)

    def _map_batch(self, *arguments):
        self._interrupt("map")
        return super()._map_batch(*arguments)

    def fence(self):
        self._interrupt("fence")
        return super().fence()

    def order_after(self, fence):
        self._interrupt("order_after")
        super().order_after(fence)


@pytest.fixture
def interrupted():
    driver = InterruptingDriver()
    with vattn.KVCache(LAYOUT, 4, memory_limit=64 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        yield cache


def test_ctrl_c_on_entering_a_step_does_not_leave_it_open(interrupted):
    driver = interrupted.driver
    slot = new(interrupted, 64)
    with interrupted.step([slot]):
        pass
    with driver.stream(1):
        driver.during = "order_after"
        with pytest.raises(KeyboardInterrupt), interrupted.step([slot]):
            raise AssertionError("the block ran")
    interrupted.release(slot)
    assert interrupted.acquire(slot) == slot
    interrupted.check_integrity()


def test_ctrl_c_on_leaving_a_step_does_not_leave_it_open(interrupted):
    slot = new(interrupted, 64)
    step = interrupted.step([slot])
    step.__enter__()
    interrupted.driver.during = "fence"
    with pytest.raises(KeyboardInterrupt):
        step.__exit__(None, None, None)
    interrupted.release(slot)
    assert interrupted.acquire(slot) == slot


@pytest.mark.parametrize("where", ["before it is left", "after it was left"])
def test_a_handler_that_raises_around_the_leaving_of_a_step_does_not_leave_it_open(cache, monkeypatch, where):
    slot = new(cache, 64)
    leave = Steps._leave

    def interrupted(*arguments):
        monkeypatch.undo()
        if where == "after it was left":
            leave(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Steps, "_leave", interrupted)
    with pytest.raises(KeyboardInterrupt), cache.step([slot]):
        pass
    cache.release(slot)
    assert cache.acquire(slot) == slot


def test_a_step_that_nobody_left_is_over_when_its_work_is(cache, driver):
    """As where a handler raised when nothing but the leaving was left to do: where its work went is not known then."""
    slot = new(cache, 64)
    step = cache.step([slot])
    with driver.stream(1):
        step.__enter__()
        launch_fill(cache, slot, 0, 64, 1.0)
    del step
    cache.release(slot)
    cache.trim()  # the fill would fault on an unmapped page
    assert driver.streams[1].num_done == len(driver.streams[1].queue)
    assert cache.acquire(slot) == slot


def test_an_exception_on_its_way_through_an_open_step_closes_the_cache(cache, driver):
    slot = new(cache, 64)
    step = cache.step([slot])
    step.__enter__()
    launch_fill(cache, slot, 0, 64, 1.0)
    with pytest.raises(SystemExit), cache:
        raise SystemExit
    with pytest.raises(vattn.ConfigError, match="closed"):
        cache.stats()
    step.__exit__(None, None, None)


@pytest.mark.parametrize("when", ["during", "handler restored"])
@pytest.mark.parametrize("what", ["acquire", "fork"])
def test_ctrl_c_at_the_very_end_gives_the_slot_back(cache, monkeypatch, what, when):
    """The caller never sees it."""
    slot = new(cache, 64)
    owner, name = {"during": (cache._slots, "start"), "handler restored": (signal, "signal")}[when]
    original = getattr(owner, name)

    def interrupt(*arguments):
        result = original(*arguments)
        if when == "during" or arguments[1] is signal.default_int_handler:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.acquire() if what == "acquire" else cache.fork(slot)
    assert cache.stats().num_live_slots == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    cache.check_integrity()


def test_ctrl_c_during_fork_leaves_no_slot_behind(interrupted):
    slot = new(interrupted, 64)
    interrupted.driver.during = "map"
    with pytest.raises(KeyboardInterrupt):
        interrupted.fork(slot)
    assert interrupted.stats().num_live_slots == 1
    interrupted.check_integrity()


def test_ctrl_c_during_ensure_batch_comes_after_all_of_it(interrupted):
    slots = [new(interrupted, 10), new(interrupted, 64)]
    interrupted.driver.during = "map"
    with pytest.raises(KeyboardInterrupt):
        interrupted.ensure_batch(slots, [20, 128])
    assert [interrupted.seq_len(slot) for slot in slots] == [20, 128]


class CollectingDriver(StreamDriver):
    """The collector runs in the middle of a call, once."""

    during: str | None = None

    def _map_batch(self, *arguments):
        if self.during == "map":
            self.during = None
            assert gc.isenabled(), "the collector is every thread's: nobody may put it off"
            gc.collect()
        return super()._map_batch(*arguments)


class Finalised:
    """In a cycle, so that the collector ends it; what its finaliser raises is noted."""

    def __init__(self, end):
        self.end, self.me, self.raised = end, self, []

    def __del__(self):
        try:
            self.end()
        except Exception as error:
            self.raised.append(error)


@pytest.fixture
def collecting():
    driver = CollectingDriver()
    with vattn.KVCache(LAYOUT, 4, memory_limit=64 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        yield cache


def test_a_finaliser_in_the_middle_of_an_operation_has_its_way_after_it(collecting):
    slot, dead = new(collecting, 64), new(collecting, 64)
    Finalised(lambda: collecting.release(dead))
    collecting.driver.during = "map"
    collecting.ensure(slot, 128)
    assert collecting.driver.during is None
    assert collecting.stats().num_live_slots == 1
    assert collecting.seq_len(slot) == 128
    collecting.check_integrity()


def test_a_finaliser_may_close_the_cache_that_it_interrupts(collecting):
    slot = new(collecting, 64)
    Finalised(collecting.close)
    collecting.driver.during = "map"
    collecting.ensure(slot, 128)
    with pytest.raises(vattn.ConfigError, match="closed"):
        collecting.stats()
    assert not collecting.driver.book.handles


def test_a_finaliser_in_the_middle_of_an_operation_can_do_nothing_else(collecting):
    """It would find half of it done."""
    slot = new(collecting, 64)
    raised = Finalised(collecting.acquire).raised
    collecting.driver.during = "map"
    collecting.ensure(slot, 128)
    assert [type(error) for error in raised] == [vattn.ConfigError]
    assert "in the middle of another operation" in str(raised[0])
    assert collecting.stats().num_live_slots == 1


def test_a_step_that_the_collector_ends_is_left_after_the_operation(collecting):
    slot, dead = new(collecting, 64), new(collecting, 64)
    cycle = [collecting.step([dead])]
    cycle[0].__enter__()
    cycle.append(cycle)
    del cycle
    collecting.driver.during = "map"
    collecting.ensure(slot, 128)
    collecting.release(dead)
    assert collecting.acquire(dead) == dead


def test_another_cache_that_the_collector_ends_goes_after_the_operation(collecting):
    other = vattn.KVCache(LAYOUT, 2, memory_limit=64 * PAGE, page_bytes=PAGE, driver=StreamDriver())
    driver, cycle = other.driver, [other]
    new(other, 64)
    cycle.append(cycle)
    del cycle, other
    slot = new(collecting, 64)
    collecting.driver.during = "map"
    collecting.ensure(slot, 128)
    assert not driver.book.ranges
