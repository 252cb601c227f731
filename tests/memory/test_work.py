"""A page stays as it is until its fences are passed: all work that could touch it, submitted or scheduled, no other.

On streams where nothing runs until it must. Work looks whether its pages are there, so that a page taken too early is a
failed assertion, not a fault.
"""

from __future__ import annotations

import pytest
import torch
from helpers.watchful_driver import WatchfulDriver, launch, new, num_left, watched_cache

import vattn


@pytest.fixture
def driver():
    return WatchfulDriver()


@pytest.fixture
def cache(driver):
    with watched_cache(driver) as cache:
        yield cache


# -- work that was submitted ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["release in the step", "release after the step", "no step"])
def test_reclaiming_waits_for_the_work_on_its_pages_and_for_no_other(cache, driver, end):
    """Fails if the wait is left out, and if it is a synchronisation with the whole device."""
    slot, other = new(cache, 128), cache.acquire()
    with driver.stream(2):
        driver.launch(lambda: None)  # a long prefill elsewhere
    with driver.stream(1):
        if end == "no step":
            found = launch(cache, slot, 128, torch.nan)
            cache.release(slot)
        else:
            with cache.step([slot]):
                found = launch(cache, slot, 128, torch.nan)
                if end == "release in the step":
                    cache.release(slot)
            if end == "release after the step":
                cache.release(slot)
    assert driver.num_waits == 0
    cache.ensure(other, 4 * 64)
    assert found == [True], "a page was unmapped before the work on it had ended"
    assert num_left(driver, 2) == 1, "the host waited for work that has nothing to do with the pages"
    driver.synchronize()
    assert not cache.rows(other, 0)[0].any()


def test_reclaiming_takes_pages_whose_work_has_ended_first(cache, driver):
    busy, idle, other = new(cache, 128), new(cache, 64), cache.acquire()
    with driver.stream(1), cache.step([busy]):
        found = launch(cache, busy, 128)
        cache.release(busy)  # first, but its work is not done
    cache.release(idle)
    driver.run(0)
    cache.ensure(other, 2 * 64)
    assert driver.num_waits == 0
    assert found == []
    cache.ensure(other, 3 * 64)
    assert found == [True]


def test_what_is_parked_behind_a_sequence_does_not_wait_for_that_ones_work(cache, driver):
    cache.release(new(cache, 192))
    slot, other = new(cache, 64), cache.acquire()
    driver.synchronize()
    with driver.stream(1), cache.step([slot]):
        found = launch(cache, slot, 64)
    cache.ensure(other, 3 * 64)  # takes the two pages behind the first sequence's
    assert found == []
    driver.run(1)
    assert found == [True]


def test_scrubbing_for_a_new_owner_comes_behind_the_last_ones_work_without_the_host(cache, driver):
    slot = new(cache, 128)
    with driver.stream(1), cache.step([slot]):
        found = launch(cache, slot, 128, torch.nan)
        cache.release(slot)
    with driver.stream(2):
        assert cache.acquire(slot) == slot
        cache.ensure(slot, 128)
    assert driver.num_waits == 0
    assert found == []
    driver.run(2)
    assert found == [True]
    assert not cache.rows(slot, 0)[0].any()


def test_a_new_owner_on_a_third_stream_comes_behind_the_scrubbing(cache, driver):
    slot = new(cache, 64)
    with driver.stream(1), cache.step([slot]):
        launch(cache, slot, 64, torch.nan)
        cache.release(slot)
    with driver.stream(2):
        cache.acquire(slot)
        cache.ensure(slot, 64)
    with driver.stream(3), cache.step([slot]):
        launch(cache, slot, 10, 7.0)
    driver.run(3)
    driver.synchronize()
    assert cache.rows(slot, 0)[0][:, 0, 0].tolist() == [7.0] * 10 + [0.0] * 54


def test_a_fork_over_parked_pages_comes_behind_the_work_on_them(cache, driver):
    parent, slot = new(cache, 100), new(cache, 128)
    with driver.stream(1), cache.step([slot]):
        found = launch(cache, slot, 128, torch.nan)
        cache.release(slot)
    with driver.stream(2):
        driver.launch(lambda: None)  # a long prefill elsewhere
    cache.fork(parent, into=slot)  # unmaps the first of its pages, and copies into the second
    assert found == [True]
    assert num_left(driver, 2) == 1
    cache.ensure(slot, 128)
    driver.synchronize()
    assert not cache.rows(slot, 0)[0].any()


def test_a_page_that_becomes_private_waits_for_the_released_sharers_work(cache, driver):
    parent = new(cache, 64)
    child = cache.fork(parent)
    with driver.stream(1), cache.step([child]):
        found = launch(cache, child, 64)
        cache.release(child)
    assert found == []
    cache.make_writable(parent, 0, 64)
    assert found == [True]
    assert cache.stats().num_copy == 0


def test_a_copy_from_a_page_is_work_on_it(cache, driver):
    parent = new(cache, 64)
    launch(cache, parent, 64, 7.0)
    children = [cache.fork(parent), cache.fork(parent)]
    with driver.stream(1):
        cache.make_writable(children[0], 0, 64)  # the copy, from one of the others' addresses, is queued
    with driver.stream(2):
        cache.release(parent)
        cache.release(children[1])
        cache.ensure(cache.acquire(5), 3 * 64)  # needs what they left
    driver.synchronize()
    assert (cache.rows(children[0], 0)[0] == 7).all()


def test_a_copy_is_not_made_from_where_a_page_is_parked(cache, driver):
    parent = new(cache, 64)
    launch(cache, parent, 64, 7.0)
    parked, child = cache.fork(parent), cache.fork(parent)
    cache.release(parked)
    driver.synchronize()
    with driver.stream(1):
        cache.make_writable(parent, 0, 64)
    cache.trim()  # the parked alias goes, whose work has ended; the copy is still to come
    assert num_left(driver, 1)
    driver.synchronize()
    assert (cache.rows(parent, 0)[0] == 7).all()
    assert cache.seq_len(child) == 64


# -- work that is scheduled -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("outer", [False, True])
def test_pages_of_a_step_whose_launch_is_still_to_come_are_out_of_reach(cache, driver, outer):
    """No synchronisation would see this work: it is in no stream yet."""
    slot, other = new(cache, 192), cache.acquire()
    with driver.stream(1):
        scheduled = cache.step([slot])
        scheduled.__enter__()
        if outer:  # another step on the slot begins and ends in between
            with driver.stream(2), cache.step([slot]):
                pass
    cache.release(slot)
    driver.synchronize()
    with pytest.raises(vattn.OutOfSlots):
        cache.acquire(slot)
    with pytest.raises(vattn.OutOfPages):
        cache.ensure(other, 128)
    assert cache.trim() == 0
    with driver.stream(1):
        found = launch(cache, slot, 192, torch.nan)
        scheduled.__exit__(None, None, None)
    assert found == []
    cache.ensure(other, 256)
    assert found == [True]
    driver.synchronize()
    assert not cache.rows(other, 0)[0].any()


def test_a_shared_page_is_copied_while_a_released_sharers_step_is_open(cache, driver):
    parent = new(cache, 64)
    launch(cache, parent, 64, 7.0)
    child = cache.fork(parent)
    seen = []
    with driver.stream(1), cache.step([child]):
        cache.release(child)
        with driver.stream(0):
            cache.make_writable(parent, 0, 64)
            launch(cache, parent, 64, 9.0)
        view = cache.k(0)[child, :64]
        driver.launch(lambda: seen.append((view == 7).all().item()))
    assert cache.stats().num_copy == 1
    driver.run(0)
    driver.run(1)
    assert seen == [True]
    assert (cache.rows(parent, 0)[0] == 9).all()


# -- copies ----------------------------------------------------------------------------------------------------------
def test_a_copy_holds_up_nobody_who_has_no_part_in_it(cache, driver):
    """A fork in the middle of a page, behind a long prefill on its stream; a decode step of another slot goes on."""
    parent, other = new(cache, 30), new(cache, 10)
    with driver.stream(2):
        driver.launch(lambda: None)  # the prefill
        child = cache.fork(parent)
    with driver.stream(1):
        with cache.step([other]):
            launch(cache, other, 10)
        driver.run(1)
        assert num_left(driver, 2) > 0, "the step waited for another sequence's copy"
        with cache.step([child]):
            launch(cache, child, 30)
        driver.run(1)
        assert num_left(driver, 2) == 0, "the child's step did not wait for the copy of its page"


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("copying", ["make_writable", "fork"])
def test_whoever_has_a_page_that_is_copied_waits_for_the_copy(cache, driver, copying, index):
    """The last one to have it will write to it in place, and need not be the one whose address it was copied from."""
    first = new(cache, 64)
    second, third = cache.fork(first), cache.fork(first)
    driver.synchronize()
    with driver.stream(2):
        if copying == "fork":
            cache.fork(third, 10)  # a part of the page
        else:
            cache.make_writable(third, 0, 1)
        assert num_left(driver, 2) > 0
    with driver.stream(1), cache.step([(first, second)[index]]):
        launch(cache, first, 64)
    driver.run(1)
    assert num_left(driver, 2) == 0, "it did not wait for the copy of its page"


# -- mapping ahead ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["parked", "cut short", "alias"])
def test_mapping_ahead_does_not_wait(cache, driver, how):
    """It has a turn that others wait for. What it does not get it gets when the GPU is done."""
    busy, other = new(cache, 128), cache.acquire()
    if how == "alias":  # its pages are parked twice, once behind work that is under way
        child = cache.fork(busy)
        cache.release(busy)
        busy = child
    with driver.stream(1), cache.step([busy]):
        launch(cache, busy, 128)
        if how == "cut short":
            cache.truncate(busy, 0)
        else:
            cache.release(busy)
    with pytest.raises(vattn.OutOfPages):
        cache.ensure_batch([other], [4 * 64], wait=False)
    assert driver.num_waits == 0
    assert cache.stats().num_oom == 0
    driver.synchronize()
    cache.ensure_batch([other], [4 * 64], wait=False)
    assert driver.num_waits == 0
