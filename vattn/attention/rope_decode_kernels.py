"""The Triton kernel of ``rope_decode``, imported when it is first launched."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .split_kv import attend, attend_rows, divide, finish, rows_of

__all__ = ["rope_decode_kernel"]


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    source, partner, split_stride, mask, SPLITS: tl.constexpr
):
    """Columns of some heads and what each rotates with, summed over the splits of their product, in float32."""
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(partner, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(source + split * split_stride, mask=mask, other=0.0).to(tl.float32)
        other += tl.load(partner + split * split_stride, mask=mask, other=0.0).to(tl.float32)
    return x, other


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, other, cos, sin, norm_ptr, column, partner, inside, eps, offset, D: tl.constexpr, NORM: tl.constexpr
):
    """The norm of a head, if it has one, and its rotation; ``sin`` has the sign of each column."""
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= scale * (tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset)
        other *= scale * (tl.load(norm_ptr + partner, mask=inside, other=0.0).to(tl.float32) + offset)
    return x * cos + other * sin


@triton.jit(do_not_specialize=["window"])
def rope_decode_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
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
    qkv_stride,
    qkv_split_stride,
    angles_stride,
    angle_stride,
    k_slot_stride,
    k_row_stride,
    v_slot_stride,
    v_row_stride,
    scale,
    cap,
    eps,
    offset,
    K_HEAD_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HALF: tl.constexpr,  # pairs that rotate
    BY_ROW: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QKV_SPLITS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    FUSED: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """As ``decode_attention_kernel``, of the QKV product: it rotates, and appends the new row of K and V.

    With ``EARLY`` it reads lengths, slots, angles, and the first block of older rows before the kernel before it has
    ended. What changes from step to step passes over the first-level cache, which may hold lines of an earlier one.
    """
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    sequence = tl.program_id(2).to(tl.int64)
    first, end, chunk, splits = divide(sequence, num_splits, ends_ptr, starts_ptr, window, BLOCK_N, HAS_STARTS, 1)
    if split >= splits:
        return
    new_row = end  # the row of the new token: ``end`` is one past the older ones
    first += split * chunk
    end = tl.minimum(first + chunk, end)

    head = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)[None, :]
    v_column = tl.arange(0, BLOCK_DV)[None, :]
    inside = head < G
    slot = tl.load(slots_ptr + sequence, cache_modifier=".cg").to(tl.int64)
    k_head, k_tile, k_step = rows_of(
        k_address, slot, k_slot_stride, kv_head, first, k_row_stride, column, K_HEAD_STRIDE, DTYPE, ALIGN, BLOCK_N
    )
    v_head, v_tile, v_step = rows_of(
        v_address, slot, v_slot_stride, kv_head, first, v_row_stride, v_column, V_HEAD_STRIDE, DTYPE, ALIGN, BLOCK_N
    )
    rows = tl.maximum(end - first, 0)

    turns = column < 2 * HALF
    if INTERLEAVED:
        first_of_pair, angle = column % 2 == 0, column // 2
        partner = tl.where(first_of_pair, column + 1, column - 1)
    else:
        first_of_pair = column < HALF
        angle = tl.where(first_of_pair, column, column - HALF)
        partner = tl.where(first_of_pair, column + HALF, column - HALF)
    partner = tl.where(turns, partner, column)
    at = (new_row.to(tl.int64) if BY_ROW else sequence) * angles_stride + angle * angle_stride
    cos = tl.load(cos_ptr + at, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where(first_of_pair, -sin, sin)
    d_inside = column < D
    if EARLY:
        shown = tl.arange(0, BLOCK_N) < rows
        k_early = tl.load(k_tile, mask=shown[:, None] & d_inside, other=0.0, cache_modifier=".cg")
        v_early = tl.load(v_tile, mask=shown[:, None] & (v_column < DV), other=0.0, cache_modifier=".cg")
        if PDL:
            gdc_wait()

    qkv_row = qkv_ptr + sequence * qkv_stride
    q_heads = (kv_head * G + head[:, None]) * D
    q_mask = inside[:, None] & d_inside
    q, q_other = _gather(qkv_row + q_heads + column, qkv_row + q_heads + partner, qkv_split_stride, q_mask, QKV_SPLITS)
    q = _turn(q, q_other, cos, sin, q_norm_ptr, column, partner, d_inside, eps, offset, D, Q_NORM).to(DTYPE)

    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    m, total, acc, seen = attend_rows(
        q, k_tile, v_tile, k_step, v_step, rows, m, total, acc, scale, cap,
        1 if EARLY else 0, D, DV, BLOCK_N, HAS_SOFTCAP, STAGES, WIDEN,
    )  # fmt: skip
    if EARLY:  # noqa: SIM102 - known to the compiler, which rows is not
        if rows > 0:
            # In registers until here: a value that comes of the loop is one that Triton cannot store before it.
            k_early = tl.where(seen >= 0, k_early, 0.0)
            v_early = tl.where(seen >= 0, v_early, 0.0)
            m, total, acc = attend(q, k_early, v_early, shown, m, total, acc, scale, cap, True, HAS_SOFTCAP, WIDEN)

    if split == splits - 1:  # the new token's row
        k_source = qkv_row + (num_kv_heads * G + kv_head) * D
        new_k, k_other = _gather(k_source + column, k_source + partner, qkv_split_stride, d_inside, QKV_SPLITS)
        new_k = _turn(new_k, k_other, cos, sin, k_norm_ptr, column, partner, d_inside, eps, offset, D, K_NORM).to(DTYPE)
        v_source = qkv_row + (num_kv_heads * (G + 1)) * D + kv_head * DV
        v_inside = v_column < DV
        new_v = tl.load(v_source + v_column, mask=v_inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, QKV_SPLITS):
            new_v += tl.load(v_source + part * qkv_split_stride + v_column, mask=v_inside, other=0.0).to(tl.float32)
        new_v = new_v.to(DTYPE)
        tl.store(k_head + new_row.to(tl.int64) * k_row_stride + column, new_k, mask=d_inside)
        tl.store(v_head + new_row.to(tl.int64) * v_row_stride + v_column, new_v, mask=v_inside)
        score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
        if HAS_SOFTCAP:
            score = cap - 2 * cap / (tl.exp2(score) + 1)
        new_m = tl.maximum(m, score)
        weight, shrink = tl.exp2(score - new_m), tl.exp2(m - new_m)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * new_v.to(tl.float32)
        m = new_m

    finish(
        m, total, acc, split, num_splits, splits, sequence, kv_head, num_kv_heads,
        counters_ptr, out_ptr, partials_ptr, sinks_ptr, out_stride, out_head_stride,
        G, DV, BLOCK_G, BLOCK_C, BLOCK_DV, BLOCK_S, HAS_SINKS, SPLIT, FUSED,
    )  # fmt: skip
