"""The host driver moves an exported handle into a file of its own: what is left where that fails, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers.driver_calls import holds, put, state

from vattn.driver import HostDriver, host
from vattn.driver.host_errors import failed
from vattn.errors import DriverError
from vattn.memory.tensors import tensor_from_address

PAGE = 4096


def num_files() -> int:
    links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return sum("memfd:vattn" in link for link in links)


@pytest.fixture
def handle(host_driver: HostDriver) -> int:
    """Mapped three times: to be written, to be read, and without access."""
    base = host_driver.reserve(4 * PAGE)
    handle = put(host_driver, base, PAGE)
    for index in (1, 2):
        host_driver.map(base + index * PAGE, PAGE, handle)
    host_driver.set_access(base + PAGE, PAGE, writable=False)
    data(host_driver, 0).fill_(7)
    return handle


def data(driver: HostDriver, index: int) -> torch.Tensor:
    (base,) = driver.book.ranges
    return tensor_from_address(base + index * PAGE, PAGE, torch.uint8, driver.device, driver)


FAILURES = {
    "no more files": (host.os, "memfd_create", 1, OSError(24, "too many")),
    "no memory": (host.os, "posix_fallocate", 1, OSError(28, "no space")),
    "no copy": (host.os, "sendfile", 1, OSError(5, "input/output")),
    "no first mapping": (host, "map_range", 1, failed("mmap", 12)),
    "no last mapping": (host, "map_range", 3, failed("mmap", 12)),
    "no hole": (host, "punch", 1, failed("fallocate", 95)),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_an_export_that_fails_changes_nothing(host_driver, handle, monkeypatch, failure):
    owner, name, at, error = failure
    perform, calls, before, files = getattr(owner, name), [], state(host_driver), num_files()

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise error
        return perform(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(DriverError):
            host_driver.export_handle(handle)
    assert len(calls) >= at
    assert state(host_driver) == before
    assert num_files() == files
    data(host_driver, 0)[5] = 8
    assert data(host_driver, 1)[4:7].tolist() == [7, 8, 7]
    os.close(host_driver.export_handle(handle))  # and it works now
    assert data(host_driver, 1)[4:7].tolist() == [7, 8, 7]


def test_an_exported_handle_keeps_one_file_until_it_is_gone(host_driver, handle):
    before = num_files()
    for _ in range(3):
        os.close(host_driver.export_handle(handle))
    assert num_files() == before + 1
    host_driver.release(handle)
    assert holds(data(host_driver, 1), 7)
    for address in tuple(host_driver.book.mappings):
        host_driver.unmap(address, PAGE)
    assert num_files() == before
    assert host_driver.allocated_bytes() == 0
    assert host_driver.create(PAGE) == handle  # its place in the file serves the next one


_FORK = """
import os, sys
from vattn.driver import HostDriver
from vattn.errors import DriverError

owner, other = HostDriver(), HostDriver()
page = owner.granularity_bytes
handle = owner.create(page)
fd = owner.export_handle(handle)
imported = other.import_handle(fd, page)
os.close(fd)

def num_files():
    return sum("memfd:vattn" in os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd"))

assert num_files() == 4
if (pid := os.fork()) == 0:
    os._exit(num_files())
assert os.waitpid(pid, 0)[1] == 0
assert num_files() == 4
owner.close(), other.close()
assert num_files() == 0
"""


def test_a_forked_child_keeps_no_file_of_a_handle():
    """In a process of its own, since it forks."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORK]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
