"""The end of a decode step: sampled tokens become the next ones to feed, and sequences that are done stop."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .triton_support import next_power_of_2, require_triton

__all__ = ["advance", "advance_reference"]


def advance_reference(
    sampled: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    remaining: torch.Tensor,
    stop_tokens: torch.Tensor,
    counter: torch.Tensor,
    ring: torch.Tensor,
) -> None:
    """Take the sampled tokens over into the state of their sequences, and report them.

    A row whose slot has tokens remaining is live: its slot's next token is set, its length grows by one, and its
    remaining tokens drop by one, or to zero if the token is one of its slot's stop tokens. It reports the token with
    the reason for which it ended: 0 none, 1 a stop token, 2 no tokens remaining. Other rows change nothing and report
    ``(-1, 0)``.

    Args:
        sampled: ``[batch]`` int32, an id of at least 0 for each row.
        slots: ``[batch]`` int32. A slot with tokens remaining is listed once at most; others may be repeated.
        tokens: ``[max_slots]`` int32, changed in place.
        lengths: ``[max_slots]`` int32, changed in place.
        remaining: ``[max_slots]`` int32, how many tokens may still be sampled; changed in place.
        stop_tokens: ``[max_slots, count]`` int32, -1 for none.
        counter: ``[1]`` int64, at least 0: the number of the step; one more afterwards.
        ring: ``[size, max_batch, 2]`` int32; of row ``counter % size`` the first ``batch`` pairs are written. It is
            never read.
    """
    index = slots.long()
    live = remaining[index] > 0
    at, token = index[live], sampled[live].to(tokens.dtype)
    left = remaining[at] - 1
    stopped = (token[:, None] == stop_tokens[at]).any(-1)
    left = left.masked_fill(stopped, 0)
    tokens[at] = token
    lengths[at] += 1
    remaining[at] = left

    report = torch.tensor([-1, 0], dtype=ring.dtype, device=sampled.device).repeat(len(slots), 1)
    reason = torch.where(stopped, 1, torch.where(left == 0, 2, 0))
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
    counter: torch.Tensor,
    ring: torch.Tensor,
) -> None:
    """``advance_reference`` as one kernel of a single program; the ring may be pinned host memory.

    Raises:
        ConfigError: the tensors, but for the ring, are not on a GPU.
    """
    require_triton(sampled, slots, tokens, lengths, remaining, stop_tokens, counter)
    batch = slots.shape[0]
    _kernel()[(1,)](
        sampled,
        slots,
        tokens,
        lengths,
        remaining,
        stop_tokens,
        counter,
        ring,
        batch,
        stop_tokens.shape[1],
        stop_tokens.stride(0),
        ring.shape[0],
        ring.stride(0),
        BLOCK=next_power_of_2(batch),
    )


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def advance_kernel(  # type: ignore[no-untyped-def]
        sampled_ptr,
        slots_ptr,
        tokens_ptr,
        lengths_ptr,
        remaining_ptr,
        stop_ptr,
        counter_ptr,
        ring_ptr,
        batch,
        num_stops,
        stop_stride,
        ring_size,
        ring_stride,
        BLOCK: tl.constexpr,
    ):
        i = tl.arange(0, BLOCK)
        inside = i < batch
        count = tl.load(counter_ptr)
        slot = tl.load(slots_ptr + i, mask=inside, other=0).to(tl.int64)
        left = tl.load(remaining_ptr + slot, mask=inside, other=0)
        live = inside & (left > 0)
        token = tl.load(sampled_ptr + i, mask=live, other=-1)
        length = tl.load(lengths_ptr + slot, mask=live, other=0)
        stopped = left < 0
        for j in range(num_stops):
            stop = tl.load(stop_ptr + slot * stop_stride + j, mask=live, other=-1)
            stopped = stopped | (stop == token)
        # Every thread has read the counter, and every row its slot, before any of them is written.
        tl.debug_barrier()

        left = tl.where(stopped, 0, left - 1)
        reason = tl.where(live & stopped, 1, tl.where(live & (left == 0), 2, 0))
        tl.store(tokens_ptr + slot, token, mask=live)
        tl.store(lengths_ptr + slot, length + 1, mask=live)
        tl.store(remaining_ptr + slot, left, mask=live)
        report = ring_ptr + (count % ring_size) * ring_stride + 2 * i
        tl.store(report, token, mask=inside)
        tl.store(report + 1, reason, mask=inside)
        tl.store(counter_ptr, count + 1)

    return advance_kernel
