"""Fixtures of the conformance suites: a driver, its unit of size, a reservation, the memory behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.driver_calls import NUM_UNITS

from vattn.driver import Driver
from vattn.memory.tensors import tensor_from_address


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
