"""Memory that another process has too, by file descriptor, and memory that may only be read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from helpers.driver_calls import holds, put, refused

from vattn.driver import Driver
from vattn.errors import DriverError


@pytest.fixture
def shares(driver_case) -> None:
    """For tests of drivers that have memory to share."""
    if not driver_case.has_memory:
        pytest.skip("this driver has no memory behind its addresses")


@pytest.fixture
def export() -> Iterator[Callable[[Driver, int], int]]:
    """``export(driver, handle)``: a file descriptor, closed after the test."""
    made: list[int] = []

    def of(driver: Driver, handle: int) -> int:
        made.append(driver.export_handle(handle))
        return made[-1]

    yield of
    for fd in made:
        os.close(fd)


# -- read-only -------------------------------------------------------------------------------------------------------
def test_nothing_is_written_to_what_may_only_be_read(driver, unit, base):
    handle = put(driver, base, unit)
    driver.map(base + unit, unit, handle)
    driver.set_access(base + unit, unit, writable=False)
    with refused(driver, "zero"):
        driver.zero(base + unit, unit)
    with refused(driver, "copy"):
        driver.copy(base + unit, base, unit)
    driver.copy(base, base + unit + 64, 64)
    driver.synchronize()  # the copy reads there
    driver.set_access(base + unit, unit)
    driver.zero(base + unit, unit)


def test_what_may_only_be_read_follows_its_memory(driver, unit, base, memory):
    handle = put(driver, base, unit)
    driver.map(base + unit, unit, handle)
    driver.set_access(base + unit, unit, writable=False)
    memory(base, unit).fill_(3)
    assert holds(memory(base + unit, unit), 3)
    driver.set_access(base, unit, writable=False)
    driver.set_access(base + unit, unit, writable=True)
    memory(base + unit, unit).fill_(4)
    assert holds(memory(base, unit), 4)


_WRITE = """
import sys, torch
from vattn.driver import open_driver
from vattn.memory.tensors import tensor_from_address
device, action = sys.argv[1:]
driver = open_driver(device)
page = driver.default_page_bytes
address = driver.reserve(page)
driver.map(address, page, driver.create(page))
driver.set_access(address, page, writable=action == "writable")
data = tensor_from_address(address, page, torch.uint8, driver.device, driver)
print((data[1:2] + 0).item(), flush=True)
data[1:2].add_(1)
driver.synchronize()
print("written")
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("action", ["read only", "writable"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_write_to_what_may_only_be_read_faults(device, action):
    """In a child process, since it kills."""
    child = subprocess.run([sys.executable, "-c", _WRITE, device, action], capture_output=True, text=True, timeout=120)
    expected = ["0", "written"] if action == "writable" else ["0"]
    assert child.stdout.split() == expected, child.stderr
    assert (child.returncode == 0) == (action == "writable")


# -- two drivers of one process --------------------------------------------------------------------------------------
def test_an_imported_handle_is_the_same_memory(open_driver, unit, memory, export):
    owner, other = open_driver(), open_driver()
    here, there = owner.reserve(2 * unit), other.reserve(2 * unit)
    handle = put(owner, here, unit)
    memory(here, unit).fill_(5)
    before = other.allocated_bytes()
    fd = export(owner, handle)
    imported = other.import_handle(fd, unit)
    other.map_pages(unit, [there], [imported], [])
    other.map(there + unit, unit, imported)
    other.set_access(there + unit, unit, writable=False)
    assert other.allocated_bytes() == before
    assert holds(memory(there, unit), 5)
    memory(there, unit).fill_(6)
    assert holds(memory(here, unit), 6)
    memory(here, unit).fill_(7)
    assert holds(memory(there + unit, unit), 7)
    # Mapped once more after the export, it is the same memory too.
    owner.map_pages(unit, [here + unit], [handle], [])
    assert holds(memory(here + unit, unit), 7)
    owner.synchronize()


def test_every_mapping_of_a_handle_stays_what_it_is_when_it_is_exported(driver, unit, base, memory, export):
    before = driver.allocated_bytes()
    handle = put(driver, base, unit)
    beside = put(driver, base + unit, unit)
    driver.map(base + 2 * unit, unit, handle)
    driver.set_access(base + 2 * unit, unit, writable=False)
    driver.map(base + 3 * unit, unit, handle)
    memory(base, unit).fill_(1)
    memory(base + unit, unit).fill_(2)
    driver.synchronize()
    export(driver, handle)
    assert driver.allocated_bytes() in (None, (before or 0) + 2 * unit)
    assert holds(memory(base, unit), 1)
    assert holds(memory(base + 2 * unit, unit), 1)
    assert holds(memory(base + unit, unit), 2)
    with refused(driver, "zero"):
        driver.zero(base + 2 * unit, unit)
    with refused(driver, "zero"):
        driver.zero(base + 3 * unit, unit)
    memory(base, unit).fill_(3)
    assert holds(memory(base + 2 * unit, unit), 3)
    driver.synchronize()
    for address in (base, base + unit, base + 2 * unit, base + 3 * unit):
        driver.unmap(address, unit)
    driver.release(handle)
    driver.release(beside)
    assert driver.allocated_bytes() in (None, before)
    fresh: list[int] = []
    driver.create_pages(unit, 3, fresh)
    assert len({*fresh, handle}) >= 3
    driver.map_pages(unit, [base + index * unit for index in range(3)], fresh, [])
    assert holds(memory(base, 3 * unit), 0)


def test_imported_memory_outlives_its_owner(open_driver, unit, memory, export):
    owner, other = open_driver(), open_driver()
    here, there = owner.reserve(unit), other.reserve(unit)
    handle = put(owner, here, unit)
    memory(here, unit).fill_(8)
    owner.synchronize()
    imported = other.import_handle(export(owner, handle), unit)
    owner.unmap(here, unit)
    owner.release(handle)
    again = put(owner, here, unit)  # must not be the same memory
    memory(here, unit).fill_(9)
    other.map(there, unit, imported)
    other.set_access(there, unit, writable=False)
    other.release(imported)
    assert holds(memory(there, unit), 8)
    owner.synchronize()
    owner.unmap(here, unit)
    owner.release(again)
    owner.close()
    assert holds(memory(there, unit), 8)


def test_a_handle_is_exported_often_and_its_descriptor_passed_on(open_driver, unit, memory, export):
    drivers = [open_driver() for _ in range(4)]
    bases = [driver.reserve(2 * unit) for driver in drivers]
    handle = put(drivers[0], bases[0], unit)
    fds = [export(drivers[0], handle), export(drivers[0], handle)]
    fds.append(os.dup(fds[1]))
    for driver, base, fd in zip(drivers[1:], bases[1:], fds, strict=True):
        put(driver, base + unit, unit)  # one of its own beside it
        imported = driver.import_handle(fd, unit)
        driver.map(base, unit, imported)
        driver.set_access(base, unit)
    os.close(fds[2])
    for value, base in enumerate(bases, start=1):
        memory(base, unit).fill_(value)
        assert all(holds(memory(each, unit), value) for each in bases)
    assert all(holds(memory(base + unit, unit), 0) for base in bases[1:])


def test_what_was_imported_is_not_exported_again(open_driver, shares, unit, export):
    """CUDA cannot, so no driver does."""
    owner, other = open_driver(), open_driver()
    imported = other.import_handle(export(owner, owner.create(unit)), unit)
    with refused(other, "export_handle"):
        other.export_handle(imported)


# -- refusals --------------------------------------------------------------------------------------------------------
def test_only_live_handles_are_exported(driver, unit, base):
    gone = driver.create(unit)
    driver.release(gone)
    mapped = put(driver, base, unit)
    driver.release(mapped)
    for handle in (0, gone, mapped):
        with refused(driver, "export_handle"):
            driver.export_handle(handle)


def test_a_driver_without_memory_says_so(driver, driver_case, unit):
    if driver_case.has_memory:
        pytest.skip("this driver has memory")
    handle = driver.create(unit)
    for call, arguments in (("export_handle", (handle,)), ("import_handle", (0, unit))):
        with pytest.raises(DriverError, match="no memory to share") as caught:
            getattr(driver, call)(*arguments)
        assert caught.value.result == "NOT_SUPPORTED"


def test_what_is_no_exported_handle_is_refused(driver, shares, unit, tmp_path):
    (tmp_path / "file").write_bytes(bytes(unit))
    fds = [os.open(tmp_path / "file", os.O_RDWR), os.memfd_create("other"), *os.pipe()]
    os.truncate(fds[1], unit)
    before = dict(driver.book.handles)
    try:
        for fd in fds:
            with pytest.raises(DriverError):
                driver.import_handle(fd, unit)
    finally:
        for fd in fds:
            os.close(fd)
    assert driver.book.handles == before
    for fd, size_bytes in ((0, unit + 1), (-1, unit)):
        with refused(driver, "import_handle"):
            driver.import_handle(fd, size_bytes)


def test_a_handle_of_another_size_cannot_be_mapped(open_driver, shares, unit, export):
    owner, other = open_driver(), open_driver()
    there = other.reserve(4 * unit)
    fd = export(owner, owner.create(unit))
    with pytest.raises(DriverError):
        other.map(there, 2 * unit, other.import_handle(fd, 2 * unit))
    assert not other.book.mappings


# -- two processes ---------------------------------------------------------------------------------------------------
_BEGIN = """
import os, socket, sys, torch
from vattn.driver import open_driver
from vattn.memory.tensors import tensor_from_address
device, size = sys.argv[1], int(sys.argv[2])
peer = socket.socket(fileno=int(sys.argv[3]))
driver = open_driver(device)
address = driver.reserve(size)
memory = lambda: tensor_from_address(address, size, torch.uint8, driver.device, driver)
"""

_OWNER = f"""{_BEGIN}
handle = driver.create(size)
driver.map(address, size, handle)
driver.set_access(address, size)
memory().fill_(42)
driver.synchronize()
socket.send_fds(peer, [b"here"], [driver.export_handle(handle)])
peer.recv(1)  # never comes: it is killed
"""

_READER = f"""{_BEGIN}
_, (fd,), _, _ = socket.recv_fds(peer, 16, 1)
handle = driver.import_handle(fd, size)
os.close(fd)
driver.map(address, size, handle)
driver.set_access(address, size, writable=False)
assert bool((memory() == 42).all())
peer.send(b"read")
assert peer.recv(16) == b"changed"
assert bool((memory() == 43).all())
peer.send(b"read")
assert peer.recv(16) == b"gone"
print(int((memory() == 43).sum()))
driver.synchronize()
driver.unmap(address, size)
driver.release(handle)
driver.close()
"""


@pytest.fixture
def start(driver) -> Iterator[Callable[[str, int], tuple[socket.socket, subprocess.Popen]]]:
    """``start(script, size)``: a process with the driver's device, and the socket to talk to it."""
    started: list[tuple[socket.socket, subprocess.Popen]] = []

    def run(script: str, size: int) -> tuple[socket.socket, subprocess.Popen]:
        mine, its = socket.socketpair()
        mine.settimeout(120)
        command = [sys.executable, "-c", script, str(driver.device), str(size), str(its.fileno())]
        with its:
            started.append((mine, subprocess.Popen(command, pass_fds=[its.fileno()], stdout=-1, text=True)))
        return started[-1]

    yield run
    for mine, process in started:
        process.kill()
        process.communicate()
        mine.close()


def test_another_process_reads_what_it_is_given_and_keeps_it(driver, unit, base, memory, export, start):
    peer, reader = start(_READER, unit)
    handle = put(driver, base, unit)
    memory(base, unit).fill_(42)
    driver.synchronize()
    socket.send_fds(peer, [b"here"], [export(driver, handle)])
    assert peer.recv(16) == b"read"
    memory(base, unit).fill_(43)
    driver.synchronize()
    peer.send(b"changed")
    assert peer.recv(16) == b"read"
    driver.unmap(base, unit)
    driver.release(handle)
    put(driver, base, unit)
    memory(base, unit).fill_(44)  # memory of its own
    driver.synchronize()
    peer.send(b"gone")
    output, _ = reader.communicate(timeout=120)
    assert (reader.returncode, output) == (0, f"{unit}\n")


def test_memory_of_a_process_that_was_killed_stays_with_who_imported_it(driver, unit, base, memory, start):
    peer, owner = start(_OWNER, unit)
    _, (fd,), _, _ = socket.recv_fds(peer, 16, 1)
    handle = driver.import_handle(fd, unit)
    os.close(fd)
    owner.kill()
    owner.wait()
    driver.map(base, unit, handle)
    driver.set_access(base, unit, writable=False)
    assert holds(memory(base, unit), 42)
    driver.set_access(base, unit)
    memory(base, unit).fill_(45)
    assert holds(memory(base, unit), 45)
