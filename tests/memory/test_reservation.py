"""Mapping, aliasing and unmapping in one address range, and what each failed call leaves."""

from __future__ import annotations

import pytest
import torch
from helpers.failing_driver import FailingDriver

from vattn.errors import DriverError
from vattn.memory.pages import PhysicalPagePool
from vattn.memory.reservation import Reservation
from vattn.memory.tensors import tensor_from_address
from vattn.memory.undo import Undo

PAGE = 4096
NUM_PAGES = 16


@pytest.fixture
def driver(host_driver) -> FailingDriver:
    return FailingDriver(host_driver)


@pytest.fixture
def pool(driver) -> PhysicalPagePool:
    return PhysicalPagePool(driver, PAGE, NUM_PAGES * PAGE)


@pytest.fixture
def reservation(driver, pool) -> Reservation:
    return Reservation(driver, pool, NUM_PAGES * PAGE)


def fill(reservation, indexes):
    """Map new pages, the content of each its own index plus one."""
    with Undo() as undo:
        for index, page in zip(indexes, reservation.pool.take([1] * len(indexes), undo), strict=True):
            reservation.map([index], [page], undo)
            data_at(reservation, index).fill_(index + 1)


def undone(work):
    """Do ``work(undo)`` in a transaction that then fails for a reason of its own."""
    with Undo() as undo:
        work(undo)
        raise KeyError


def data_at(reservation, index):
    return tensor_from_address(reservation.address_of(index), PAGE, torch.uint8, torch.device("cpu"), None)


def values(reservation):
    """index -> content, of every page; reads each one, so it must be accessible."""
    for index in reservation.pages:
        assert len(data_at(reservation, index).unique()) == 1
    return {index: data_at(reservation, index)[0].item() for index in sorted(reservation.pages)}


def check(reservation):
    """The pages, the pool and the driver agree."""
    pool = reservation.pool
    maps = sorted(address for page in pool.pages for address in page.maps)
    tables = [*reservation.pages, *reservation.strays]
    assert maps == sorted(reservation.address_of(index) for index in tables)
    assert maps == sorted(reservation.driver.book.mappings)
    pool.check_integrity()


def test_pages_lie_at_their_index(reservation):
    fill(reservation, [0, 3, NUM_PAGES - 1])
    assert values(reservation) == {0: 1, 3: 4, NUM_PAGES - 1: NUM_PAGES}
    check(reservation)


def test_nothing_is_mapped_at_first(reservation, driver):
    assert reservation.pages == {}
    assert driver.calls == {"reserve": 1}


def test_an_alias_is_the_same_memory(reservation, pool):
    fill(reservation, [2])
    with Undo() as undo:
        reservation.map([9], [reservation.pages[2]], undo)
    assert values(reservation) == {2: 3, 9: 3}
    data_at(reservation, 9).fill_(77)
    assert values(reservation) == {2: 77, 9: 77}
    assert reservation.pages[2].shared
    check(reservation)
    with Undo() as undo:
        (page,) = reservation.unmap(2, 3, undo)
    pool.put_back(page)
    assert values(reservation) == {9: 77}
    assert not pool.free
    check(reservation)


def test_unmap_passes_over_holes_with_one_call_a_stretch(reservation, driver):
    fill(reservation, [1, 2, 5, 6, 7, 12])
    with Undo() as undo:
        taken = reservation.unmap(0, 12, undo)
    assert driver.calls["unmap"] == 2
    assert len(taken) == 5
    for page in taken:
        reservation.pool.put_back(page)
    assert values(reservation) == {12: 13}
    check(reservation)


def test_unmap_of_nothing_is_nothing(reservation, driver):
    with Undo() as undo:
        assert reservation.unmap(0, NUM_PAGES, undo) == []
    assert driver.calls["unmap"] == 0


@pytest.mark.parametrize("call", ["map", "set_access"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_failing_map_leaves_what_was_there(reservation, driver, call, at):
    fill(reservation, [0, 1])
    driver.fail(call, at)
    with pytest.raises(DriverError) as caught:
        fill(reservation, [4, 5, 6, 7])
    assert caught.value.call == call
    assert values(reservation) == {0: 1, 1: 2}
    assert len(reservation.pool.pages) == 2
    check(reservation)
    fill(reservation, [4, 5, 6, 7])
    assert values(reservation) == {0: 1, 1: 2, 4: 5, 5: 6, 6: 7, 7: 8}


@pytest.mark.parametrize("call", ["map", "set_access"])
def test_a_failing_alias_leaves_the_original(reservation, driver, call):
    fill(reservation, [2])
    driver.fail(call)
    with pytest.raises(DriverError, match=call):
        undone(lambda undo: reservation.map([9], [reservation.pages[2]], undo))
    assert values(reservation) == {2: 3}
    check(reservation)


def test_a_failing_unmap_puts_back_what_was_unmapped_before_it(reservation, driver):
    fill(reservation, [0, 1, 4, 5, 9])
    driver.fail("unmap", 2)
    with pytest.raises(DriverError, match="unmap"):
        undone(lambda undo: reservation.unmap(0, NUM_PAGES, undo))
    assert values(reservation) == {0: 1, 1: 2, 4: 5, 5: 6, 9: 10}
    check(reservation)


def test_an_exception_after_unmap_puts_everything_back(reservation):
    fill(reservation, [0, 1, 4])
    with pytest.raises(KeyError):
        undone(lambda undo: reservation.unmap(0, NUM_PAGES, undo))
    assert values(reservation) == {0: 1, 1: 2, 4: 5}
    check(reservation)


def make_stray(reservation, index):
    """A page that was mapped and whose undo failed."""
    reservation.driver.fail("unmap")
    with pytest.raises(KeyError) as caught:
        undone(lambda undo: reservation.map([index], reservation.pool.take([1], undo), undo))
    assert any("unmap failed" in note for note in caught.value.__notes__)
    assert list(reservation.strays) == [index]


def test_a_stray_is_nobodys_page(reservation):
    make_stray(reservation, 3)
    assert reservation.pages == {}
    assert not reservation.pool.free
    check(reservation)


def test_a_stray_is_cleared_by_the_next_map_there(reservation):
    make_stray(reservation, 3)
    data_at(reservation, 3).fill_(99)
    fill(reservation, [3])
    assert not reservation.strays
    assert values(reservation) == {3: 4}
    (free,) = reservation.pool.free
    assert free.dirty
    check(reservation)


def test_a_stray_that_cannot_be_cleared_stays_one(reservation, driver):
    make_stray(reservation, 3)
    driver.fail("unmap")
    with pytest.raises(DriverError, match="unmap"):
        reservation.clear_stray(3)
    assert list(reservation.strays) == [3]
    check(reservation)
    reservation.clear_stray(3)
    assert not reservation.strays
    check(reservation)


@pytest.mark.parametrize(
    ("call", "at", "left", "stray", "num_free"),
    [("map", 2, {0: 1, 2: 3}, [], 1), ("set_access", 2, {0: 1, 2: 3}, [1], 0)],
)
def test_an_undo_that_cannot_map_again_saves_the_other_pages(reservation, driver, call, at, left, stray, num_free):
    fill(reservation, [0, 1, 2])
    driver.fail(call, at)
    with pytest.raises(KeyError) as caught:
        undone(lambda undo: reservation.unmap(0, 3, undo))
    assert any(f"{call} failed" in note for note in caught.value.__notes__)
    assert values(reservation) == left
    assert list(reservation.strays) == stray
    assert len(reservation.pool.free) == num_free
    check(reservation)


def test_free_gives_the_addresses_back(reservation, driver):
    fill(reservation, [0])
    with pytest.raises(DriverError, match="free_range"):
        reservation.free()
    with Undo() as undo:
        (page,) = reservation.unmap(0, 1, undo)
    reservation.pool.put_back(page)
    reservation.free()
    assert not driver.book.ranges
