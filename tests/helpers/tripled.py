"""A forward in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _triple(x, y, count, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, mask=at < count).to(tl.float32) * 3, mask=at < count)


def tripled(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _triple[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), block=1024)
    return y
