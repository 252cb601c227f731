"""Pages of several sizes: which ones, what they save, and what happens where a sequence is cut inside one."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import accumulate

import pytest
import torch
from helpers.failing_driver import FailingDriver
from helpers.stream_driver import StreamDriver

import vattn
from vattn.driver import HostDriver, LedgerDriver
from vattn.memory.page_sizes import PageSizes

PAGE = 4096
LAYOUT = vattn.KVLayout(1, 1, 128, 2000, torch.float32)  # four rows to a page
LIMIT = 512


def open_cache(driver=None, max_page_bytes: int | None = 32 * PAGE, limit: int = LIMIT, **options) -> vattn.KVCache:
    return vattn.KVCache(
        LAYOUT,
        6,
        "cpu",
        limit * PAGE,
        page_bytes=PAGE,
        max_page_bytes=max_page_bytes,
        driver=driver,
        **options,
    )


def new(cache: vattn.KVCache, pages: int) -> int:
    slot = cache.acquire()
    cache.ensure(slot, 4 * pages)
    mark(cache, slot)
    return slot


def mark(cache: vattn.KVCache, slot: int) -> None:
    k, v = cache.rows(slot, 0)
    k[:] = v[:] = torch.arange(len(k), dtype=torch.float32)[:, None, None] + 1


def check_marked(cache: vattn.KVCache, slot: int) -> None:
    for tensor in cache.rows(slot, 0):
        assert torch.equal(tensor[:, 0, 0], torch.arange(len(tensor), dtype=torch.float32) + 1)


def sizes_of(cache: vattn.KVCache, slot: int) -> list[int]:
    """Of the pages that are mapped in the slot, in order."""
    start = cache.k(0)[slot].data_ptr()
    end = start + cache.k(0).stride(0) * 4
    mappings = cache.driver.book.mappings
    return [mappings[address].size_bytes // PAGE for address in sorted(mappings) if start <= address < end]


def in_use(cache: vattn.KVCache) -> int:
    return cache.stats().in_use_bytes // PAGE


# -- which -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("largest", [1, 2, 32, 1024])
def test_pages_cover_exactly_what_is_asked_for_and_are_small_against_what_lies_before_and_behind(largest):
    sizes = PageSizes(largest)
    for first in (*range(80), 128, 1000, 1024):
        for end in (*range(first + 1, first + 140), first + 2048):
            cover = sizes.cover(first, end)
            starts = [first, *accumulate(cover, initial=first)][1:-1]
            assert sum(cover) == end - first
            for start, size in zip(starts, cover, strict=True):
                assert size == 1 or (4 * size <= start and start + 2 * size <= end and size <= largest)
                assert start % size == 0
                assert size & (size - 1) == 0


def test_a_gigabyte_takes_a_twelfth_of_the_pages():
    assert len(PageSizes(32).cover(0, 512)) == 41
    assert Counter(PageSizes(32).cover(0, 1024))[32] == 27


@pytest.mark.parametrize("largest", [1, 2, 8, 32])
def test_a_cut_leaves_no_more_of_a_page_than_is_said(largest):
    sizes = PageSizes(largest)
    for end in (*range(1, 150), 512, 1024):
        starts = [0, *accumulate(sizes.cover(0, end))]
        for cut in range(end + 1):
            assert cut - max(start for start in starts if start <= cut) <= sizes.most_cut(cut) < max(largest, 1)


@pytest.mark.parametrize(
    ("options", "largest"),
    [({}, 2 << 20), ({"page_bytes": 2 << 20}, 2 << 20), ({"page_bytes": 2 << 20, "max_page_bytes": 8 << 20}, 8 << 20)],
)
def test_a_page_size_that_is_given_is_the_only_one(options, largest):
    with vattn.KVCache(LAYOUT, 1, driver=LedgerDriver(1 << 30), memory_limit=1 << 30, **options) as cache:
        assert cache.max_page_bytes == largest


@pytest.mark.parametrize("wrong", [0, PAGE - 1, PAGE + 1, 3 * PAGE, PAGE // 2, -PAGE, 2.0])
def test_the_largest_page_is_the_page_size_times_a_power_of_two(wrong):
    with pytest.raises(vattn.ConfigError, match="max_page_bytes"):
        open_cache(max_page_bytes=wrong)


# -- what they save --------------------------------------------------------------------------------------------------
def test_rows_known_ahead_take_few_calls_and_not_a_page_more():
    with open_cache() as cache, open_cache(max_page_bytes=PAGE) as alike:
        slots = new(cache, 300), new(alike, 300)
        stats, other = cache.stats(), alike.stats()
        assert sizes_of(cache, slots[0]) == PageSizes(32).cover(0, 300)
        assert stats.num_create == stats.num_map == len(PageSizes(32).cover(0, 300)) < 60
        assert other.num_map == 300
        for name in ("physical_bytes", "mapped_bytes", "in_use_bytes", "waste_bytes", "row_bytes"):
            assert getattr(stats, name) == getattr(other, name)
        check_marked(cache, slots[0])
        cache.check_integrity()


def test_a_tail_that_grows_takes_small_pages():
    with open_cache() as cache:
        slot = new(cache, 300)
        num = len(sizes_of(cache, slot))
        for pages in range(301, 340):
            cache.ensure(slot, 4 * pages)
        assert sizes_of(cache, slot)[num:] == [1] * 39


def test_a_fork_shares_whole_pages_and_copies_a_quarter_at_most():
    with open_cache() as cache:
        parent = new(cache, 300)
        for rows in (1200, 1199, 1024, 700, 515, 64, 3):
            before = cache.stats()
            child = cache.fork(parent, rows)
            assert cache.stats().num_copy - before.num_copy <= 1
            own = in_use(cache) - before.in_use_bytes // PAGE
            assert own <= 1 + rows // 4 // 4
            check_marked(cache, child)
            cache.check_integrity()
            again = cache.fork(child, rows)  # which shares all but the page that its rows do not fill
            assert in_use(cache) - before.in_use_bytes // PAGE - own == bool(rows % 4)
            cache.release(again)
            cache.release(child)
            cache.trim()


def test_the_next_sequence_adopts_large_pages():
    with open_cache() as cache:
        slot = new(cache, 300)
        cache.release(slot)
        calls = cache.stats().num_driver_calls
        assert cache.acquire(slot) == slot
        cache.ensure(slot, 1200)
        assert cache.stats().num_driver_calls == calls
        assert cache.stats().num_adopted == 300
        assert not cache.rows(slot, 0)[0].any()


def test_a_parked_page_that_is_larger_than_what_is_needed_goes():
    with open_cache() as cache:
        slot = new(cache, 300)
        cache.release(slot)
        cache.acquire(slot)
        cache.ensure(slot, 4 * 135)  # into a page of thirty-two
        assert in_use(cache) == 135
        assert cache.stats().waste_bytes == 0
        assert not cache.rows(slot, 0)[0].any()
        cache.check_integrity()


# -- cuts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [0, 1, 64, 67, 4 * 33, 4 * 67 + 1, 4 * 130, 4 * 250 + 3, 1196, 1199])
def test_truncate_leaves_the_pages_that_the_rows_need(rows):
    with open_cache(limit=300) as cache:  # full
        slot = new(cache, 300)
        cache.truncate(slot, rows)
        assert in_use(cache) == -(-rows // 4)
        assert cache.stats().physical_bytes <= 300 * PAGE
        cache.check_integrity()
        check_marked(cache, slot)
        other = new(cache, 300 - -(-rows // 4))  # and what it gave back is there for others
        cache.check_integrity()
        check_marked(cache, other)
        check_marked(cache, slot)


def test_a_page_that_cannot_be_split_is_kept_until_there_is_room_and_need():
    with open_cache(limit=300) as cache:
        slot = new(cache, 300)
        cache.truncate(slot, 4 * 128)  # the end of a page of sixteen
        other = new(cache, 172)
        cache.truncate(slot, 4 * 113)
        assert in_use(cache) == 300  # no room for the one that is left of sixteen
        assert cache.stats().waste_bytes == 15 * PAGE
        cache.check_integrity()
        cache.truncate(other, 4 * 171)
        assert in_use(cache) == 299
        third = new(cache, 16)
        assert in_use(cache) == 300
        assert cache.stats().waste_bytes == 0
        with pytest.raises(vattn.OutOfPages):
            cache.ensure(third, 4 * 17)
        for each in (slot, other, third):
            check_marked(cache, each)
        cache.check_integrity()


def test_a_page_cut_inside_a_step_is_split_when_memory_is_short():
    with open_cache(limit=300) as cache:
        slot = new(cache, 300)
        with cache.step([slot]):
            cache.truncate(slot, 4 * 121)
        assert in_use(cache) == 128
        new(cache, 100)
        assert in_use(cache) == 228  # there is room
        new(cache, 72)
        assert in_use(cache) == 293  # while there is room for the copy
        new(cache, 7)
        assert in_use(cache) == 300
        check_marked(cache, slot)
        cache.check_integrity()


def test_no_page_is_split_while_a_step_is_open_on_it():
    with open_cache(limit=300) as cache:
        slot = new(cache, 300)
        with cache.step([slot]):
            cache.truncate(slot, 4 * 113)
        late = cache.acquire()
        with cache.step([slot]):
            cache.ensure(late, 4 * 165)
            assert in_use(cache) == 128 + 165
            with pytest.raises(vattn.OutOfPages):
                cache.ensure(late, 4 * 187)
        cache.ensure(late, 4 * 187)
        assert in_use(cache) == 113 + 187
        check_marked(cache, slot)


def test_what_a_split_copies_comes_after_the_work_on_the_sequence():
    driver = StreamDriver()
    with open_cache(driver, limit=300) as cache:
        slot = new(cache, 300)
        view = cache.k(0)[slot, : 4 * 121]
        with driver.stream(3), cache.step([slot]):
            driver.launch(lambda: view.mul_(2))
        cache.truncate(slot, 4 * 121)
        driver.synchronize()
        assert torch.equal(cache.rows(slot, 0)[0][:, 0, 0], 2 * (torch.arange(4 * 121) + 1.0))


def test_rows_that_a_split_left_behind_are_zeros_or_the_sequences_own():
    with open_cache(limit=300, over_read_tokens=9) as cache:
        slot = new(cache, 290)
        cache.truncate(slot, 4 * 119 + 2)
        beyond = cache.k(0)[slot, 4 * 119 + 2 : 4 * 119 + 11]
        assert not beyond.any()
        cache.check_integrity()


# -- shared ----------------------------------------------------------------------------------------------------------
def test_a_write_into_a_large_shared_page_copies_it_whole_and_no_further_than_the_rows():
    with open_cache() as cache:
        parent = new(cache, 300)
        child = cache.fork(parent, 1200)
        before = in_use(cache)
        cache.make_writable(child, 4 * 130, 4 * 130 + 1)
        assert in_use(cache) - before == 32
        cache.rows(child, 0)[0][4 * 130] = -1
        check_marked(cache, parent)
        cache.truncate(child, 4 * 113)  # inside a page of sixteen that is the parent's too
        before = in_use(cache)
        cache.make_writable(child, 4 * 112, 4 * 112 + 1)
        assert in_use(cache) - before == 1
        cache.check_integrity()
        cache.ensure(child, 1200)
        cache.check_integrity()
        assert not cache.rows(child, 0)[0][4 * 113 :].any()
        check_marked(cache, parent)


def test_the_last_sharer_keeps_the_page_and_what_is_past_its_rows_goes_when_memory_is_short():
    with open_cache(limit=300) as cache:
        parent = new(cache, 200)
        child = cache.fork(parent, 800)
        cache.truncate(child, 4 * 121)
        cache.release(parent)
        assert in_use(cache) == 128
        new(cache, 179)  # takes the parked pages, then the seven
        assert in_use(cache) == 300
        check_marked(cache, child)
        cache.check_integrity()


# -- sizes that run out ----------------------------------------------------------------------------------------------
def test_free_pages_of_one_size_become_others():
    with open_cache(limit=300) as cache:
        slot = new(cache, 300)
        cache.truncate(slot, 0)
        assert cache.stats().free_bytes == 300 * PAGE
        slots = [new(cache, 11) for _ in range(5)]  # of single ones
        assert all(set(sizes_of(cache, each)) == {1} for each in slots)
        many = cache.acquire() if len(slots) < 5 else slot
        cache.ensure(many, 4 * 245)
        assert in_use(cache) == 300
        for each in slots:
            cache.truncate(each, 0)
        cache.truncate(many, 0)
        cache.ensure(many, 1200)
        assert sizes_of(cache, many) == PageSizes(32).cover(0, 300)
        cache.check_integrity()


def test_a_device_that_runs_out_gets_pages_of_other_sizes_back():
    with open_cache(LedgerDriver(300 * PAGE, PAGE), limit=10_000) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 1200)
        cache.truncate(slot, 0)
        for other in (slot, *(cache.acquire() for _ in range(5))):
            cache.ensure(other, 4 * 19)
        cache.ensure(slot, 4 * (300 - 5 * 19))
        assert cache.stats().physical_bytes <= 300 * PAGE
        cache.check_integrity()


def test_trim_keeps_no_more_than_it_was_told():
    with open_cache() as cache:
        slot = new(cache, 300)
        cache.truncate(slot, 0)
        for keep in (299, 200, 31, 1, 0):
            cache.trim(keep * PAGE)
            assert cache.stats().physical_bytes <= keep * PAGE
            assert cache.stats().physical_bytes > 0 or keep < 16
            cache.check_integrity()


# -- faults ----------------------------------------------------------------------------------------------------------
def _calls_of_truncate(driver: FailingDriver) -> Counter[str]:
    with open_cache(driver, limit=300) as cache:
        slot = new(cache, 300)
        before = driver.calls.copy()
        cache.truncate(slot, 4 * 126 + 2)
        return driver.calls - before


def test_a_truncate_whose_split_fails_keeps_the_page():
    """Whatever call fails: the sequence is as it should be, and its page is split when memory is short."""
    made = _calls_of_truncate(FailingDriver(HostDriver()))
    assert made.keys() >= {"reserve", "release", "create", "map", "set_access", "unmap", "copy"}
    for call, total in made.items():
        for at in range(1, total + 1):
            driver = FailingDriver(HostDriver())
            with open_cache(driver, limit=300) as cache:
                slot = new(cache, 300)
                driver.fail(call, at=at)
                if call == "unmap" and at == 1:  # of the whole pages
                    with pytest.raises(vattn.DriverError, match="unmap"):
                        cache.truncate(slot, 4 * 126 + 2)
                    assert cache.seq_len(slot) == 1200
                    check_marked(cache, slot)
                    cache.truncate(slot, 4 * 126 + 2)
                    assert in_use(cache) == 127
                else:
                    cache.truncate(slot, 4 * 126 + 2)
                    assert in_use(cache) == (128 if call != "reserve" or at == 1 else 127)
                cache.check_integrity()
                check_marked(cache, slot)
                other = new(cache, 173)
                assert in_use(cache) == 300
                check_marked(cache, slot)
                check_marked(cache, other)
                cache.check_integrity()


@pytest.mark.parametrize("second", ["map", "set_access", "unmap", "release"])
def test_a_split_whose_undo_fails_too_loses_no_page(second):
    made = _calls_of_truncate(FailingDriver(HostDriver()))
    for call, total in made.items():
        for at in range(1, total + 1):
            driver = FailingDriver(HostDriver())
            with open_cache(driver, limit=300) as cache:
                slot = new(cache, 300)
                driver.fail(call, at=at)
                driver.fail(second, at=made[second] + (call != second), times=1000)
                with suppress(vattn.DriverError):
                    cache.truncate(slot, 4 * 126 + 2)
                cache.check_integrity()
                driver.heal()
                cache.rows(slot, 0)[0].sum()
                cache.truncate(slot, 0)
                new(cache, 300)
                cache.check_integrity()


def test_a_conversion_that_fails_half_way_leaves_the_sequences():
    for call, at in (("release", 1), ("release", 2), ("create", 1), ("create", 3), ("create", 60)):
        with open_cache(driver := FailingDriver(HostDriver()), limit=300) as cache:
            slot = new(cache, 300)
            cache.truncate(slot, 4 * 100)
            driver.fail(call, at=at)
            others = [cache.acquire() for _ in range(5)]
            with pytest.raises(vattn.DriverError, match=call):
                cache.ensure_batch(others, [4 * 16] * 5)
            cache.check_integrity()
            assert in_use(cache) == 100
            cache.ensure_batch(others, [4 * 16] * 5)
            check_marked(cache, slot)
            cache.check_integrity()
