"""Two processes on one device: one is killed while it grows, and the other neither suffers nor misses the memory."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vattn

LAYOUT = vattn.KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, max_seq_len=1 << 20, dtype=torch.bfloat16)
WAIT_SECONDS = 120

# Holds one sequence, and lets others grow beside it and end, until it is killed.
_GROWER = """
import sys, torch, vattn

device, rows = sys.argv[1], int(sys.argv[2])
layout = vattn.KVLayout(32, 8, 128, 1 << 20, torch.bfloat16)
cache = vattn.KVCache(layout, 2, device, memory_limit=rows * layout.bytes_per_token * 5 // 4)
cache.ensure(cache.acquire(), rows)
print(cache.stats().in_use_bytes, flush=True)
while True:
    slot = cache.acquire()
    for length in range(rows // 64, rows // 5, rows // 64):
        cache.ensure(slot, length)
        cache.rows(slot, 0)[0][length - 1] = 1
    cache.release(slot)
    cache.trim()
"""


def free_bytes(device: str) -> int:
    """What is free on the device; on the CPU, where all take some all the time, less what memfds and such take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return -1024 * int(Path("/proc/meminfo").read_text().split("Shmem:")[1].split()[0])


class Survivor:
    """One long sequence, whose rows are read and written again by every ``work``, and a short one beside it."""

    def __init__(self, cache: vattn.KVCache) -> None:
        self.cache, self.value = cache, 0
        self.kept = cache.acquire()
        cache.ensure(self.kept, 200)

    def rows(self, slot: int) -> list[torch.Tensor]:
        return [tensor for layer in (0, 31) for tensor in self.cache.rows(slot, layer)]

    def work(self) -> None:
        slot = self.cache.acquire()
        self.cache.ensure(slot, 100)
        assert all((tensor == self.value).all() for tensor in self.rows(self.kept))
        assert not any(tensor.any() for tensor in self.rows(slot))
        self.value = (self.value + 1) % 256  # exact in bfloat16
        for tensor in (*self.rows(self.kept), *self.rows(slot)):
            tensor.fill_(self.value)
        self.cache.release(slot)


def test_a_process_that_is_killed_while_it_grows_leaves_its_memory_to_the_other(device):
    free = free_bytes(device)
    if device == "cuda" and any(free_bytes(device) != free for _ in range(20)):
        pytest.skip("another process is using this GPU")
    # On a GPU more than would be left for a second one; on the CPU enough to stand out among what others do.
    size = 1 << 30 if device == "cpu" else free * 6 // 10
    slack = size // 2 if device == "cpu" else size // 10
    rows = size // LAYOUT.bytes_per_token
    with vattn.KVCache(LAYOUT, 3, device, memory_limit=size + (1 << 28)) as cache:
        survivor = Survivor(cache)
        for _ in range(3):  # from here on it takes no more memory
            survivor.work()
        before = free_bytes(device)
        command = [sys.executable, "-c", _GROWER, device, str(rows)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            try:
                deadline = time.monotonic() + WAIT_SECONDS
                while not select.select([child.stdout], [], [], 0)[0]:
                    assert time.monotonic() < deadline, "the other process did not come to hold its memory"
                    survivor.work()
                assert int(child.stdout.readline() or 0) >= size - cache.page_bytes
                held = free_bytes(device)
                assert before - held >= size - slack
                assert device == "cpu" or held < size, "there would have been room for both"
                killed_at = time.monotonic() + 2
                while time.monotonic() < killed_at:  # the other one grows, gives back, and grows
                    survivor.work()
                assert child.poll() is None, "it ended before it was killed"
            finally:
                child.kill()
        deadline = time.monotonic() + WAIT_SECONDS
        while free_bytes(device) < before - slack:
            assert time.monotonic() < deadline, f"{before - free_bytes(device)} bytes of {size} did not come back"
            survivor.work()
        slot = cache.acquire()
        cache.ensure(slot, rows)
        for row in (0, rows - 1):
            assert not cache.rows(slot, 31)[1][row].any()
            cache.rows(slot, 31)[1][row] = 7
        survivor.work()
        assert (cache.rows(slot, 31)[1][[0, rows - 1]] == 7).all()
        cache.check_integrity()
