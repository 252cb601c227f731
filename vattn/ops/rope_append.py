"""QK-norm, rotary embedding, and the append of K and V to the cache, in one pass."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .triton_support import (
    address_of,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch_options,
    next_power_of_2,
    require_triton,
    tl,
)

__all__ = ["require_angles", "rope_append", "rope_append_reference", "rope_table"]

# Heads of a program. A decode step wants many programs, so that few tokens fill the GPU; a prefill wants fewer of more
# work: 8,192 tokens of 8B heads take an H100 241 µs with one, 122 with two, 79 with four, 81 with eight.
_HEADS, _MANY_TOKENS = 4, 512


def rope_table(frequencies: torch.Tensor, max_positions: int) -> torch.Tensor:
    """Cosines and sines of every position's angles, ``[max_positions, 2, head_dim / 2]`` float32.

    Args:
        frequencies: ``[head_dim / 2]`` float32, radians a position (Su et al. 2021, scaled or not).
    """
    positions = torch.arange(max_positions, device=frequencies.device, dtype=torch.float32)
    angles = positions[:, None] * frequencies.float()
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def require_angles(table: torch.Tensor | tuple[torch.Tensor, torch.Tensor], tokens: int, head_dim: int) -> None:
    """ConfigError where a kernel would write past a head, or read past the tokens."""
    if isinstance(table, tuple) and not all(
        each.is_floating_point() and each.dim() == 2 and each.shape[0] == tokens and 2 * each.shape[1] <= head_dim
        for each in table
    ):
        raise ConfigError(
            f"expected cosines and sines [{tokens}, at most {head_dim // 2}], got {[[*each.shape] for each in table]} "
            f"of {table[0].dtype}"
        )


def rope_append_reference(
    qkv: torch.Tensor,
    table: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """Normalise Q and K heads where asked, rotate them by their position, write K and V to the cache.

    All is computed in float32 or wider and rounded once. As in most Hugging Face checkpoints, a pair is half a head
    apart: ``(x[i], x[i + head_dim / 2])`` rotates by the angle ``i``. Where there are fewer angles than pairs, the
    first ``2 * angles`` dimensions rotate among themselves, and the others stay.

    Args:
        qkv: ``[tokens, (num_heads + 2 * num_kv_heads) * head_dim]``, Q's heads first, then K's, then V's; or
            ``[splits, tokens, …]`` partial sums.
        table: ``rope_table``; or the cosines and sines of each token's angles, ``[tokens, angles]`` each, any strides.
        slots: ``[tokens]`` int, the slot of each token.
        rows: ``[tokens]`` int, the token's row in the slot, which is also its position.
        k_cache, v_cache: ``[max_slots, max_seq_len, num_kv_heads, head_dim]``, any strides but the last.
        q_norm, k_norm: ``[head_dim]``, weights of the norm over each head; None for none.
        eps: of that norm.
        norm_offset: added to the norms' weights; 1 for Gemma's.
        interleaved: ``(x[2 * i], x[2 * i + 1])`` rotates by the angle ``i`` instead.

    Returns:
        Q, ``[tokens, num_heads, head_dim]``, in qkv's dtype, or in the cache's where qkv is partial sums.

    Raises:
        ConfigError: angles of other tokens, or of more dimensions than a head has.
    """
    head_dim, num_kv_heads = k_cache.shape[3], k_cache.shape[2]
    require_angles(table, qkv.shape[-2], head_dim)
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    wide = (wide.sum(0) if wide.dim() == 3 else wide).unflatten(-1, (-1, head_dim))
    num_heads = wide.shape[1] - 2 * num_kv_heads
    q, k, v = wide.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = table if isinstance(table, tuple) else table[rows.long()].unbind(1)
    cos, sin = (each[:, None].to(wide.dtype) for each in angles)
    half = cos.shape[-1]

    def turned(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            x = x * scale * (weight.to(x.dtype) + norm_offset)
        pairs, rest = x.split((2 * half, head_dim - 2 * half), dim=-1)
        first, second = pairs.unflatten(-1, (half, 2) if interleaved else (2, half)).unbind(-1 if interleaved else -2)
        both = first * cos - second * sin, second * cos + first * sin
        return torch.cat((torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1), rest), dim=-1)

    where = (slots.long(), rows.long())
    k_cache.index_put_(where, turned(k, k_norm).to(k_cache.dtype))
    v_cache.index_put_(where, v.to(v_cache.dtype))
    return turned(q, q_norm).to(qkv.dtype if qkv.dim() == 2 else k_cache.dtype)


def rope_append(
    qkv: torch.Tensor,
    table: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """``rope_append_reference`` as one kernel, a program a token and a few heads; offsets in 64 bits.

    Args:
        pdl: as in ``triton_support.launch_options``.

    Raises:
        ConfigError: the tensors are not on a GPU; angles as for ``rope_append_reference``.
    """
    require_triton(qkv, k_cache, v_cache)
    num_kv_heads, head_dim = k_cache.shape[2:]
    require_angles(table, qkv.shape[-2], head_dim)
    tokens, num_heads = qkv.shape[-2], qkv.shape[-1] // head_dim - 2 * num_kv_heads
    if out is None:
        out = qkv.new_empty(tokens, num_heads, head_dim, dtype=qkv.dtype if qkv.dim() == 2 else k_cache.dtype)
    k_address, dtype, k_align = address_of(k_cache)
    v_address, _, v_align = address_of(v_cache)
    cos, sin = table if isinstance(table, tuple) else table.unbind(1)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    half = cos.shape[1]
    rest = head_dim - 2 * half
    heads = _HEADS if tokens >= _MANY_TOKENS else 1
    rope_append_kernel[(tokens, -(-(num_heads + 2 * num_kv_heads) // heads))](
        qkv, cos, sin, slots, rows, k_address, v_address,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, out,
        qkv.stride(-2), qkv.stride(0) if qkv.dim() == 3 else 0, out.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        *cos.stride(), num_heads, num_kv_heads, head_dim, half, eps, norm_offset,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None, DTYPE=dtype, ALIGN=min(k_align, v_align),
        SPLITS=qkv.shape[0] if qkv.dim() == 3 else 1, BY_ROW=not isinstance(table, tuple), INTERLEAVED=interleaved,
        HALF=next_power_of_2(half), REST=next_power_of_2(rest) if rest else 0, HEADS=heads,
        num_warps=1, **launch_options(pdl),
    )  # fmt: skip
    return out


@jit
def rope_append_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, rows_ptr, k_address, v_address, q_norm_ptr, k_norm_ptr, out_ptr,
    qkv_stride, split_stride, out_stride,
    k_slot_stride, k_row_stride, k_head_stride, v_slot_stride, v_row_stride, v_head_stride,
    angles_stride, angle_stride, num_heads, num_kv_heads, head_dim, half, eps, norm_offset,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr, SPLITS: tl.constexpr,
    BY_ROW: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    is_head = heads < num_heads + 2 * num_kv_heads
    inside = (columns < half) & is_head
    if INTERLEAVED:
        one, other = 2 * columns, 2 * columns + 1
    else:
        one, other = columns, half + columns
    source = qkv_ptr + token * qkv_stride + heads * head_dim
    first = tl.load(source + one, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        part = source + split * split_stride
        first += tl.load(part + one, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(part + other, mask=inside, other=0.0).to(tl.float32)
    if REST > 0:  # dimensions that do not rotate, past those that do
        after = 2 * half + tl.arange(0, REST)[None, :]
        inside_rest = (after < head_dim) & is_head
        rest = tl.load(source + after, mask=inside_rest, other=0.0).to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            rest += tl.load(source + split * split_stride + after, mask=inside_rest, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    row = tl.load(rows_ptr + token).to(tl.int64)

    is_q = heads < num_heads
    is_v = heads >= num_heads + num_kv_heads
    is_k = (heads >= num_heads) & (heads < num_heads + num_kv_heads)
    if Q_NORM or K_NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST > 0:
            square += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(square / head_dim + eps)[:, None]
        if Q_NORM:
            weight = tl.load(q_norm_ptr + one, mask=columns < half).to(tl.float32) + norm_offset
            first *= tl.where(is_q, scale * weight, 1.0)
            weight = tl.load(q_norm_ptr + other, mask=columns < half).to(tl.float32) + norm_offset
            second *= tl.where(is_q, scale * weight, 1.0)
            if REST > 0:
                weight = tl.load(q_norm_ptr + after, mask=after < head_dim).to(tl.float32) + norm_offset
                rest *= tl.where(is_q, scale * weight, 1.0)
        if K_NORM:
            weight = tl.load(k_norm_ptr + one, mask=columns < half).to(tl.float32) + norm_offset
            first *= tl.where(is_k, scale * weight, 1.0)
            weight = tl.load(k_norm_ptr + other, mask=columns < half).to(tl.float32) + norm_offset
            second *= tl.where(is_k, scale * weight, 1.0)
            if REST > 0:
                weight = tl.load(k_norm_ptr + after, mask=after < head_dim).to(tl.float32) + norm_offset
                rest *= tl.where(is_k, scale * weight, 1.0)
    at = (row if BY_ROW else token) * angles_stride + columns * angle_stride
    cos = tl.load(cos_ptr + at, mask=columns < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=columns < half, other=0.0).to(tl.float32)
    turned = tl.where(is_v, first, first * cos - second * sin)
    second = tl.where(is_v, second, second * cos + first * sin)
    first = turned

    out_at = out_ptr + token * out_stride + heads * head_dim
    k_ptr = tl.multiple_of(k_address.to(tl.int64).to(tl.pointer_type(DTYPE)), ALIGN)
    k_at = k_ptr + slot * k_slot_stride + row * k_row_stride + (heads - num_heads) * k_head_stride
    v_ptr = tl.multiple_of(v_address.to(tl.int64).to(tl.pointer_type(DTYPE)), ALIGN)
    v_at = v_ptr + slot * v_slot_stride + row * v_row_stride + (heads - num_heads - num_kv_heads) * v_head_stride
    tl.store(out_at + one, first.to(out_ptr.dtype.element_ty), mask=inside & is_q)
    tl.store(out_at + other, second.to(out_ptr.dtype.element_ty), mask=inside & is_q)
    tl.store(k_at + one, first.to(DTYPE), mask=inside & is_k)
    tl.store(k_at + other, second.to(DTYPE), mask=inside & is_k)
    tl.store(v_at + one, first.to(DTYPE), mask=inside & is_v)
    tl.store(v_at + other, second.to(DTYPE), mask=inside & is_v)
    if REST > 0:
        tl.store(out_at + after, rest.to(out_ptr.dtype.element_ty), mask=inside_rest & is_q)
        tl.store(k_at + after, rest.to(DTYPE), mask=inside_rest & is_k)
        tl.store(v_at + after, rest.to(DTYPE), mask=inside_rest & is_v)
