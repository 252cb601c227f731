"""What lies behind the addresses, on every driver that has memory; and the fault where there is none."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from helpers.driver_calls import holds, put, refused


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
from vattn.memory.tensors import tensor_from_address
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


@pytest.mark.unsanitized
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
