"""How fast this GPU reads its memory: what a step that reads so many bytes takes at least."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from common import Records

_BLOCK = 8192  # int32 values of a program
_NUM_BYTES, _REPEATS = 4 << 30, 20


@triton.jit
def _read(values, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    tl.store(sums + program, tl.sum(tl.load(values + program * BLOCK + tl.arange(0, BLOCK)), 0))


@cache
def read_bytes_per_s() -> float:
    """The best of several plain reads of 4 GiB; 3.03e12 on an H100 (SXM, 80 GB)."""
    values = torch.ones(_NUM_BYTES // 4, dtype=torch.int32, device="cuda")
    sums = torch.empty(len(values) // _BLOCK, dtype=torch.int32, device="cuda")
    found = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        _read[(len(sums),)](values, sums, BLOCK=_BLOCK, num_warps=8)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    assert bool((sums == _BLOCK).all()), "the read missed values"
    return _NUM_BYTES / min(found)


def add_limit(records: Records, case: str, metric: str, num_bytes: float, unit: str = "ms") -> None:
    """The record of the time that reading takes, as ``limit``; ``unit``: ms or us."""
    records.add(case, "limit", metric, unit, [num_bytes / read_bytes_per_s() * {"ms": 1e3, "us": 1e6}[unit]])
