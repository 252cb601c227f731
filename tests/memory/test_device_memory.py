"""``physical_bytes`` against what the device itself reports as taken."""

from __future__ import annotations

import pytest
import torch

import vattn

# What the driver takes for its own tables beside 1 to 4,096 handles of 2 MiB.
MARGIN_BYTES = 4 << 20

LAYOUT = vattn.KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, max_seq_len=131072, dtype=torch.bfloat16)


@pytest.mark.gpu
def test_physical_bytes_follow_the_device(record_property):
    with vattn.KVCache(LAYOUT, 2, device="cuda") as cache:
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        if any(torch.cuda.mem_get_info()[0] != free for _ in range(20)):
            pytest.skip("another process is using this GPU")
        slot, worst = cache.acquire(), 0
        for pages in (1, 2, 16, 255, 256, 1000, 4096):
            cache.ensure(slot, 16 * pages)
            torch.cuda.synchronize()
            taken = free - torch.cuda.mem_get_info()[0]
            assert cache.stats().physical_bytes == pages * cache.page_bytes
            worst = max(worst, abs(taken - cache.stats().physical_bytes))
        child = cache.fork(slot)  # mapped twice, taken once
        worst = max(worst, abs(free - torch.cuda.mem_get_info()[0] - cache.stats().physical_bytes))
        cache.release(child)
        cache.release(slot)
        cache.trim()
        left = free - torch.cuda.mem_get_info()[0]
        record_property("worst_bytes", worst)
        print(f"the device and the cache differ by at most {worst} bytes; {left} bytes are left when all is given back")
        assert worst <= MARGIN_BYTES
        assert left <= MARGIN_BYTES
