"""The end of a decode step: sampled tokens become the next ones to feed, and sequences that are done stop."""

from __future__ import annotations

import torch

from .process_logits import PENALTIES
from .triton_support import jit, next_power_of_2, require_triton, tl

__all__ = ["advance", "advance_reference"]

_PENALTIES = tl.constexpr(PENALTIES)


def advance_reference(
    sampled: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    remaining: torch.Tensor,
    stop_tokens: torch.Tensor,
    flags: torch.Tensor,
    counts: torch.Tensor,
    counter: torch.Tensor,
    ring: torch.Tensor,
) -> None:
    """Take the sampled tokens over into the state of their sequences, and report them.

    A row whose slot has tokens remaining is live: its slot's next token is set, its length grows by one, and its
    remaining tokens drop by one, or to zero if the token is one of its slot's stop tokens. Where the slot has
    penalties, the token is counted. It reports the token with the reason for which it ended: 0 none, 1 a stop token,
    2 no tokens remaining. Where no token could be chosen, a -1, its slot keeps the token that it has, its length still
    grows, and it reports ``(-1, 3)`` and has none remaining. Other rows change nothing and report ``(-1, 0)``.

    Args:
        sampled: ``[batch]`` int32, an id of the vocabulary, or -1, for each row.
        slots: ``[batch]`` int32. A slot with tokens remaining is listed once at most; others may be repeated.
        tokens: ``[max_slots]`` int32, changed in place.
        lengths: ``[max_slots]`` int32, changed in place.
        remaining: ``[max_slots]`` int32, how many tokens may still be sampled; changed in place.
        stop_tokens: ``[max_slots, count]`` int32, -1 for none.
        flags, counts: of ``SamplerState``; counts are changed in place.
        counter: ``[1]`` int64, at least 0: the number of the step; one more afterwards.
        ring: ``[size, max_batch, 2]`` int32; of row ``counter % size`` the first ``batch`` pairs are written. It is
            never read.
    """
    index = slots.long()
    live = remaining[index] > 0
    at, token = index[live], sampled[live].to(tokens.dtype)
    chosen = token >= 0
    stopped = chosen & (token[:, None] == stop_tokens[at]).any(-1)
    left = (remaining[at] - 1).masked_fill(stopped | ~chosen, 0)
    tokens[at] = torch.where(chosen, token, tokens[at])
    lengths[at] += 1
    remaining[at] = left
    counted = chosen & (flags[at] & PENALTIES != 0)
    pair = at[counted], token[counted].long()
    counts[pair] += (counts[pair] & 0x7FFF < 0x7FFF).to(counts.dtype)

    report = torch.tensor([-1, 0], dtype=ring.dtype, device=sampled.device).repeat(len(slots), 1)
    reason = torch.where(~chosen, 3, torch.where(stopped, 1, torch.where(left == 0, 2, 0)))
    report[live] = torch.stack((token, reason), dim=-1).to(ring.dtype)
    ring[int(counter) % ring.shape[0], : len(slots)] = report.to(ring.device)
    counter += 1


def advance(
    sampled: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    remaining: torch.Tensor,
    stop_tokens: torch.Tensor,
    flags: torch.Tensor,
    counts: torch.Tensor,
    counter: torch.Tensor,
    ring: torch.Tensor,
) -> None:
    """``advance_reference`` as one kernel of a single program; the ring may be pinned host memory.

    Raises:
        ConfigError: the tensors, but for the ring, are not on a GPU.
    """
    require_triton(sampled, slots, tokens, lengths, remaining, stop_tokens, flags, counts, counter)
    batch, num_stops = slots.shape[0], stop_tokens.shape[1]
    advance_kernel[(1,)](
        sampled,
        slots,
        tokens,
        lengths,
        remaining,
        stop_tokens,
        flags,
        counts,
        counter,
        ring,
        batch,
        num_stops,
        stop_tokens.stride(0),
        counts.stride(0),
        ring.shape[0],
        ring.stride(0),
        BLOCK=next_power_of_2(batch),
        STOP_TOKENS=next_power_of_2(max(1, num_stops)),
    )


@jit
def advance_kernel(  # type: ignore[no-untyped-def]
    sampled_ptr,
    slots_ptr,
    tokens_ptr,
    lengths_ptr,
    remaining_ptr,
    stop_ptr,
    flags_ptr,
    counts_ptr,
    counter_ptr,
    ring_ptr,
    batch,
    num_stops,
    stop_stride,
    counts_stride,
    ring_size,
    ring_stride,
    BLOCK: tl.constexpr,
    STOP_TOKENS: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    inside = i < batch
    step = tl.load(counter_ptr)
    slot = tl.load(slots_ptr + i, mask=inside, other=0).to(tl.int64)
    left = tl.load(remaining_ptr + slot, mask=inside, other=0)
    live = inside & (left > 0)
    token = tl.load(sampled_ptr + i, mask=live, other=-1)
    chosen = live & (token >= 0)
    length = tl.load(lengths_ptr + slot, mask=live, other=0)
    flags = tl.load(flags_ptr + slot, mask=chosen, other=0)
    place = tl.arange(0, STOP_TOKENS)
    stop_ptrs = stop_ptr + slot[:, None] * stop_stride + place[None, :]
    stops = tl.load(stop_ptrs, mask=chosen[:, None] & (place < num_stops)[None, :], other=-1)
    stopped = chosen & (tl.sum((stops == token[:, None]).to(tl.int32), 1) > 0)
    # Every thread has read the counter, and every row its slot, before any of them is written.
    tl.debug_barrier()

    left = tl.where(stopped | (token < 0), 0, left - 1)
    reason = tl.where(stopped, 1, tl.where(chosen & (left == 0), 2, tl.where(live & (token < 0), 3, 0)))
    tl.store(tokens_ptr + slot, token, mask=chosen)
    tl.store(lengths_ptr + slot, length + 1, mask=live)
    tl.store(remaining_ptr + slot, left, mask=live)
    counted = chosen & ((flags & _PENALTIES) != 0)
    count_ptrs = counts_ptr + slot * counts_stride + token
    count = tl.load(count_ptrs, mask=counted, other=0).to(tl.int32)
    tl.store(count_ptrs, tl.where((count & 0x7FFF) < 0x7FFF, count + 1, count).to(tl.int16), mask=counted)
    report = ring_ptr + (step % ring_size) * ring_stride + 2 * i
    tl.store(report, token, mask=inside)
    tl.store(report + 1, reason, mask=inside)
    tl.store(counter_ptr, step + 1)
