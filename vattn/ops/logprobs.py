"""Log-probabilities of chosen tokens and of the likeliest ones, of the distribution that the model gave."""

from __future__ import annotations

import torch

__all__ = ["logprobs", "logprobs_reference"]


def logprobs_reference(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """The log-softmax of logits, in float64; of equal ones the lower token id is the likelier.

    A logit of NaN has the probability 0. Of infinite ones each has the same share. Where all are NaN, so is the result.

    Args:
        logits: ``[batch, vocab]``.
        tokens: ``[batch]`` integers, the chosen ones; below 0 for none.
        k: how many of the likeliest, 0 to ``vocab``.

    Returns:
        The chosen tokens' log-probabilities ``[batch]``, the likeliest tokens' ``[batch, k]`` and their ids.
    """
    values = logits.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    top = values.amax(-1, keepdim=True)
    shifted = torch.where(values == top, 0.0, values - top).masked_fill(logits.isnan(), -torch.inf)
    logs = shifted - shifted.exp().sum(-1, keepdim=True).log()
    order = logs.argsort(dim=-1, descending=True, stable=True)[:, :k]
    return logs.gather(-1, tokens.clamp(min=0).long()[:, None])[:, 0], logs.gather(-1, order), order


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> torch.Tensor:
    """``logprobs_reference`` in float32 as one tensor, for one copy to the host; on any device, without waiting.

    Returns:
        ``[batch, 1 + 2 * k]`` int32: the bits of the chosen token's float32, of the ``k`` likeliest ones', their ids.
    """
    values = logits.float()
    is_nan = values.isnan()
    values = values.masked_fill(is_nan, -torch.inf)
    top = values.amax(-1, keepdim=True)
    shifted = torch.where(values == top, 0.0, values - top).masked_fill_(is_nan, -torch.inf)
    logs = shifted - shifted.exp().sum(-1, keepdim=True).log()
    chosen = logs.gather(-1, tokens.clamp(min=0).long()[:, None])
    if k == 0:
        return chosen.view(torch.int32)
    # An integer for each token, in the order of logits, then of ids: top-k of equal floats is in no order.
    bits = (values + 0.0).view(torch.int32)  # 0, not -0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys += torch.arange(keys.shape[-1], 0, -1, device=keys.device)
    ids = keys.shape[-1] - (keys.topk(k).values & 0xFFFFFFFF)
    return torch.cat((chosen.view(torch.int32), logs.gather(-1, ids).view(torch.int32), ids.int()), dim=-1)
