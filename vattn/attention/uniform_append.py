"""The Triton kernel that appends one token of each of equally long sequences to K and V of a layer."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["append_kernel"]


@cache
def append_kernel() -> Any:
    """One program for a KV head of a sequence, grid ``(batch, num_kv_heads, 1)``."""
    import triton
    import triton.language as tl

    @triton.jit
    def append(  # type: ignore[no-untyped-def]
        new_k_ptr,
        new_v_ptr,
        ends_ptr,  # tokens of each sequence, the new one included
        k_address,  # a number: Triton's interpreter would copy a tensor, memory that is not there included
        v_address,
        new_k_stride,
        new_k_head_stride,
        new_v_stride,
        new_v_head_stride,
        k_stride,
        k_row_stride,
        k_head_stride,
        v_stride,
        v_row_stride,
        v_head_stride,
        DTYPE: tl.constexpr,
        D: tl.constexpr,
        DV: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_DV: tl.constexpr,
    ):
        sequence = tl.program_id(0).to(tl.int64)  # a cache has more than 2^31 elements
        head = tl.program_id(1).to(tl.int64)
        row = tl.load(ends_ptr + sequence).to(tl.int64) - 1
        column, v_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        new_k = tl.load(new_k_ptr + sequence * new_k_stride + head * new_k_head_stride + column, mask=column < D)
        new_v = tl.load(new_v_ptr + sequence * new_v_stride + head * new_v_head_stride + v_column, mask=v_column < DV)
        k_ptr = k_address.to(tl.int64).to(tl.pointer_type(DTYPE))
        v_ptr = v_address.to(tl.int64).to(tl.pointer_type(DTYPE))
        k_row = k_ptr + sequence * k_stride + row * k_row_stride + head * k_head_stride
        v_row = v_ptr + sequence * v_stride + row * v_row_stride + head * v_head_stride
        tl.store(k_row + column, new_k, mask=column < D)
        tl.store(v_row + v_column, new_v, mask=v_column < DV)

    return append
