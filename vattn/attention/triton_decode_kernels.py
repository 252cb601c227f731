"""The Triton kernels of ``triton_decode`` and ``uniform_step``. Those import this file when they first launch one, so
that nothing else waits for Triton to be imported, or needs it installed.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .split_kv import attend_rows, combine, divide, finish, rows_of

__all__ = ["append_kernel", "combine_kernel", "decode_attention_kernel"]


@triton.jit(do_not_specialize=["window"])
def decode_attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_address,
    v_address,
    slots_ptr,
    counters_ptr,
    out_ptr,
    partials_ptr,
    ends_ptr,
    starts_ptr,
    sinks_ptr,
    out_stride,
    out_head_stride,
    window,
    q_stride,
    q_head_stride,
    k_slot_stride,
    k_row_stride,
    v_slot_stride,
    v_row_stride,
    scale,
    cap,
    K_HEAD_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    G: tl.constexpr,  # query heads to a KV head
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,  # G as a matrix multiplication takes it, BLOCK_C as little as possible
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    FUSED: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    sequence = tl.program_id(2).to(tl.int64)
    first, end, chunk, splits = divide(sequence, num_splits, ends_ptr, starts_ptr, window, BLOCK_N, HAS_STARTS, 0)
    if split >= splits:
        return
    first += split * chunk
    end = tl.minimum(first + chunk, end)

    head = tl.arange(0, BLOCK_G)
    column, v_column = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    inside = head < G
    q_mask = inside[:, None] if D == BLOCK_D else inside[:, None] & (column < D)
    q_row_ptr = q_ptr + sequence * q_stride + kv_head * G * q_head_stride
    q = tl.load(q_row_ptr + head[:, None] * q_head_stride + column, mask=q_mask, other=0.0)

    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    _head, k_tile, k_step = rows_of(
        k_address, slot, k_slot_stride, kv_head, first, k_row_stride, column, K_HEAD_STRIDE, DTYPE, ALIGN, BLOCK_N
    )
    _head, v_tile, v_step = rows_of(
        v_address, slot, v_slot_stride, kv_head, first, v_row_stride, v_column, V_HEAD_STRIDE, DTYPE, ALIGN, BLOCK_N
    )

    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    rows = tl.maximum(end - first, 0)
    m, total, acc, _seen = attend_rows(
        q, k_tile, v_tile, k_step, v_step, rows, m, total, acc, scale, cap,
        0, D, DV, BLOCK_N, HAS_SOFTCAP, STAGES, WIDEN,
    )  # fmt: skip

    finish(
        m, total, acc, split, num_splits, splits, sequence, kv_head, num_kv_heads,
        counters_ptr, out_ptr, partials_ptr, sinks_ptr, out_stride, out_head_stride,
        G, DV, BLOCK_G, BLOCK_C, BLOCK_DV, BLOCK_S, HAS_SINKS, SPLIT, FUSED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["window", "num_splits"])
def combine_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    partials_ptr,
    ends_ptr,
    starts_ptr,
    sinks_ptr,
    out_stride,
    out_head_stride,
    window,
    num_splits,
    G: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NEW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head, num_heads = tl.program_id(0), tl.num_programs(0)
    sequence = tl.program_id(1).to(tl.int64)
    _first, _end, _chunk, splits = divide(sequence, num_splits, ends_ptr, starts_ptr, window, BLOCK_N, HAS_STARTS, NEW)
    if splits > 1:  # else the only one has written the output
        combine(
            partials_ptr,
            (sequence * num_heads + head // G * G) * num_splits + head % G,
            tl.num_programs(1).to(tl.int64) * num_heads * num_splits,
            splits,
            out_ptr + sequence * out_stride,
            out_head_stride,
            sinks_ptr,
            head,
            1,
            G,
            DV,
            1,
            BLOCK_DV,
            BLOCK_S,
            HAS_SINKS,
        )


@triton.jit
def append_kernel(  # type: ignore[no-untyped-def]
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
    """Append one token of each of equally long sequences to K and V of a layer: a program for a KV head of a sequence,
    grid ``(batch, num_kv_heads, 1)``."""
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
