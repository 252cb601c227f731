"""What the conformance suites share: calls, and what a refused one must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from vattn.driver import Driver
from vattn.errors import DriverError

NUM_UNITS = 64  # of the reservation that most tests work in


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
