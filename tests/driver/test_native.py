"""The native library: when it is used, and what its batches report where a call of the system fails in the middle."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest

from vattn.driver import HostDriver, native, probe

needs_library = pytest.mark.skipif(native._library()[0] is None, reason=f"no native library: {native._library()[1]}")

PAGE = 4096


# -- whether it is used ----------------------------------------------------------------------------------------------
@needs_library
def test_the_environment_turns_it_off(monkeypatch):
    for value, reason in (("0", "VATTN_NATIVE is 0"), ("1", None)):
        monkeypatch.setenv("VATTN_NATIVE", value)
        driver = HostDriver()
        driver.close()
        assert driver.why_not_native == reason
        assert (reason or "library used") in probe()[1].detail["native"]


@pytest.mark.parametrize("file", ["none", "no library", "another library", "another version"])
def test_without_a_library_that_fits_the_drivers_say_why_and_work(monkeypatch, tmp_path, file):
    path, reason = tmp_path / "library.so", "not built"
    if file == "no library":
        path.write_text("text")
        reason = "cannot be loaded"
    elif file == "another library":
        if subprocess.run(["cc", "-shared", "-o", path, "-x", "c", "/dev/null"]).returncode:
            pytest.skip("there is no C compiler")
        reason = "cannot be loaded"
    elif file == "another version":
        if native._library()[0] is None:
            pytest.skip("there is no library")
        path.symlink_to(native._PATH)
        monkeypatch.setattr(native, "_ABI", -1)
        reason = "built from other sources"
    monkeypatch.setattr(native, "_PATH", path)
    monkeypatch.setenv("VATTN_NATIVE", "1")
    native._library.cache_clear()
    try:
        driver = HostDriver()
        assert reason in driver.why_not_native
        driver.release(driver.create(PAGE))
        driver.close()
    finally:
        native._library.cache_clear()


# -- the host's batches ----------------------------------------------------------------------------------------------
@pytest.fixture
def batches(monkeypatch):
    if native._library()[0] is None:
        pytest.skip("there is no library")
    return native.HostBatches()


def test_an_allocation_that_fails_leaves_those_before_it(batches, tmp_path):
    fd = os.memfd_create("vattn")
    try:
        offsets = [0, 7 * PAGE, (1 << 63) - PAGE, PAGE]  # no file is that long
        num_made, failure = batches.create(fd, PAGE, [offset + 1 for offset in offsets])
        assert (num_made, failure) == (2, ("fallocate", errno.EFBIG))
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
    finally:
        os.close(fd)


@pytest.mark.parametrize("call", ["mmap", "mprotect"])
def test_a_mapping_that_fails_leaves_those_before_it(batches, host_driver, tmp_path, call):
    base = host_driver.reserve(4 * PAGE)
    handles: list[int] = []
    host_driver.create_pages(PAGE, 3, handles)
    addresses = [base, base + PAGE, base + 3 * PAGE]
    if call == "mmap":
        fd, addresses[1], num_calls = os.dup(host_driver._fd), base + 1, 2
    else:  # what may only be read cannot be mapped to be written
        fd, num_calls = os.open(f"/proc/self/fd/{host_driver._fd}", os.O_RDONLY), 1
    try:
        code = errno.EINVAL if call == "mmap" else errno.EACCES
        assert batches.map(fd, PAGE, addresses, handles) == (num_calls, (call, code))
    finally:
        os.close(fd)
