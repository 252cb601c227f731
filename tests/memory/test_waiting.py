"""While one thread waits for the GPU, others use the cache; and what it finds when it comes back."""

from __future__ import annotations

import threading

import pytest
from helpers.watchful_driver import PAGE, WatchfulDriver, launch, new, num_left, watched_cache

import vattn


@pytest.fixture
def driver():
    return WatchfulDriver()


@pytest.fixture
def cache(driver):
    with watched_cache(driver) as cache:
        yield cache


def blocks(cache: vattn.KVCache, other: int) -> list[bool]:
    """Work on the current stream during which another thread calls the cache; whether it came through."""
    found: list[bool] = []

    def work() -> None:
        thread = threading.Thread(target=cache.ensure, args=(other, 1), daemon=True)
        thread.start()
        thread.join(5)
        found.append(not thread.is_alive())

    cache.driver.launch(work)
    return found


@pytest.mark.parametrize(
    "operation", ["truncate", "truncate in use elsewhere", "trim", "ensure", "make_writable", "fork"]
)
def test_others_use_the_cache_while_one_waits_for_the_gpu(cache, driver, operation):
    other = new(cache, 1)
    if operation == "make_writable":
        slot = new(cache, 64)
        cache.fork(slot)
    elif operation == "fork":  # into a slot whose parked pages have to go first
        parent, slot = new(cache, 64), new(cache, 64)
    else:
        slot = new(cache, 128)
    with driver.stream(1 if operation == "truncate in use elsewhere" else 0), cache.step([slot]):
        found = blocks(cache, other)
    if operation.startswith("truncate"):
        cache.truncate(slot, 0)
    elif operation == "trim":
        cache.release(slot)
        assert cache.trim() == 2 * PAGE
    elif operation == "ensure":  # of the four pages one is other's, two are the slot's
        cache.release(slot)
        cache.ensure(cache.acquire(5), 3 * 64)
    elif operation == "make_writable":
        cache.make_writable(slot, 0, 1)
    else:
        cache.release(slot)
        cache.fork(parent, into=slot)
    assert found == [True]
    assert driver.num_waits >= 1


def test_trim_waits_for_one_after_another(cache, driver):
    other = new(cache, 1)
    found = []
    for slot in (3, 4, 5):  # more than an operation leaves the cache for
        new(cache, 64, slot)
        with driver.stream(slot), cache.step([slot]):
            found.append(blocks(cache, other))
        cache.release(slot)
    assert cache.trim() == 3 * PAGE
    assert found == [[True]] * 3


def test_new_work_of_others_does_not_keep_one_waiting_for_ever(cache, driver):
    """Each time that it has waited there is more; in the end it waits where no more can come."""
    slot = new(cache, 128)
    threads: list[threading.Thread] = []
    end = threading.Event()

    def again() -> None:
        if len(threads) < 100 and not end.is_set():
            threads.append(threading.Thread(target=submit))
            threads[-1].start()
            threads[-1].join(0.2)  # it cannot, once the lock is kept

    def submit() -> None:
        with cache.step([slot]):
            driver.launch(again)

    submit()
    cache.truncate(slot, 0)
    end.set()
    for thread in threads:
        thread.join()
    assert 1 < len(threads) < 10


@pytest.mark.parametrize("operation", ["truncate", "ensure", "ensure_batch", "make_writable", "fork"])
def test_a_slot_that_has_changed_hands_meanwhile_is_let_be(cache, driver, operation):
    slot, other = new(cache, 64), new(cache, 64)
    cache.fork(slot, into=5)  # so that growing past a cut and writing take copies

    def change_hands() -> None:
        cache.release(slot)
        cache.ensure(cache.acquire(slot), 10)

    if operation == "fork":
        with driver.stream(1), cache.step([other]):
            driver.launch(change_hands)
        cache.release(other)
    else:
        cache.truncate(slot, 20)
        with cache.step([slot]):
            driver.launch(change_hands)
    with pytest.raises(vattn.ConfigError, match=f"slot {slot} holds no sequence"):
        {
            "truncate": lambda: cache.truncate(slot, 0),
            "ensure": lambda: cache.ensure(slot, 30),
            "ensure_batch": lambda: cache.ensure_batch([slot], [30]),
            "make_writable": lambda: cache.make_writable(slot, 0, 10),
            "fork": lambda: cache.fork(slot, into=other),
        }[operation]()
    assert cache.seq_len(slot) == 10
    cache.check_integrity()


def test_truncate_waits_for_what_was_on_the_stream_when_it_began(cache, driver):
    slot = new(cache, 128)
    with driver.stream(1), cache.step([slot]):
        driver.launch(lambda: driver.streams[0].queue.append(lambda: None))  # another thread's, on the caller's stream
    cache.truncate(slot, 0)
    assert num_left(driver, 0) == 1


def test_fork_waits_for_the_pages_in_its_way_and_not_for_the_callers_stream(cache, driver):
    parent, slot = new(cache, 64), new(cache, 64)
    with driver.stream(1), cache.step([slot]):
        found = launch(cache, slot, 64)
    with driver.stream(1):
        cache.release(slot)
    driver.run(0)
    driver.launch(lambda: None)
    assert cache.fork(parent, into=slot) == slot
    assert found == [True]
    assert num_left(driver, 0) == 1
