"""What every driver does, whatever is behind it: one suite, run on each."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from vattn.driver import Driver, Fence
from vattn.errors import DriverError
from vattn.tensors import tensor_from_address

NUM_UNITS = 64  # of the reservation that most tests work in


@pytest.fixture
def driver(open_driver) -> Driver:
    return open_driver()


@pytest.fixture
def unit(driver_case, driver) -> int:
    return driver_case.unit_of(driver)


@pytest.fixture
def base(driver, unit) -> int:
    """A reservation with nothing in it."""
    return driver.reserve(NUM_UNITS * unit)


@pytest.fixture
def memory(driver_case, driver) -> Callable[[int, int], torch.Tensor]:
    """``memory(address, size_bytes)``: the bytes there. Tests that use it are skipped where there are none."""
    if not driver_case.has_memory:
        pytest.skip("this driver has no memory behind its addresses")
    return lambda address, size_bytes: tensor_from_address(address, size_bytes, torch.uint8, driver.device, driver)


def holds(data: torch.Tensor, value: int) -> bool:
    return bool((data == value).all())


def put(driver: Driver, address: int, size_bytes: int) -> int:
    """A new handle, mapped and accessible at ``address``."""
    handle = driver.create(size_bytes)
    driver.map(address, size_bytes, handle)
    driver.set_access(address, size_bytes)
    return handle


def state(driver: Driver) -> tuple:
    """Everything that a refused call must leave as it was, by the driver's books and by the system's."""
    mapped = ()
    if driver.name == "host":
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = tuple(line.split()[:3] for line in lines if "/memfd:vattn" in line)
    return asdict(driver.counts), driver.log.snapshot(), asdict(driver.book), driver.allocated_bytes(), mapped


@contextmanager
def refused(driver: Driver, call: str) -> Iterator[None]:
    """The block raises a DriverError that names the call, and changes nothing."""
    before = state(driver)
    with pytest.raises(DriverError) as caught:
        yield
    assert caught.value.call == call
    assert call in str(caught.value)
    assert not caught.value.out_of_memory
    assert state(driver) == before


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


# -- data ------------------------------------------------------------------------------------------------------------
def test_zero_and_copy_touch_exactly_their_bytes(driver, unit, base, memory):
    put(driver, base, unit)
    put(driver, base + unit, unit)
    data = memory(base, 2 * unit)
    data.fill_(7)
    driver.zero(base + 5, unit)  # odd bytes, across the two handles
    expected = torch.full_like(data, 7)
    expected[5 : unit + 5] = 0
    assert torch.equal(data, expected)
    data.copy_(torch.arange(2 * unit, device=data.device) % 251)
    expected = data.clone()
    driver.copy(base + unit + 3, base + 1, unit - 9)
    expected[unit + 3 : 2 * unit - 6] = expected[1 : unit - 8].clone()
    assert torch.equal(data, expected)


def test_one_handle_at_two_addresses_is_one_memory(driver, unit, base, memory):
    handle = put(driver, base, unit)
    driver.map(base + 5 * unit, unit, handle)
    driver.set_access(base + 5 * unit, unit)
    one, other = memory(base, unit), memory(base + 5 * unit, unit)
    one.fill_(3)
    assert holds(other, 3)
    other[unit - 1] = 9
    assert one[unit - 1].item() == 9
    driver.unmap(base, unit)
    assert other[0].item() == 3


def test_memory_lives_until_its_last_mapping_goes(driver, unit, base, memory):
    handle = put(driver, base, unit)
    driver.map(base + unit, unit, handle)
    driver.set_access(base + unit, unit)
    memory(base, unit).fill_(5)
    driver.release(handle)
    others = [put(driver, base + index * unit, unit) for index in range(2, 10)]  # must not be the same memory
    for index in range(2, 10):
        memory(base + index * unit, unit).fill_(6)
    driver.synchronize()
    driver.unmap(base, unit)
    assert holds(memory(base + unit, unit), 5)
    driver.unmap(base + unit, unit)
    assert len(driver.book.handles) == len(others)


def test_a_refused_unmap_leaves_the_data(driver, unit, base, memory):
    put(driver, base, 2 * unit)
    memory(base, 2 * unit).fill_(8)
    with refused(driver, "unmap"):
        driver.unmap(base, unit)
    with refused(driver, "unmap"):
        driver.unmap(base, 3 * unit)
    assert holds(memory(base, 2 * unit), 8)


def test_data_follows_its_handle(driver, unit, base, memory):
    handles = [put(driver, base + index * unit, unit) for index in range(4)]
    for index in range(4):
        memory(base + index * unit, unit).fill_(10 + index)
    driver.synchronize()  # unmap does not wait
    driver.unmap(base, 4 * unit)
    for index, handle in enumerate(reversed(handles)):
        driver.map(base + index * unit, unit, handle)
    driver.set_access(base, 4 * unit)
    assert all(holds(memory(base + index * unit, unit), 13 - index) for index in range(4))


def test_handles_of_many_sizes_side_by_side(driver, unit, base, memory):
    sizes = (1, 32, 2, 16, 4, 8)
    offsets = [sum(sizes[:index]) for index in range(len(sizes))]
    for size, offset in zip(sizes, offsets, strict=True):
        put(driver, base + offset * unit, size * unit)
        memory(base + offset * unit, size * unit).fill_(size)
    for size, offset in zip(sizes, offsets, strict=True):
        assert holds(memory(base + offset * unit, size * unit), size)
    driver.synchronize()
    for size, offset in zip(sizes, offsets, strict=True):
        driver.unmap(base + offset * unit, size * unit)


def test_fresh_handles_are_zero(driver, unit, base, memory):
    # Rounds: from the second on the system hands out memory that this process made dirty.
    for _ in range(3):
        sizes = (1, 1, 1, 1, 2, 2, 4, 4, 8, 16)
        data = memory(base, sum(sizes) * unit)
        offset, handles = 0, []
        for size in sizes:
            handles.append(put(driver, base + offset * unit, size * unit))
            offset += size
        assert not data.any()
        data.fill_(0xA5)
        driver.synchronize()
        driver.unmap(base, offset * unit)
        for handle in handles:
            driver.release(handle)


def test_a_tensor_follows_what_is_mapped_under_it(driver, unit, base, memory):
    data = memory(base, unit)  # made while there is nothing
    first = put(driver, base, unit)
    data.fill_(1)
    driver.synchronize()
    driver.unmap(base, unit)
    put(driver, base, unit)
    assert not data.any()
    driver.unmap(base, unit)
    driver.map(base, unit, first)
    driver.set_access(base, unit)
    assert holds(data, 1)


_TOUCH = """
import sys, torch
from vattn.driver import open_driver
from vattn.tensors import tensor_from_address
device, action = sys.argv[1:]
driver = open_driver(device)
page = driver.default_page_bytes
address = driver.reserve(2 * page)
for start in (address, address + page):  # the second page is there to be beside the one touched
    driver.map(start, page, driver.create(page))
driver.set_access(address + page, page)
if action in ("granted", "unmapped again"):
    driver.set_access(address, page)
if action == "unmapped again":
    driver.unmap(address, page)
if action == "never mapped":
    address = driver.reserve(page)
# Through a kernel: a copy of one element would be refused by the CUDA driver before it faults.
print((tensor_from_address(address, page, torch.uint8, driver.device, driver)[1:2] + 0).item())
"""


@pytest.mark.parametrize("action", ["never mapped", "no access", "unmapped again", "granted"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_touching_a_page(device, action):
    """A page without access, or that is not there, faults; in a child process, since it kills."""
    child = subprocess.run([sys.executable, "-c", _TOUCH, device, action], capture_output=True, text=True, timeout=120)
    if action == "granted":
        assert (child.returncode, child.stdout) == (0, "0\n"), child.stderr
    elif device == "cpu":
        assert child.returncode == -signal.SIGSEGV, child.stderr
    else:
        assert child.returncode != 0
        assert "illegal memory access" in child.stderr


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
