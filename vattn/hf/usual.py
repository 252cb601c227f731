"""Whether a model's own eager attention is the usual one, which vattn can compute in its place: it is tried."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["is_usual"]

_TRIED: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()


def is_usual(
    function: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    options: dict[str, Any],
) -> bool:
    """Whether an attention function of transformers' models computes softmax attention of scaled, perhaps capped scores
    and perhaps with sinks, and nothing else, for this module.

    A function that comes from elsewhere may steer heads, or watch them: it is not tried, and not replaced.

    Args:
        query, key, value: ``[batch, heads, tokens, head_dim]``, as the function would be given them.
    """
    if not getattr(function, "__module__", "").startswith("transformers.") or hasattr(function, "__wrapped__"):
        return False
    tried = _TRIED.setdefault(module, {})
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    case = (function, query.dtype, query.device, scaling, softcap, sinks is None)
    if case not in tried:
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # the answer has to be waited for
        tried[case] = _try(function, module, query, key, value, scaling, options)
    return tried[case]


@torch.no_grad()
def _try(
    function: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    options: dict[str, Any],
) -> bool:
    """Two queries of the function's over three tokens, against the formula."""
    draw = torch.Generator().manual_seed(0)

    def random(like: torch.Tensor, tokens: int) -> torch.Tensor:
        drawn = torch.randn(1, like.shape[1], tokens, like.shape[3], generator=draw)
        return drawn.to(like.device, like.dtype)

    q, k, v = random(query, 2), random(key, 3), random(value, 3)
    hidden = torch.ones(2, 3, dtype=torch.bool, device=query.device).triu(2)[None, None]
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, torch.finfo(q.dtype).min)
    try:
        found = function(module, q, k, v, mask, scaling=scaling, dropout=0.0, **options)[0]
    except Exception:
        return False
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    group = query.shape[1] // key.shape[1]
    q, k, v = q.float(), k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(1, -1, 2, 1)], dim=-1)
    wanted = (scores.softmax(-1)[..., :3] @ v).transpose(1, 2)
    tolerance = 1e-4 if query.dtype == torch.float32 else 3e-2
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted, rtol=tolerance, atol=tolerance)
