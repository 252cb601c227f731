"""The pool: pages are conserved, shared by count, limited, and dirty once somebody had them."""

from __future__ import annotations

import pytest
from helpers.failing_driver import FailingDriver

from vattn.errors import DriverError, OutOfPages
from vattn.memory.pages import PhysicalPagePool
from vattn.memory.undo import Undo

PAGE = 2 << 20
LIMIT = 8


@pytest.fixture
def driver(host_driver) -> FailingDriver:
    return FailingDriver(host_driver)


@pytest.fixture
def pool(driver) -> PhysicalPagePool:
    return PhysicalPagePool(driver, PAGE, LIMIT * PAGE + PAGE // 2)


def take(pool, count):
    """Pages that are in use, at made-up addresses: the pool only writes them down."""
    with Undo() as undo:
        pages = pool.take([1] * count, undo)
    for index, page in enumerate(pages):
        page.maps.append(1000 + index)
    pool.gain(pages)
    return pages


def take_and_fail(pool, count):
    with Undo() as undo:
        pool.take([1] * count, undo)
        raise KeyError


def give_back(pool, pages):
    pool.lose(pages)
    for page in pages:
        page.maps.pop(0)
        pool.put_back(page)


def test_pages_are_created_as_needed_and_reused_before_new_ones(pool, driver):
    pages = take(pool, 3)
    pool.check_integrity()
    assert (pool.physical_bytes, driver.calls["create"]) == (3 * PAGE, 3)
    give_back(pool, pages)
    pool.check_integrity()
    again = take(pool, 4)
    assert set(pages) < set(again)
    assert driver.calls["create"] == 4
    assert driver.inner.allocated_bytes() == pool.physical_bytes == 4 * PAGE


def test_fresh_pages_are_clean_and_returned_ones_dirty(pool):
    pages = take(pool, 2)
    assert not any(page.dirty for page in pages)
    give_back(pool, pages)
    assert all(page.dirty for page in take(pool, 2))


def test_the_limit_is_in_whole_pages(pool, driver):
    take(pool, LIMIT)
    assert pool.num_available == 0
    with pytest.raises(OutOfPages) as caught:
        take(pool, 1)
    error = caught.value
    assert (error.asked_bytes, error.free_bytes, error.limit_bytes) == (PAGE, 0, pool.limit_bytes)
    assert all(str(number) in str(error) for number in (PAGE, pool.limit_bytes, LIMIT * PAGE))
    assert driver.calls["create"] == LIMIT  # it did not even try


def test_more_than_the_limit_takes_nothing(pool, driver):
    with pytest.raises(OutOfPages):
        take(pool, LIMIT + 1)
    assert (pool.physical_bytes, pool.num_available, driver.calls["create"]) == (0, LIMIT, 0)


def test_free_pages_count_as_available(pool):
    pages = take(pool, LIMIT)
    give_back(pool, pages[:5])
    assert pool.num_available == 5
    take(pool, 5)
    with pytest.raises(OutOfPages):
        take(pool, 1)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_failing_create_takes_nothing(pool, driver, at, out_of_memory):
    kept = take(pool, 2)
    give_back(pool, kept[:1])
    driver.fail("create", at, out_of_memory=out_of_memory)
    with pytest.raises(OutOfPages if out_of_memory else DriverError, match="INJECTED"):
        take(pool, 4)
    pool.check_integrity()
    assert (len(pool.pages), pool.free) == (2, kept[:1])
    assert driver.inner.allocated_bytes() == 2 * PAGE
    take(pool, 4)


def test_a_page_that_cannot_be_released_in_an_undo_is_kept_free(pool, driver):
    driver.fail("create", 3)
    driver.fail("release", 1)
    with pytest.raises(DriverError, match="create failed") as caught:
        take(pool, 3)
    assert any("release failed" in note for note in caught.value.__notes__)
    pool.check_integrity()
    assert len(pool.free) == len(pool.pages) == 1
    take(pool, 3)


def test_undone_free_pages_keep_being_dirty(pool):
    give_back(pool, take(pool, 2))
    with pytest.raises(KeyError):
        take_and_fail(pool, 2)
    assert len(pool.free) == 2
    assert all(page.dirty for page in pool.free)
    pool.check_integrity()


def test_shared_pages_are_counted_once_and_stay_until_the_last_address(pool):
    (page,) = take(pool, 1)
    assert not page.shared
    page.maps += [2000, 3000]
    pool.gain([page, page])
    assert page.shared
    assert (pool.num_owned_maps, pool.num_owned, pool.num_shared) == (3, 1, 1)
    for address, shared in ((1000, 1), (3000, 0)):
        page.maps.remove(address)
        pool.lose([page])
        pool.put_back(page)
        assert (pool.num_owned_maps, pool.num_owned, pool.num_shared) == (len(page.maps), 1, shared)
        assert not pool.free
        pool.check_integrity()
    give_back(pool, [page])
    assert pool.free == [page]
    assert (pool.num_owned_maps, pool.num_owned, pool.num_shared) == (0, 0, 0)
    pool.check_integrity()


def test_peak_is_the_most_there_ever_were(pool):
    give_back(pool, take(pool, 5))
    pool.trim()
    take(pool, 2)
    assert (pool.peak_pages, len(pool.pages)) == (5, 2)


@pytest.mark.parametrize(("keep_bytes", "kept"), [(0, 0), (1, 0), (PAGE, 1), (3 * PAGE - 1, 2), (99 * PAGE, 4)])
def test_trim_gives_free_pages_back(pool, driver, keep_bytes, kept):
    used = take(pool, 6)
    give_back(pool, used[:4])
    assert pool.trim(keep_bytes) == (4 - kept) * PAGE
    pool.check_integrity()
    assert len(pool.free) == kept
    assert driver.inner.allocated_bytes() == (2 + kept) * PAGE


def test_a_failing_trim_loses_nothing(pool, driver):
    give_back(pool, take(pool, 4))
    driver.fail("release", 2)
    with pytest.raises(DriverError, match="release"):
        pool.trim()
    pool.check_integrity()
    assert len(pool.pages) == len(pool.free) == 3
    assert pool.trim() == 3 * PAGE


def corrupt_free_twice(pool, pages):
    pool._free.setdefault(1, []).extend([pages[0]] * 2)


def corrupt_mapped_and_free(pool, pages):
    pool._free.setdefault(1, []).append(pages[0])


def corrupt_lost(pool, pages):
    pages[0].maps.clear()


def corrupt_shared_count(pool, pages):
    pool.num_shared = 1


def corrupt_limit(pool, pages):
    pool.limit_bytes = PAGE


def corrupt_system(pool, pages):
    pool.driver.inner.release(pages[0].handle)


CORRUPTIONS = [
    corrupt_free_twice,
    corrupt_mapped_and_free,
    corrupt_lost,
    corrupt_shared_count,
    corrupt_limit,
    corrupt_system,
]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_check_integrity_sees(pool, corrupt):
    pages = take(pool, 2)
    pool.check_integrity()
    corrupt(pool, pages)
    with pytest.raises(AssertionError):
        pool.check_integrity()
