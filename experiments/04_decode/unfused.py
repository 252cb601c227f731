"""Ends of a decode step in torch's operations, such as a captured graph can hold: for ablations.

The eager references of these operations cannot be captured. Their results are these, but for what a draw is made of.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vattn.ops.process_logits import SamplerState


def sample_in_torch(
    logits: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    state: SamplerState,
    out: torch.Tensor,
) -> None:
    """``sample_tokens`` as it is usually written: one sort, then top-k, top-p and a draw over the sorted tokens.

    No min-p, and nothing that ``state.flags`` asks for. Draws come from torch's generator, not from a request's seed.
    """
    slot = slots.long()
    heat, k, p = (each[slot][:, None] for each in (state.temperature, state.top_k.long(), state.top_p))
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
        *rest: torch.Tensor,
    ) -> None:
        update_in_torch(sampled, slots, tokens.clone(), lengths.clone(), remaining.clone(), stop_tokens)
        advance(sampled, slots, tokens, lengths, remaining, stop_tokens, *rest)

    return both
