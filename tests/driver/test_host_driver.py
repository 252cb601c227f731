"""The host driver alone: the system's limit of mappings, forked children, and what goes at close."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MAX_MAP_COUNT = int(Path("/proc/sys/vm/max_map_count").read_text())


def run_child(script: str) -> None:
    """Run a script of its own process: it uses up what a process has, or ends in a way that pytest cannot."""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stderr) == (0, ""), child.stderr


def is_mapped(address: int) -> bool:
    """Whether the address belongs to any mapping of this process, accessible or not."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


# -- the limit of mappings -------------------------------------------------------------------------------------------
needs_a_low_limit = pytest.mark.skipif(
    MAX_MAP_COUNT > 200_000, reason=f"vm.max_map_count is {MAX_MAP_COUNT}: reaching it takes too long"
)

_REACH_THE_LIMIT = """
import ctypes, mmap
from pathlib import Path

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
shared = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS  # neighbours of this kind are never merged
limit = Path("/proc/sys/vm/max_map_count").read_text().strip()
# Python needs mappings itself to get memory: blocks of every size, every other one freed, spare it that at the limit.
ballast = [bytes(size) for size in (*range(16, 4096, 16), *range(4096, 120000, 8192)) for _ in range(64)]
del ballast[::2]

taken = []

def reach_the_limit():
    none = None, ctypes.c_size_t(4096), mmap.PROT_READ, shared, -1, ctypes.c_int64(0)
    while (address := libc.mmap(*none)) != 2**64 - 1:
        taken.append(address)
"""

_DRIVER_AT_THE_LIMIT = f"""{_REACH_THE_LIMIT}
from vattn.driver import HostDriver
from vattn.errors import DriverError

def refused(call, function, *arguments):
    before = driver.counts.num_map, driver.counts.num_set_access, len(driver.book.mappings)
    try:
        function(*arguments)
    except DriverError as error:
        assert (error.call, error.result, error.out_of_memory) == (call, "ENOMEM", True), error
        assert "vm.max_map_count" in str(error) and limit in str(error), error
    else:
        raise AssertionError("there is room for more mappings")
    assert before == (driver.counts.num_map, driver.counts.num_set_access, len(driver.book.mappings))

driver = HostDriver()
page = driver.granularity_bytes
base = driver.reserve(16 * page)
# Pages that lie side by side in the file too are one mapping to the kernel; to change the middle one takes two more.
for index in range(6):
    driver.map(base + index * page, page, driver.create(page))
driver.set_access(base, 3 * page)
handle = driver.create(page)
reach_the_limit()
refused("mprotect", driver.set_access, base + 4 * page, page)
for _ in range(3):
    refused("mmap", driver.map, base + 9 * page, page, handle)
for index in (1, 0, 2, 5, 4, 3):  # the first from the middle; what follows leaves no more mappings than there were
    driver.unmap(base + index * page, page)
assert not driver.book.mappings
for address in taken[-500:]:
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(4096))
driver.map(base, page, handle)
driver.set_access(base, page)
driver.zero(base, page)
"""

_CACHE_AT_THE_LIMIT = f"""{_REACH_THE_LIMIT}
import torch, vattn

layout = vattn.KVLayout(4, 1, 512, 8, torch.float32, order="layer")  # two tokens a page, eight lanes
cache = vattn.KVCache(layout, max_slots=4, device="cpu", memory_limit=256 * 4096, page_bytes=4096)
one, two, three, more = (cache.acquire() for _ in range(4))
cache.ensure_batch([one, two, three], [6, 4, 4])
for tensor in (*cache.rows(one, 3), *cache.rows(two, 0)):
    tensor.fill_(3.0)
reach_the_limit()

for attempt in (1, 2):
    before = cache.stats()
    try:
        cache.ensure(more, 2)
    except vattn.OutOfPages as error:
        assert "vm.max_map_count" in str(error) and limit in str(error), error
    else:
        raise AssertionError("there is room for more mappings")
    after = cache.stats()
    assert after.num_oom == attempt
    for name in ("mapped_bytes", "in_use_bytes", "row_bytes", "waste_bytes", "physical_bytes"):
        assert getattr(after, name) == getattr(before, name), name
    assert cache.seq_len(more) == 0
    cache.check_integrity()

cache.release(two)  # two, since pages that are used again need not lie side by side in the file any more
cache.release(three)
cache.check_integrity()
cache.ensure(more, 2)
cache.check_integrity()
assert all(tensor.eq(3.0).all() for tensor in cache.rows(one, 3))
assert all(tensor.eq(0.0).all() for tensor in cache.rows(more, 0))
cache.close()
assert "memfd:vattn" not in Path("/proc/self/maps").read_text()
"""


@needs_a_low_limit
def test_the_driver_at_the_limit_of_mappings():
    run_child(_DRIVER_AT_THE_LIMIT)


@needs_a_low_limit
def test_a_cache_at_the_limit_of_mappings():
    run_child(_CACHE_AT_THE_LIMIT)


def test_too_many_addresses_do_not_blame_the_limit_of_mappings(host_driver):
    with pytest.raises(RuntimeError) as caught:
        host_driver.reserve(1 << 47)
    assert "max_map_count" not in str(caught.value)


# -- the end ---------------------------------------------------------------------------------------------------------
def test_close_gives_back_the_file_and_pages_and_the_last_view_the_addresses(make_cache):
    cache = make_cache()
    slot = cache.acquire()
    cache.ensure(slot, 100)
    view = cache.k(0)
    address = view.data_ptr()
    assert "memfd:vattn" in Path("/proc/self/maps").read_text()
    cache.close()
    assert not any("memfd:vattn" in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    assert "memfd:vattn" not in Path("/proc/self/maps").read_text()
    assert is_mapped(address)
    last = view[1:3, :2].unflatten(3, (2, 32))
    del view
    assert is_mapped(address)
    del last
    assert not is_mapped(address)


def test_a_cache_that_nobody_closed_goes_all_the_same():
    import vattn

    cache = vattn.KVCache(vattn.KVLayout(1, 1, 64, 64, torch.float32), 2, "cpu", 8 << 20)
    cache.ensure(cache.acquire(), 10)
    address = cache.k(0).data_ptr()
    del cache  # what is left of it is for the fixture that looks for leaks
    assert not is_mapped(address)


def test_the_file_is_not_inherited_by_other_programs(host_driver):
    assert not os.get_inheritable(host_driver._fd)


_FORK = """
import gc, os, signal, sys, torch, vattn
cache = vattn.KVCache(vattn.KVLayout(2, 2, 64, 4096, torch.float32), 4, "cpu", 64 << 20)
slot = cache.acquire()
cache.ensure(slot, 3000)
for tensor in cache.rows(slot, 1):
    tensor.fill_(7.0)
view = cache.rows(slot, 1)[0]

def child():
    global cache
    cache.close()  # has nothing to close here
    # The views it inherited have nothing behind them: a write cannot reach the parent.
    if (pid := os.fork()) == 0:
        view[0] = 8.0
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGSEGV
    if sys.argv[1:] == ["drop"]:
        del cache
        gc.collect()

if (pid := os.fork()) == 0:
    child()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert all(tensor.eq(7.0).all() for tensor in cache.rows(slot, 1))
cache.check_integrity()
cache.ensure(slot, 4096)
assert cache.rows(slot, 1)[0][3000:].eq(0.0).all()
"""


@pytest.mark.parametrize("end", ["drop", "keep"])
def test_a_forked_child_leaves_its_parents_pages_alone(end):
    child = subprocess.run([sys.executable, "-c", _FORK, end], capture_output=True, text=True, timeout=120)
    # Python itself warns of fork() in a process with threads, and torch has some.
    errors = [
        line for line in child.stderr.splitlines() if "DeprecationWarning" not in line and "os.fork()" not in line
    ]
    assert (child.returncode, errors) == (0, [])


# -- forked children ---------------------------------------------------------------------------------------------------
_PARENT = """
import os, sys, time, torch, vattn
cache = vattn.KVCache(vattn.KVLayout(1, 1, 512, 65536, torch.float32), 2, device="cpu", memory_limit=64 << 20)
cache.ensure(cache.acquire(), 10000)
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def num_holding(pid: int) -> tuple[int, int]:
    """Files and mappings of a cache's memory that a process has."""
    files = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    return sum("memfd:vattn" in name for name in files), Path(f"/proc/{pid}/maps").read_text().count("memfd:vattn")


def test_a_forked_child_keeps_nothing_of_the_memory():
    """Which is freed, then, when its parent ends, however long the child lives on."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        try:
            assert num_holding(parent.pid)[0] == 1
            assert num_holding(parent.pid)[1] > 0
            assert num_holding(child) == (0, 0)
            parent.kill()
            parent.wait()
            assert num_holding(child) == (0, 0)
        finally:
            parent.kill()
            os.kill(child, signal.SIGKILL)
