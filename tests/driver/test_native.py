"""The native library: when it is used, and what its batches report where a call of the system fails in the middle."""

from __future__ import annotations

import ctypes
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


@needs_library
def test_who_replaces_a_call_is_called_in_batches_too():
    class Noting(HostDriver):
        def _map(self, *arguments):
            noted.append(arguments)
            super()._map(*arguments)

    noted: list[tuple] = []
    drivers = [Noting(), HostDriver()]
    create = drivers[1]._create
    drivers[1]._create = lambda size_bytes: noted.append((size_bytes,)) or create(size_bytes)
    for driver in drivers:
        noted.clear()
        base, handles = driver.reserve(2 * PAGE), []
        driver.create_pages(PAGE, 2, handles)
        driver.map_pages(PAGE, [base, base + PAGE], handles, [])
        assert len(noted) == 2
        driver.unmap(base, 2 * PAGE)
        for handle in handles:
            driver.release(handle)
        driver.free_range(base, 2 * PAGE)
        driver.close()


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
def batches():
    if native._library()[0] is None:
        pytest.skip("there is no library")
    return native.HostBatches()


def test_an_allocation_that_fails_leaves_those_before_it(batches):
    fd = os.memfd_create("vattn")
    try:
        offsets = [0, 7 * PAGE, (1 << 63) - PAGE, PAGE]  # no file is that long
        num_made, failure = batches.create(fd, PAGE, [offset + 1 for offset in offsets])
        assert (num_made, failure) == (2, ("fallocate", errno.EFBIG))
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
    finally:
        os.close(fd)


@pytest.mark.parametrize("call", ["mmap", "mprotect"])
def test_a_mapping_that_fails_leaves_those_before_it(batches, host_driver, call):
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


# -- CUDA's batches --------------------------------------------------------------------------------------------------
U64, SIZE, POINTER = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p


class Functions:
    """Stands in for the CUDA driver: notes what its functions are called with, and fails when it is told to.

    The suite of all drivers runs on the real one, on a GPU.
    """

    def __init__(self, fail: tuple[str, int] | None = None) -> None:
        self.calls: list[tuple] = []
        self._fail = fail
        self._create = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(U64), SIZE, POINTER, U64)(self.create)
        self._map = ctypes.CFUNCTYPE(ctypes.c_int, U64, SIZE, SIZE, U64, U64)(self.map)
        self._set_access = ctypes.CFUNCTYPE(ctypes.c_int, U64, SIZE, POINTER, SIZE)(self.set_access)
        self.addresses = [ctypes.cast(each, POINTER).value for each in (self._create, self._map, self._set_access)]

    def note(self, *call) -> int:
        kinds = [name for name, *_ in self.calls]
        if self._fail == (call[0], kinds.count(call[0]) + 1):
            return 700 + len(kinds)
        self.calls.append(call)
        return 0

    def create(self, handle, size, properties, flags) -> int:
        handle[0] = (1 << 63) + len(self.calls)
        return self.note("create", size, properties, flags)

    def map(self, address, size, offset, handle, flags) -> int:
        return self.note("map", address, size, offset, handle, flags)

    def set_access(self, address, size, access, count) -> int:
        return self.note("set_access", address, size, access, count)


HANDLES, ADDRESSES = [(1 << 63) + 1, 2, 3], [(1 << 47) + PAGE, 0, 5 * PAGE]


@needs_library
@pytest.mark.parametrize("at", [None, 1, 3])
def test_cuda_handles_are_created_one_after_another(at):
    functions, handles = Functions(at and ("create", at)), [7]
    batches = native.CudaBatches(functions.addresses, 0xABC0, 0xDEF0)
    num_calls, failure = batches.create(1 << 36, 3, handles)
    made = 3 if at is None else at - 1
    assert num_calls == made
    assert failure == (None if at is None else ("cuMemCreate", 700 + made))
    assert handles == [7, *((1 << 63) + index for index in range(made))]
    assert functions.calls == [("create", 1 << 36, 0xABC0, 0)] * made
    assert batches.create(PAGE, 0, handles) == (0, None)


@needs_library
@pytest.mark.parametrize(("call", "at"), [(None, 0), ("map", 1), ("map", 3), ("set_access", 1), ("set_access", 2)])
def test_cuda_pages_are_mapped_one_after_another(call, at):
    functions = Functions((call, at))
    batches = native.CudaBatches(functions.addresses, 0xABC0, 0xDEF0)
    expected = [
        each
        for address, handle in zip(ADDRESSES, HANDLES, strict=True)
        for each in (("map", address, PAGE, 0, handle, 0), ("set_access", address, PAGE, 0xDEF0, 1))
    ]
    made = 6 if call is None else 2 * (at - 1) + (call == "set_access")
    failure = None if call is None else ({"map": "cuMemMap", "set_access": "cuMemSetAccess"}[call], 700 + made)
    assert batches.map(PAGE, ADDRESSES, HANDLES) == (made, failure)
    assert functions.calls == expected[:made]


def test_cuda_bindings_lay_out_what_the_batches_are_called_with():
    """Their structures are passed by address: as cuda.h has them, and kept by the object that gave the address."""
    driver = pytest.importorskip("cuda.bindings.driver")
    properties, access = driver.CUmemAllocationProp(), driver.CUmemAccessDesc()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = 5
    properties.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    access.location = properties.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    assert list((ctypes.c_int32 * 8).from_address(properties.getPtr())) == [1, 1, 1, 5, 0, 0, 0, 0]
    assert list((ctypes.c_int32 * 3).from_address(access.getPtr())) == [1, 5, 3]
