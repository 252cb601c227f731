"""Calls for many pages at once: what the single calls give, in turn, and what is left where one of them fails."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from helpers.driver_calls import holds
from helpers.failing_driver import FailingDriver

from vattn.errors import DriverError


def test_a_batch_is_its_calls_in_turn(open_driver, unit):
    books = []
    for batched in (False, True):
        driver = open_driver()
        base = driver.reserve(8 * unit)
        addresses = [base + index * unit for index in (5, 0, 1, 7)]
        handles: list[int] = []
        done: list[int] = []
        if batched:
            driver.create_pages(unit, 4, handles)
            driver.map_pages(unit, addresses, handles, done)
            assert done == addresses
        else:
            handles += [driver.create(unit) for _ in addresses]
            for address, handle in zip(addresses, handles, strict=True):
                driver.map(address, unit, handle)
                driver.set_access(address, unit)
        for address in addresses:
            driver.zero(address, unit)
        events = [
            (event.name, event.fields.get("address", base) - base, event.fields.get("size_bytes"))
            for event in driver.log.snapshot()
        ]
        mappings = [
            (mapping.address - base, mapping.size_bytes, mapping.accessible, handles.index(mapping.handle))
            for mapping in driver.book.mappings.values()
        ]
        books.append(
            (asdict(driver.counts), events, mappings, [asdict(entry) for entry in driver.book.handles.values()])
        )
    assert books[0] == books[1]


def test_pages_of_a_batch_are_zeroed_memory_of_their_own(driver, unit, base, memory):
    handles: list[int] = []
    driver.create_pages(unit, 3, handles)
    driver.map_pages(unit, [base + index * unit for index in range(3)], handles, [])
    for index in range(3):
        assert holds(memory(base + index * unit, unit), 0)
        memory(base + index * unit, unit).fill_(index + 1)
    for index in range(3):
        assert holds(memory(base + index * unit, unit), index + 1)


def test_an_empty_batch_is_nothing(driver, unit):
    handles: list[int] = []
    driver.create_pages(unit, 0, handles)
    driver.map_pages(unit, [], [], [])
    assert not handles
    assert not driver.book.handles
    assert set(asdict(driver.counts).values()) == {0}


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_create_that_fails_leaves_the_handles_before_it(driver, unit, at):
    failing = FailingDriver(driver)
    handles: list[int] = []
    failing.fail("create", at)
    with pytest.raises(DriverError, match="create"):
        driver.create_pages(unit, 4, handles)
    assert handles == list(driver.book.handles)
    assert len(handles) == driver.counts.num_create == at - 1
    driver.create_pages(unit, 4, handles)
    assert len(set(handles)) == at + 3


@pytest.mark.parametrize("call", ["map", "set_access"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_map_that_fails_leaves_the_pages_before_it(driver, unit, base, call, at):
    failing = FailingDriver(driver)
    handles: list[int] = []
    done: list[int] = []
    addresses = [base + index * unit for index in range(4)]
    driver.create_pages(unit, 4, handles)
    failing.fail(call, at)
    with pytest.raises(DriverError, match=call):
        driver.map_pages(unit, addresses, handles, done)
    mapped = at - (call == "map")
    assert done == list(driver.book.mappings) == addresses[:mapped]
    assert [each.accessible for each in driver.book.mappings.values()] == [index < at - 1 for index in range(mapped)]
    assert (driver.counts.num_map, driver.counts.num_set_access) == (mapped, at - 1)
    for address in done:
        driver.unmap(address, unit)
    driver.map_pages(unit, addresses, handles, [])


@pytest.mark.parametrize("wrong", ["mapped already", "same address twice", "outside", "no handle", "size"])
def test_a_batch_obeys_the_rules_page_by_page(driver, unit, base, wrong):
    handles: list[int] = []
    done: list[int] = []
    driver.create_pages(unit, 3, handles)
    extra: list[int] = []
    driver.create_pages(2 * unit, 1, extra)
    addresses = [base, base + unit, base + 2 * unit]
    if wrong == "mapped already":
        driver.map_pages(unit, [addresses[1]], [handles[2]], [])
    elif wrong == "same address twice":
        addresses[1] = addresses[0]
    elif wrong == "outside":
        addresses[1] = base + (1 << 40)
    elif wrong == "no handle":
        handles[1] = 12345
    else:
        handles[1] = extra[0]
    with pytest.raises(DriverError, match="map failed"):
        driver.map_pages(unit, addresses, handles, done)
    assert done == [base]
    assert driver.book.mappings[base].accessible
    with pytest.raises(DriverError, match="create failed"):
        driver.create_pages(unit + 1, 2, handles)


def test_as_many_addresses_as_handles(driver, unit, base):
    handles: list[int] = []
    driver.create_pages(unit, 1, handles)
    with pytest.raises(ValueError, match="shorter"):
        driver.map_pages(unit, [base, base + unit], handles, [])
