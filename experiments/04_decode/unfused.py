"""Ends of a decode step in torch's operations, such as a captured graph can hold: for ablations.

The eager references of these operations cannot be captured. Their results are these, but for what a draw is made of.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def sample_in_torch(
    logits: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``sample_tokens`` as it is usually written: one sort, then top-k, top-p and a draw over the sorted tokens.

    Draws come from torch's generator instead of each request's seed.
    """
    slot = slots.long()
    heat, k, p = temperature[slot][:, None], top_k[slot].long()[:, None], top_p[slot][:, None]
    descending, order = logits.float().sort(dim=-1, descending=True)
    place = torch.arange(logits.shape[-1], device=logits.device)
    descending = descending.masked_fill((k > 0) & (place >= k), -torch.inf)
    scaled = (descending - descending[:, :1]) / heat.clamp(min=1e-6)
    shares = scaled.softmax(-1)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill((before >= p) & (p < 1), 0.0)
    drawn = (shares / torch.empty_like(shares).exponential_()).argmax(-1, keepdim=True)
    out.copy_(order.gather(-1, torch.where(heat > 0, drawn, 0))[:, 0])


def update_in_torch(
    sampled: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    remaining: torch.Tensor,
    stop_tokens: torch.Tensor,
) -> torch.Tensor:
    """What ``advance`` does to the state, without its ring in the host's memory, which only a kernel can write to.

    Returns:
        The report of each row, ``[batch, 2]`` int32.
    """
    index = slots.long()
    before = remaining[index]
    live = before > 0
    stopped = (sampled[:, None] == stop_tokens[index]).any(-1)
    left = torch.where(stopped, 0, before - 1)
    tokens[index] = torch.where(live, sampled, tokens[index])
    lengths[index] += live.to(lengths.dtype)
    remaining[index] = torch.where(live, left, before)
    reason = torch.where(stopped, 1, torch.where(left == 0, 2, 0))
    return torch.stack((torch.where(live, sampled, -1), torch.where(live, reason, 0)), dim=-1).to(torch.int32)


def updating_twice(advance: Callable[..., None]) -> Callable[..., None]:
    """``advance``, and before it the same to copies of the state in torch's operations."""

    def both(
        sampled: torch.Tensor,
        slots: torch.Tensor,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        remaining: torch.Tensor,
        stop_tokens: torch.Tensor,
        counter: torch.Tensor,
        ring: torch.Tensor,
    ) -> None:
        update_in_torch(sampled, slots, tokens.clone(), lengths.clone(), remaining.clone(), stop_tokens)
        advance(sampled, slots, tokens, lengths, remaining, stop_tokens, counter, ring)

    return both
