"""What every driver does, whatever is behind it: one suite, run on each."""

from __future__ import annotations

import random
from dataclasses import asdict
from itertools import pairwise

import pytest
from helpers.driver_calls import NUM_UNITS, holds, put, refused, state

from vattn.driver import Driver, Fence
from vattn.errors import DriverError


def test_attributes(driver):
    assert isinstance(driver, Driver)
    assert driver.granularity_bytes > 0
    assert driver.default_page_bytes % driver.granularity_bytes == 0


# -- sizes and addresses ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["reserve", "create"])
def test_sizes_are_positive_multiples_of_the_granularity(driver, call):
    granularity = driver.granularity_bytes
    for size_bytes in (0, -granularity, 1, granularity - 1, granularity + 1, granularity // 2, 3 * granularity // 2):
        with refused(driver, call):
            getattr(driver, call)(size_bytes)


@pytest.mark.parametrize("call", ["set_access", "unmap"])
def test_calls_on_mappings_refuse_odd_sizes_and_addresses(driver, unit, base, call):
    put(driver, base, unit)
    for address, size_bytes in ((base, 0), (base, -unit), (base, unit - 1), (base, unit + 1), (base + 1, unit)):
        with refused(driver, call):
            getattr(driver, call)(address, size_bytes)


def test_map_refuses_an_odd_address(driver, unit, base):
    handle = driver.create(unit)
    for address in (base + 1, base + driver.granularity_bytes // 2):
        with refused(driver, "map"):
            driver.map(address, unit, handle)


@pytest.mark.parametrize("call", ["zero", "copy"])
@pytest.mark.parametrize("size_bytes", [0, -1])
def test_zero_and_copy_refuse_no_bytes(driver, unit, base, call, size_bytes):
    put(driver, base, unit)
    arguments = (base, size_bytes) if call == "zero" else (base, base, size_bytes)
    with refused(driver, call):
        getattr(driver, call)(*arguments)


# -- reservations ----------------------------------------------------------------------------------------------------
def test_reservations_are_aligned_and_apart(driver, unit):
    sizes = [unit, 3 * unit, 64 * unit]
    ranges = sorted((driver.reserve(size), size) for size in sizes)
    assert all(address % driver.granularity_bytes == 0 for address, _ in ranges)
    assert all(one + size <= other for (one, size), (other, _) in pairwise(ranges))


def test_one_tebibyte_of_addresses_costs_nothing(driver, unit):
    before = driver.allocated_bytes()
    address = driver.reserve(1 << 40)
    assert driver.allocated_bytes() == before
    put(driver, address + (1 << 40) - unit, unit)
    driver.unmap(address + (1 << 40) - unit, unit)
    driver.free_range(address, 1 << 40)


@pytest.mark.parametrize("size_bytes", [1 << 47, 1 << 56, 1 << 64, (1 << 64) + (1 << 21)])
def test_more_addresses_than_there_are(driver, size_bytes):
    before = state(driver)
    with pytest.raises(DriverError) as caught:
        driver.reserve(size_bytes)
    assert caught.value.out_of_memory
    assert caught.value.call
    assert state(driver) == before


def test_a_freed_range_can_be_reserved_again(driver, unit):
    for _ in range(100):
        driver.free_range(driver.reserve(unit), unit)
    assert not driver.book.ranges


def test_free_range_takes_a_whole_range_once(driver, unit, base):
    for address, size_bytes in ((base, unit), (base, (NUM_UNITS + 1) * unit), (base + unit, unit), (0, unit)):
        with refused(driver, "free_range"):
            driver.free_range(address, size_bytes)
    driver.free_range(base, NUM_UNITS * unit)
    with refused(driver, "free_range"):
        driver.free_range(base, NUM_UNITS * unit)


@pytest.mark.parametrize("index", [0, NUM_UNITS // 2, NUM_UNITS - 1])
def test_free_range_refuses_while_something_is_mapped(driver, unit, base, index):
    put(driver, base + index * unit, unit)
    with refused(driver, "free_range"):
        driver.free_range(base, NUM_UNITS * unit)
    driver.unmap(base + index * unit, unit)
    driver.free_range(base, NUM_UNITS * unit)


def test_free_range_looks_at_its_own_range_only(driver, unit, base):
    put(driver, base, unit)
    other = driver.reserve(unit)
    driver.free_range(other, unit)


# -- handles ---------------------------------------------------------------------------------------------------------
def test_handles_are_distinct(driver, unit):
    handles = [driver.create(unit) for _ in range(16)]
    assert len(set(handles)) == 16


def test_release_refuses_a_handle_that_is_not_live(driver, unit):
    handle = driver.create(unit)
    driver.release(handle)
    with refused(driver, "release"):
        driver.release(handle)
    with refused(driver, "release"):
        driver.release(0)


def test_release_refuses_a_handle_twice_while_it_is_mapped(driver, unit, base):
    driver.release(put(driver, base, unit))
    with refused(driver, "release"):
        driver.release(next(iter(driver.book.handles)))


@pytest.mark.parametrize("still_mapped", [False, True])
def test_a_released_handle_cannot_be_mapped(driver, unit, base, still_mapped):
    # CUDA's own driver crashes the process here, so the refusal must come first.
    handle = put(driver, base, unit) if still_mapped else driver.create(unit)
    driver.release(handle)
    with refused(driver, "map"):
        driver.map(base + unit, unit, handle)


@pytest.mark.gpu
def test_more_memory_than_the_device_has(driver):
    if driver.name != "cuda":
        pytest.skip("the operating system would end processes rather than refuse")
    before = state(driver)
    with pytest.raises(DriverError) as caught:
        driver.create(1 << 42)
    assert (caught.value.call, caught.value.out_of_memory) == ("cuMemCreate", True)
    assert state(driver) == before


# -- mapping ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_units", [1, 3])
def test_a_handle_is_mapped_whole(driver, unit, base, num_units):
    handle = driver.create(2 * unit)
    with refused(driver, "map"):
        driver.map(base, num_units * unit, handle)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (1, 2)])
def test_nothing_is_mapped_over_a_mapping(driver, unit, base, first, second):
    driver.map(base + first * unit, 2 * unit, driver.create(2 * unit))
    handle = driver.create(2 * unit)
    with refused(driver, "map"):
        driver.map(base + second * unit, 2 * unit, handle)


def test_a_large_handle_is_not_mapped_around_a_small_one(driver, unit, base):
    put(driver, base + 17 * unit, unit)
    handle = driver.create(32 * unit)
    with refused(driver, "map"):
        driver.map(base, 32 * unit, handle)
    driver.map(base + 18 * unit, 32 * unit, handle)


def test_map_stays_inside_a_reservation(driver, unit, base):
    handle = driver.create(2 * unit)
    end = base + NUM_UNITS * unit
    for address in (base - unit, base - 2 * unit, end - unit, end, 0, -2 * unit):
        with refused(driver, "map"):
            driver.map(address, 2 * unit, handle)
    driver.map(end - 2 * unit, 2 * unit, handle)


def test_map_into_a_freed_range(driver, unit, base):
    handle = driver.create(unit)
    driver.free_range(base, NUM_UNITS * unit)
    with refused(driver, "map"):
        driver.map(base, unit, handle)


# -- access and unmapping --------------------------------------------------------------------------------------------
WRONG_STRETCHES = {
    "half a handle": (4, 1),
    "second half": (5, 1),
    "a handle and a half": (4, 3),
    "half and the next": (5, 3),
    "a hole": (9, 1),
    "a hole behind": (4, 6),
    "a hole before": (3, 3),
    "a hole between": (6, 5),
    "beyond the range": (NUM_UNITS - 1, 2),
    "outside": (2 * NUM_UNITS, 1),
}


@pytest.mark.parametrize("call", ["set_access", "unmap"])
@pytest.mark.parametrize("stretch", WRONG_STRETCHES.values(), ids=WRONG_STRETCHES.keys())
def test_calls_on_mappings_name_whole_handles(driver, unit, base, call, stretch):
    for index in (4, 6, 10, NUM_UNITS - 2):  # [4, 6) [6, 8) hole [10, 12) … [62, 64)
        put(driver, base + index * unit, 2 * unit)
    put(driver, base + 8 * unit, unit)
    first, count = stretch
    with refused(driver, call):
        getattr(driver, call)(base + first * unit, count * unit)


def test_several_whole_mappings_in_one_call(driver, unit, base):
    sizes = (1, 2, 4, 1)
    offset = 0
    for size in sizes:
        driver.map(base + offset * unit, size * unit, driver.create(size * unit))
        offset += size
    driver.set_access(base, offset * unit)
    driver.zero(base, offset * unit)
    driver.synchronize()
    driver.unmap(base + unit, 6 * unit)
    assert sorted(driver.book.mappings) == [base, base + 7 * unit]
    assert (driver.counts.num_set_access, driver.counts.num_unmap) == (1, 1)


def test_unmapping_twice(driver, unit, base):
    put(driver, base, unit)
    driver.unmap(base, unit)
    with refused(driver, "unmap"):
        driver.unmap(base, unit)


def test_no_data_call_before_access_is_granted(driver, unit, base):
    put(driver, base, unit)
    driver.map(base + unit, unit, driver.create(unit))
    for start, size_bytes in ((base + unit, unit), (base, 2 * unit), (base + 2 * unit - 1, 1), (base + 2 * unit, 1)):
        with refused(driver, "zero"):
            driver.zero(start, size_bytes)
    with refused(driver, "copy"):
        driver.copy(base + unit, base, unit)
    with refused(driver, "copy"):
        driver.copy(base, base + unit, unit)
    driver.set_access(base + unit, unit)
    driver.zero(base, 2 * unit)
    driver.copy(base + unit, base, unit)


def test_access_ends_with_the_mapping(driver, unit, base):
    handle = put(driver, base, unit)
    driver.unmap(base, unit)
    driver.map(base, unit, handle)
    with refused(driver, "zero"):
        driver.zero(base, unit)


# -- the books -------------------------------------------------------------------------------------------------------
def test_counts_and_log_hold_successes_only(driver, unit, base):
    handle = put(driver, base, unit)
    driver.zero(base, unit)
    driver.copy(base, base + 8, 8)
    for call, arguments in (
        ("create", (1,)),
        ("release", (handle + 12345,)),
        ("map", (base, unit, handle)),
        ("set_access", (base + unit, unit)),
        ("unmap", (base + unit, unit)),
        ("zero", (base + unit, unit)),
        ("copy", (base, base + unit, unit)),
    ):
        with refused(driver, call):
            getattr(driver, call)(*arguments)
    driver.synchronize()
    driver.unmap(base, unit)
    driver.release(handle)
    assert set(asdict(driver.counts).values()) == {1}
    names = [event.name for event in driver.log.snapshot()]
    assert names == ["reserve", "create", "map", "set_access", "unmap", "release"]


def test_allocated_bytes_are_what_was_created_and_not_freed(driver, unit):
    if driver.allocated_bytes() is None:
        pytest.skip("the system keeps no count for one driver")
    base, random_ = driver.reserve(512 * unit), random.Random(3)
    owned: dict[int, int] = {}  # handle -> bytes
    maps: dict[int, tuple[int, int]] = {}  # handle -> (address, bytes)
    for index in range(256):
        handle = driver.create(random_.choice((1, 2)) * unit)
        owned[handle] = driver.book.handles[handle].size_bytes
        if random_.random() < 0.5:
            driver.map(base + 2 * index * unit, owned[handle], handle)
            maps[handle] = (base + 2 * index * unit, owned[handle])
        if owned and random_.random() < 0.7:
            victim = random_.choice(list(owned))
            driver.release(victim)
            del owned[victim]
        if maps and random_.random() < 0.4:
            driver.unmap(*maps.pop(random_.choice(list(maps))))
        kept = owned | {handle: size for handle, (_, size) in maps.items()}
        assert driver.allocated_bytes() == sum(kept.values())


def test_memory_info(driver):
    available, total = driver.memory_info()
    assert 0 < available <= total


def test_fences(driver, unit, base):
    put(driver, base, unit)
    driver.zero(base, unit)
    fence = driver.fence()
    if fence is not None:
        assert isinstance(fence, Fence)
        driver.order_after(fence)
        fence.wait()
        assert fence.done()
    assert not driver.is_capturing()


def test_close_twice_then_free_the_range(driver, unit, base):
    driver.close()
    driver.close()
    driver.free_range(base, NUM_UNITS * unit)


def test_two_drivers_are_apart(open_driver, unit, memory):
    one, other = open_driver(), open_driver()
    addresses = [driver.reserve(unit) for driver in (one, other)]
    for driver, address, value in zip((one, other), addresses, (1, 2), strict=True):
        put(driver, address, unit)
        memory(address, unit).fill_(value)
    assert holds(memory(addresses[0], unit), 1)
    handle = one.create(unit)
    with refused(other, "map"):
        other.map(addresses[1], unit, handle)
