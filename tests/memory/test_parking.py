"""What a released sequence leaves mapped: who takes it over, what they see, and how it is had back."""

from __future__ import annotations

import pytest
import torch
from helpers.failing_driver import FailingDriver

import vattn
from vattn.driver import open_driver

TOKENS_PER_PAGE = 16  # of this layout, at 2 MiB
LAYOUT = vattn.KVLayout(num_layers=4, num_kv_heads=4, head_dim=1024, max_seq_len=640, dtype=torch.float32)
PAGE = TOKENS_PER_PAGE * LAYOUT.bytes_per_token


def open_cache(device: str, pages: int = 64, slots: int = 8, **options: object) -> vattn.KVCache:
    return vattn.KVCache(LAYOUT, slots, device=device, memory_limit=pages * PAGE, **options)  # type: ignore[arg-type]


@pytest.fixture
def cache(device):
    with open_cache(device) as cache:
        yield cache
        cache.check_integrity()


def fill(cache: vattn.KVCache, slot: int, value: float) -> None:
    for layer in LAYOUT.layers:
        for tensor in cache.rows(slot, layer):
            tensor.fill_(value)


def new(cache: vattn.KVCache, pages: int, slot: int | None = None, value: float = torch.nan) -> int:
    slot = cache.acquire(slot)
    cache.ensure(slot, pages * TOKENS_PER_PAGE)
    fill(cache, slot, value)
    return slot


def is_all(cache: vattn.KVCache, slot: int, value: float) -> bool:
    return all((tensor == value).all() for layer in LAYOUT.layers for tensor in cache.rows(slot, layer))


def park(cache: vattn.KVCache, *sizes: int) -> None:
    """Leave so many pages in slots 0, 1, …, the first the least recently, with no work left that may touch them.

    Those still in use come last where pages are short, and are waited for: other pages go, and other calls are made.
    """
    for slot, pages in enumerate(sizes):
        new(cache, pages, slot)
    for slot in range(len(sizes)):
        cache.release(slot)
    cache.driver.synchronize()


def pages(cache: vattn.KVCache) -> tuple[int, int, int]:
    """(in use, parked, free), which are all there are."""
    stats = cache.stats()
    counts = stats.in_use_bytes // PAGE, stats.parked_bytes // PAGE, stats.free_bytes // PAGE
    assert sum(counts) * PAGE == stats.physical_bytes
    return counts


# -- taking over ------------------------------------------------------------------------------------------------------
def test_the_next_sequence_of_a_slot_takes_its_pages_over_and_reads_zeros(cache):
    slot = new(cache, 5)
    before = cache.stats()
    cache.release(slot)
    assert pages(cache) == (0, 5, 0)
    assert cache.acquire() == slot
    assert pages(cache) == (0, 5, 0)
    cache.ensure(slot, 5 * TOKENS_PER_PAGE)
    assert is_all(cache, slot, 0)
    assert cache.stats().num_driver_calls == before.num_driver_calls
    assert cache.stats().num_adopted == 5
    assert pages(cache) == (5, 0, 0)


def test_growing_into_the_pages_behind_takes_no_driver_call_until_they_end(cache):
    cache.release(new(cache, 5))
    slot = cache.acquire()
    before = cache.stats().num_driver_calls
    for rows in range(1, 5 * TOKENS_PER_PAGE + 1):
        cache.ensure(slot, rows)
        if rows == 1:
            assert pages(cache) == (1, 4, 0)
        assert is_all(cache, slot, 0)
        assert cache.stats().waste_bytes < PAGE
        if rows % TOKENS_PER_PAGE == 0:
            cache.check_integrity()
    assert cache.stats().num_driver_calls == before
    cache.ensure(slot, 6 * TOKENS_PER_PAGE)
    assert cache.stats().num_driver_calls == before + 3  # create, map, set_access


def test_rows_that_kernels_read_past_the_end_are_clean(device):
    with open_cache(device, over_read_tokens=20) as cache:
        cache.release(new(cache, 6))
        slot = cache.acquire()
        cache.ensure(slot, 1)
        assert not cache.k(2)[slot, :21].any()
        cache.check_integrity()


def test_truncate_leaves_what_is_parked_behind_a_sequence(cache):
    cache.release(new(cache, 6))
    slot = new(cache, 3, 0)
    before = cache.stats().num_driver_calls
    cache.truncate(slot, 40)
    assert cache.stats().num_driver_calls == before
    cache.truncate(slot, 5)
    assert pages(cache) == (1, 3, 2)
    cache.check_integrity()
    cache.ensure(slot, 6 * TOKENS_PER_PAGE)
    assert cache.stats().num_create == 6
    assert not cache.rows(slot, 0)[0][16:].any()


def test_acquire_takes_the_best_fit(cache):
    park(cache, 5, 2, 9, 9)
    for rows, best in ((None, 2), (0, 2), (1, 1), (32, 1), (33, 0), (80, 0), (81, 2), (640, 2)):
        assert cache.acquire(expect_len=rows) == best, f"{rows} rows"
        cache.release(best)
    assert cache.acquire(6, expect_len=33) == 6
    assert [cache.acquire() for _ in range(7)] == [2, 3, 0, 1, 4, 5, 7]


def test_pages_that_truncate_took_count_no_longer(cache):
    cache.release(new(cache, 9, 0))
    slot = new(cache, 9, 0)
    cache.truncate(slot, 1)
    cache.release(slot)
    cache.release(new(cache, 3, 1))
    assert cache.acquire(expect_len=144) == 1
    assert cache.acquire(expect_len=144) == 0


@pytest.mark.parametrize("wrong", [-1, 641, 1.5, "1"])
def test_acquire_refuses_impossible_lengths(cache, wrong):
    with pytest.raises(vattn.ConfigError):
        cache.acquire(expect_len=wrong)
    assert cache.stats().num_live_slots == 0


# -- having it back ---------------------------------------------------------------------------------------------------
def test_the_limit_takes_parked_pages_oldest_slot_first_from_its_end(device):
    with open_cache(device, pages=8) as cache:
        park(cache, 3, 3)
        slot = new(cache, 4, 5)
        assert pages(cache) == (4, 4, 0)
        assert cache.stats().num_unparked == 2
        before = cache.stats().num_map
        new(cache, 1, 0)
        new(cache, 3, 1)
        assert cache.stats().num_map == before  # the rest is where it was
        assert pages(cache) == (8, 0, 0)
        assert cache.stats().num_create == 8
        fill(cache, slot, 1)
        cache.check_integrity()


def test_all_that_is_parked_can_be_had(device):
    with open_cache(device, pages=8) as cache:
        park(cache, 1, 3, 2, 2)
        slot = cache.acquire(7)
        cache.ensure(slot, 8 * TOKENS_PER_PAGE)
        assert is_all(cache, slot, 0)
        assert pages(cache) == (8, 0, 0)
        cache.check_integrity()


def test_a_request_that_would_not_fit_anyway_leaves_everything_parked(device):
    with open_cache(device, pages=8) as cache:
        park(cache, 3)
        other = new(cache, 4, 5)
        before = cache.stats().as_dict()
        with pytest.raises(vattn.OutOfPages) as caught:
            cache.ensure(cache.acquire(6), 5 * TOKENS_PER_PAGE)
        assert (caught.value.asked_bytes, caught.value.free_bytes) == (5 * PAGE, 4 * PAGE)
        cache.release(6)
        with pytest.raises(vattn.OutOfPages) as caught:  # though three of its five pages are there
            cache.ensure(cache.acquire(0), 5 * TOKENS_PER_PAGE)
        assert (caught.value.asked_bytes, caught.value.free_bytes) == (5 * PAGE, 4 * PAGE)
        cache.release(0)
        assert cache.stats().as_dict() == before | {"num_oom": 2}
        cache.ensure(other, 8 * TOKENS_PER_PAGE)
        cache.check_integrity()


def test_a_sequence_keeps_what_it_takes_over_when_more_is_needed(device):
    with open_cache(device, pages=8) as cache:
        park(cache, 3, 5)  # slot 0 is the one released least recently
        slot = cache.acquire(0)
        before = cache.stats().num_map
        cache.ensure(slot, 4 * TOKENS_PER_PAGE)
        assert cache.stats().num_map == before + 1
        assert pages(cache) == (4, 4, 0)


def test_trim_gives_parked_pages_back_too(cache):
    park(cache, 3, 2)
    slot = new(cache, 1, 0, value=5)
    assert pages(cache) == (1, 4, 0)
    assert cache.trim(keep_bytes=PAGE) == 3 * PAGE
    assert pages(cache) == (1, 0, 1)
    assert cache.trim() == PAGE
    assert is_all(cache, slot, 5)
    cache.check_integrity()
    cache.ensure(slot, 40)


@pytest.mark.parametrize("call", ["create", "map", "set_access"])
def test_a_device_that_runs_short_takes_parked_pages(device, call):
    driver = FailingDriver(open_driver(device))
    with open_cache(device, driver=driver) as cache:
        park(cache, 4, 2)
        driver.fail(call, at=2, out_of_memory=True)
        slot = cache.acquire(7)
        cache.ensure(slot, 3 * TOKENS_PER_PAGE)
        assert is_all(cache, slot, 0)
        assert cache.stats().num_oom == 0
        assert pages(cache)[:2] == ((3, 3) if call == "create" else (3, 0))
        cache.check_integrity()


def test_a_failing_unmap_loses_nothing_that_is_parked(device):
    driver = FailingDriver(open_driver(device))
    with open_cache(device, pages=8, driver=driver) as cache:
        park(cache, 3, 5)
        slot = cache.acquire(7)
        driver.fail("unmap", at=2)
        with pytest.raises(vattn.DriverError, match="unmap"):
            cache.ensure(slot, 5 * TOKENS_PER_PAGE)
        assert pages(cache) == (0, 5, 3)
        cache.check_integrity()
        cache.ensure(slot, 5 * TOKENS_PER_PAGE)
        assert pages(cache) == (5, 3, 0)
        cache.check_integrity()


# -- sharing ----------------------------------------------------------------------------------------------------------
def test_a_page_is_not_shared_with_a_released_sequence(cache):
    parent = new(cache, 4, value=5)
    child = cache.fork(parent)
    cache.release(child)
    stats = cache.stats()
    assert (stats.shared_bytes, stats.in_use_bytes, stats.parked_bytes) == (0, 4 * PAGE, 0)
    cache.make_writable(parent, 0, 40)
    assert cache.stats().num_copy == 0
    fill(cache, parent, 6)
    assert cache.acquire(child) == child
    cache.ensure(child, 64)
    assert is_all(cache, child, 0)
    fill(cache, child, 7)
    assert is_all(cache, parent, 6)


def test_a_parked_alias_is_replaced_not_written(cache):
    parent = new(cache, 4, value=5)
    child = cache.fork(parent)
    cache.release(child)
    cache.acquire(child)
    cache.ensure(child, 64)
    assert is_all(cache, child, 0)
    fill(cache, child, 7)
    assert is_all(cache, parent, 5)
    assert pages(cache) == (8, 0, 0)


def test_growing_over_a_page_shared_only_with_a_released_sequence_takes_no_page(device):
    with open_cache(device, pages=2) as cache:
        parent = new(cache, 2, value=5)
        child = cache.fork(parent)
        cache.truncate(parent, 5)
        cache.release(child)
        cache.ensure(parent, 32)
        assert (cache.rows(parent, 0)[0][:5] == 5).all()
        assert cache.stats().num_copy == 0
        assert pages(cache) == (2, 0, 0)
        cache.check_integrity()


def test_parked_aliases_of_one_page_go_to_their_sequences_as_different_pages(cache):
    parent = new(cache, 3, value=5)
    family = [parent, cache.fork(parent), cache.fork(parent)]
    for slot in family:
        cache.release(slot)
    assert pages(cache) == (0, 3, 0)
    for slot in family:
        cache.acquire(slot)
    cache.ensure_batch(family, [48] * 3)
    assert pages(cache) == (9, 0, 0)
    cache.check_integrity()
    for value, slot in enumerate(family):
        assert is_all(cache, slot, 0)
        fill(cache, slot, value)
    assert [is_all(cache, slot, value) for value, slot in enumerate(family)] == [True] * 3


def test_growing_over_a_page_that_nobody_has_takes_its_aliases_away_and_nothing_else(cache):
    parent = new(cache, 3)
    child = cache.fork(parent)
    cache.release(child)
    cache.release(parent)
    before = cache.stats()
    cache.ensure(cache.acquire(parent), 48)
    after = cache.stats()
    assert is_all(cache, parent, 0)
    assert (after.num_create, after.num_map) == (before.num_create, before.num_map)
    assert after.mapped_bytes == 3 * PAGE
    assert pages(cache) == (3, 0, 0)


def test_the_last_page_of_the_limit_may_be_parked_twice(device):
    with open_cache(device, pages=3) as cache:
        parent = new(cache, 3)
        child = cache.fork(parent)
        cache.release(parent)
        cache.release(child)
        cache.ensure(cache.acquire(child), 48)
        assert is_all(cache, child, 0)
        assert pages(cache) == (3, 0, 0)
        cache.check_integrity()


def test_forking_into_the_same_slot_again_finds_the_pages_there(cache):
    parent = new(cache, 4, value=5)
    child = cache.fork(parent)
    before = cache.stats().num_driver_calls
    for _ in range(3):
        cache.release(child)
        assert cache.fork(parent, into=child) == child
        assert is_all(cache, child, 5)
        assert cache.stats().shared_bytes == 4 * PAGE
    assert cache.stats().num_driver_calls == before


def test_a_fork_over_parked_pages_keeps_those_past_the_shared_rows(cache):
    cache.release(new(cache, 6, 3))
    parent = new(cache, 4, 0, value=5)
    before = cache.stats()
    child = cache.fork(parent, 56, into=3)
    assert is_all(cache, child, 5)
    cache.ensure(child, 6 * TOKENS_PER_PAGE)
    k = cache.rows(child, 2)[0]
    assert (k[:56] == 5).all()
    assert not k[56:].any()
    after = cache.stats()
    assert after.num_create == before.num_create
    assert after.num_map - before.num_map == after.shared_bytes // PAGE == 3
    assert pages(cache) == (7, 0, 3)
    assert cache.fork(parent) == 1  # an empty one, where nothing is in the way


# -- integrity --------------------------------------------------------------------------------------------------------
def corrupt_clean(cache):
    next(iter(cache._slots.parking.pages_of(0)))[1].dirty = False


def corrupt_forgotten(cache):
    cache._slots.parking.fences.clear()


def corrupt_nobodys(cache):
    cache._slots.parking._tops[:] -= 1


def corrupt_owned(cache):
    cache._slots.table.lanes[0].ends[0] = 1


def corrupt_retired(cache):
    cache._slots.state[0] = 2


@pytest.mark.parametrize("corrupt", [corrupt_clean, corrupt_forgotten, corrupt_nobodys, corrupt_owned, corrupt_retired])
def test_check_integrity_sees(device, corrupt):
    with open_cache(device) as cache:
        park(cache, 2)
        cache.check_integrity()
        corrupt(cache)
        with pytest.raises(AssertionError):
            cache.check_integrity()
