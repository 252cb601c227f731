"""What kernels of decode attention share: the division of a context, the online softmax, the combination of splits."""

import triton
import triton.language as tl

__all__ = ["attend", "attend_rows", "combine", "divide", "finish", "rows_of"]


@triton.jit
def divide(  # type: ignore[no-untyped-def]
    sequence,
    splits,
    ends_ptr,
    starts_ptr,
    window,
    BLOCK_N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    NEW: tl.constexpr,
):
    """The rows ``[first, end)`` that the query sees in the cache, how many of them are one split's, and how many
    splits that makes: at least one, at most ``splits``. The last ``NEW`` rows are left out: they are not written yet.

    What may be read before the kernel before this one has ended passes over the first-level cache.
    """
    MODIFIER: tl.constexpr = ".cg" if NEW else ""
    end = tl.load(ends_ptr + sequence, cache_modifier=MODIFIER)
    first = tl.maximum(end - window, 0)
    if HAS_STARTS:
        first = tl.maximum(first, tl.load(starts_ptr + sequence, cache_modifier=MODIFIER))
    end -= NEW
    blocks = tl.maximum((end - first + BLOCK_N - 1) // BLOCK_N, 1)
    chunk = (blocks + splits - 1) // splits
    return first, end, chunk * BLOCK_N, (blocks + chunk - 1) // chunk


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q, k, v, shown, m, total, acc, scale, cap, MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WIDEN: tl.constexpr
):
    """Take one block of rows into the online softmax; ``m`` and the scores are base-2 logarithms."""
    if WIDEN:
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = cap - 2 * cap / (tl.exp2(scores) + 1)
    if MASKED:
        scores = tl.where(shown[None, :], scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, 1))
    weights = tl.exp2(scores - new_m[:, None])
    shrink = tl.exp2(m - new_m)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_m, total, acc


@triton.jit
def rows_of(  # type: ignore[no-untyped-def]
    address, slot, slot_stride, kv_head, first, row_stride, column,
    HEAD_STRIDE: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pointers to row 0 of a slot's KV head, and to the block of rows from ``first`` on; and from block to block."""
    start = tl.multiple_of(address.to(tl.int64).to(tl.pointer_type(DTYPE)), ALIGN)
    head_ptr = start + slot * slot_stride + kv_head * HEAD_STRIDE
    row = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    tile = head_ptr + first.to(tl.int64) * row_stride + row * row_stride + column
    return head_ptr, tile, tl.full((), BLOCK_N, tl.int64) * row_stride


@triton.jit
def attend_rows(  # type: ignore[no-untyped-def]
    q, k_tile, v_tile, k_step, v_step, rows, m, total, acc, scale, cap,
    FIRST: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Take ``rows`` rows into the online softmax, and count the whole blocks that were taken.

    The first ``FIRST`` blocks, whole or not, are left to the caller.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    row, full = tl.arange(0, BLOCK_N), rows // BLOCK_N
    column, v_column = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k_tile += FIRST * k_step
    v_tile += FIRST * v_step
    seen = 0
    for _ in tl.range(FIRST, full, num_stages=STAGES):
        k = tl.load(k_tile) if D == BLOCK_D else tl.load(k_tile, mask=column < D, other=0.0)
        v = tl.load(v_tile) if DV == BLOCK_DV else tl.load(v_tile, mask=v_column < DV, other=0.0)
        m, total, acc = attend(q, k, v, row < BLOCK_N, m, total, acc, scale, cap, False, HAS_SOFTCAP, WIDEN)
        k_tile += k_step
        v_tile += v_step
        seen = seen + 1
    rest = full * BLOCK_N < rows
    if FIRST > 0:
        rest = rest & (full >= FIRST)
    if rest:
        shown = row < rows - full * BLOCK_N
        k = tl.load(k_tile, mask=shown[:, None] & (column < D), other=0.0)
        v = tl.load(v_tile, mask=shown[:, None] & (v_column < DV), other=0.0)
        m, total, acc = attend(q, k, v, shown, m, total, acc, scale, cap, True, HAS_SOFTCAP, WIDEN)
    return m, total, acc, seen


@triton.jit
def write(  # type: ignore[no-untyped-def]
    out_row_ptr, out_head_stride, sinks_ptr, heads, inside, m, total, acc, DV: tl.constexpr, HAS_SINKS: tl.constexpr
):
    """The weighted mean of those heads, with the sink's share; zeros for a sequence without rows."""
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + heads, mask=inside, other=0.0).to(tl.float32)
        total += tl.exp2(sinks * 1.4426950408889634 - m)
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    columns = tl.arange(0, acc.shape[1])[None, :]
    target = out_row_ptr + heads[:, None] * out_head_stride + columns
    tl.store(target, mean.to(out_row_ptr.dtype.element_ty), mask=inside[:, None] & (columns < DV))


@triton.jit
def combine(  # type: ignore[no-untyped-def]
    partials_ptr,
    first_index,  # of the first split and head, counted in heads
    num_indices,
    splits,
    out_row_ptr,
    out_head_stride,
    sinks_ptr,
    first_head,
    COUNT: tl.constexpr,  # of heads
    G: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The softmax over all splits of some heads, several splits at a time to have their loads in flight together.

    The loads pass over the first-level cache, which other SMs' stores do not reach.
    """
    head = tl.arange(0, BLOCK_C)
    inside = head < COUNT
    columns = tl.arange(0, BLOCK_DV)[None, None, :]
    m_ptr = partials_ptr + num_indices * DV
    total_ptr = m_ptr + num_indices
    m = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    acc = tl.zeros((BLOCK_C, BLOCK_DV), tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        index = first_index + split[:, None] * G + head[None, :]
        there = (split < splits)[:, None] & inside[None, :]
        parts = tl.load(
            partials_ptr + index[:, :, None] * DV + columns,
            mask=there[:, :, None] & (columns < DV),
            other=0.0,
            cache_modifier=".cg",
        )
        # A finite stand-in for what is not there: of it and minus infinity no NaN comes.
        part_m = tl.load(m_ptr + index, mask=there, other=-1e38, cache_modifier=".cg")
        part_total = tl.load(total_ptr + index, mask=there, other=0.0, cache_modifier=".cg")
        new_m = tl.maximum(m, tl.max(part_m, 0))
        weights = tl.exp2(part_m - new_m[None, :])
        shrink = tl.exp2(m - new_m)
        total = total * shrink + tl.sum(part_total * weights, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        m = new_m
    write(out_row_ptr, out_head_stride, sinks_ptr, first_head + head, inside, m, total, acc, DV, HAS_SINKS)


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    m,
    total,
    acc,
    split,
    num_splits,
    splits,
    sequence,
    kv_head,
    num_kv_heads,
    counters_ptr,
    out_ptr,
    partials_ptr,
    sinks_ptr,
    out_stride,
    out_head_stride,
    G: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Write what one split found: the output where there is no other, else a partial sum, and with ``FUSED`` the last
    split combines them all."""
    head = tl.arange(0, BLOCK_G)
    inside = head < G
    v_column = tl.arange(0, BLOCK_DV)[None, :]
    out_row_ptr = out_ptr + sequence * out_stride
    first_head = kv_head * G
    if SPLIT and splits > 1:
        pair = sequence * num_kv_heads + kv_head
        num_indices = tl.num_programs(2).to(tl.int64) * num_kv_heads * num_splits * G
        first_index = pair * num_splits * G
        index = first_index + split * G + head
        part_ptr = partials_ptr + index[:, None] * DV + v_column
        tl.store(part_ptr, acc, mask=inside[:, None] & (v_column < DV), cache_modifier=".cg")
        m_ptr = partials_ptr + num_indices * DV + index
        tl.store(m_ptr, m, mask=inside, cache_modifier=".cg")
        tl.store(m_ptr + num_indices, total, mask=inside, cache_modifier=".cg")
        if FUSED:
            tl.debug_barrier()  # the stores of all threads come before the one thread's release
            if tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel") == splits - 1:
                combine(
                    partials_ptr,
                    first_index,
                    num_indices,
                    splits,
                    out_row_ptr,
                    out_head_stride,
                    sinks_ptr,
                    first_head,
                    G,
                    G,
                    DV,
                    BLOCK_C,
                    BLOCK_DV,
                    BLOCK_S,
                    HAS_SINKS,
                )
                tl.store(counters_ptr + pair, 0)
    else:
        write(out_row_ptr, out_head_stride, sinks_ptr, first_head + head, inside, m, total, acc, DV, HAS_SINKS)
