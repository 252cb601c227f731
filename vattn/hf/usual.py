"""Decides whether vattn may replace a model's own eager attention function.

It may where that function computes ordinary softmax attention. The function is run once on random input, and its output
is compared with the formula.
"""

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
    """Whether ``function`` computes ordinary softmax attention for this module.

    Ordinary means: scores are scaled, may be capped, and may include sinks. Nothing else is done to them. The result is
    kept for each module and kind of input.

    Only functions defined in transformers are run. One from elsewhere may have side effects, so the answer is False.
    While a CUDA graph is captured nothing can be compared. Then the answer is False unless it is known already.

    Args:
        function: an eager attention function with the signature that transformers uses.
        module: the attention module that calls it.
        query, key, value: ``[batch, heads, tokens, head_dim]``. Only their shapes, dtype and device matter.
        scaling: factor of the scores. None: ``head_dim ** -0.5``.
        options: further keyword arguments of ``function``, among them ``softcap`` and ``s_aux`` (sinks).
    """
    if not getattr(function, "__module__", "").startswith("transformers.") or hasattr(function, "__wrapped__"):
        return False
    tried = _TRIED.setdefault(module, {})
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    case = (function, query.dtype, query.device, scaling, softcap, sinks is None)
    if case not in tried:
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # comparing needs a result from the GPU
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
    """Compare the function with the formula on two queries over three tokens."""
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
