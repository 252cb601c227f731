"""How much memory the host driver may take: the machine's, or what control groups and the process's limits leave."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vattn.driver import HostDriver
from vattn.machine import available_and_total_bytes

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """``machine(files)``: what is found under a root folder with these files, and 16 of 32 GiB available."""

    def build(files: dict[str, str]) -> tuple[int, int]:
        meminfo = (
            f"MemTotal: {32 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {16 * GIB >> 10} kB\nHugePages_Total: 0\n"
        )
        for name, text in {"proc/meminfo": meminfo, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return available_and_total_bytes(tmp_path)

    return build


V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"
MEMORY = {
    "no groups": ({"proc/self/cgroup": ""}, (16, 32)),
    "v2 without a limit": (
        {"proc/self/cgroup": "0::/a\n", V2 + "a/memory.max": "max\n", V2 + "a/memory.current": "5\n"},
        (16, 32),
    ),
    "v2": (
        {"proc/self/cgroup": "0::/a\n", V2 + "a/memory.max": f"{8 * GIB}\n", V2 + "a/memory.current": f"{3 * GIB}\n"},
        (5, 8),
    ),
    "v2, page cache is not used up": (
        {
            "proc/self/cgroup": "0::/a\n",
            V2 + "a/memory.max": f"{8 * GIB}\n",
            V2 + "a/memory.current": f"{3 * GIB}\n",
            V2 + "a/memory.stat": f"anon 1\nfile 2\ninactive_file {1 * GIB}\nactive_file 9\n",
        },
        (6, 8),
    ),
    "v2, the limit is a parent's": (
        {
            "proc/self/cgroup": "0::/a/b/c\n",
            V2 + "a/memory.max": f"{12 * GIB}\n",
            V2 + "a/memory.current": f"{2 * GIB}\n",
            V2 + "a/b/memory.max": "max\n",
            V2 + "a/b/memory.current": "1\n",
        },
        (10, 12),
    ),
    "v2, the tightest of several": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            V2 + "a/memory.max": f"{9 * GIB}\n",
            V2 + "a/memory.current": f"{8 * GIB}\n",
            V2 + "a/b/memory.max": f"{4 * GIB}\n",
            V2 + "a/b/memory.current": f"{1 * GIB}\n",
        },
        (1, 4),
    ),
    "v2, over the limit": (
        {"proc/self/cgroup": "0::/\n", V2 + "memory.max": f"{2 * GIB}\n", V2 + "memory.current": f"{3 * GIB}\n"},
        (0, 2),
    ),
    "v2, more than the machine": (
        {"proc/self/cgroup": "0::/\n", V2 + "memory.max": f"{99 * GIB}\n", V2 + "memory.current": "0\n"},
        (16, 32),
    ),
    "v1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/a\n1:name=systemd:/a:b\n",
            V1 + "a/memory.limit_in_bytes": f"{8 * GIB}\n",
            V1 + "a/memory.usage_in_bytes": f"{6 * GIB}\n",
            V1 + "a/memory.stat": f"inactive_file 1\ntotal_inactive_file {1 * GIB}\n",
        },
        (3, 8),
    ),
    "v1 without a limit": (
        {
            "proc/self/cgroup": "4:memory:/\n",
            V1 + "memory.limit_in_bytes": "9223372036854771712\n",
            V1 + "memory.usage_in_bytes": f"{6 * GIB}\n",
        },
        (16, 32),
    ),
    "v1, in a container that sees its own group as the root": (
        {
            "proc/self/cgroup": "4:hugetlb,memory:/docker/0123\n",
            V1 + "memory.limit_in_bytes": f"{8 * GIB}\n",
            V1 + "memory.usage_in_bytes": f"{2 * GIB}\n",
        },
        (6, 8),
    ),
}


@pytest.mark.parametrize(("files", "expected_gib"), MEMORY.values(), ids=MEMORY.keys())
def test_memory_of_the_machine_and_its_control_groups(machine, files, expected_gib):
    assert machine(files) == tuple(gib * GIB for gib in expected_gib)


def test_memory_info_is_this_machines(host_driver):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available, limited_total = HostDriver.memory_info(host_driver)
    assert 0 < available <= limited_total <= total


# -- the process's own limits ----------------------------------------------------------------------------------------
_LIMITS = """
import ctypes, os, resource, signal, torch, vattn
from vattn.driver import HostDriver, probe

def lower(which, value):
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    return lambda: resource.setrlimit(which, before)

def raises(kind, words, function, *arguments):
    try:
        function(*arguments)
    except kind as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("it was not refused")

layout = vattn.KVLayout(1, 1, 512, 65536, torch.float32)  # a row is 4096 bytes

def open_cache(limit=256 << 20):
    return vattn.KVCache(layout, 2, device="cpu", memory_limit=limit, page_bytes=1 << 20)
"""

_NO_MORE_FILES = """
cache = open_cache()
slot = cache.acquire()
restore = lower(resource.RLIMIT_NOFILE, 64)
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
raises(vattn.ConfigError, ["EMFILE", "RLIMIT_NOFILE is 64", "ulimit -n"], open_cache)
raises(vattn.DriverError, ["EMFILE", "RLIMIT_NOFILE is 64", "ulimit -n"], cache.ensure, slot, 60000)
assert "RLIMIT_NOFILE" in probe()[1].reason
assert cache.seq_len(slot) == 0
for fd in taken:
    os.close(fd)
cache.check_integrity()
cache.ensure(slot, 60000)
cache.close()
"""

_NO_LARGER_FILE = """
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # as an embedding program may have it: it ends the process
cache = open_cache()
first, second = cache.acquire(), cache.acquire()
cache.ensure(first, 1024)
lower(resource.RLIMIT_FSIZE, 8 << 20)
raises(vattn.OutOfPages, ["EFBIG", f"RLIMIT_FSIZE is {8 << 20} bytes", "ulimit -f"], cache.ensure, second, 2048)
cache.check_integrity()
assert cache.seq_len(second) == 0
cache.release(first)
cache.ensure(second, 2048)  # eight pages: the ones that are there suffice
cache.close()
"""

_NO_MORE_ADDRESSES = """
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
lower(resource.RLIMIT_AS, size + (256 << 20))
raises(vattn.ConfigError, ["RLIMIT_AS", "ulimit -v"], open_cache)
"""

_SANDBOXED = """
import platform, struct
number = {"x86_64": 319, "aarch64": 279}[platform.machine()]  # memfd_create
code = b"".join(struct.pack("HBBI", *instruction) for instruction in (
    (0x20, 0, 0, 0),  # the number of the call
    (0x15, 0, 1, number),
    (0x06, 0, 0, 0x00050000 | 1),  # EPERM
    (0x06, 0, 0, 0x7FFF0000),  # allowed
))
buffer = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0
raises(vattn.ConfigError, ["memfd_create failed with EPERM", "seccomp"], open_cache)
assert "seccomp" in probe()[1].reason
"""


@pytest.mark.parametrize("limit", [_NO_MORE_FILES, _NO_LARGER_FILE, _NO_MORE_ADDRESSES, _SANDBOXED])
def test_a_limit_of_the_process_is_named_with_what_raises_it(limit):
    """In a process of its own, since it uses up what a process has."""
    child = subprocess.run([sys.executable, "-c", _LIMITS + limit], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stderr) == (0, ""), child.stderr
