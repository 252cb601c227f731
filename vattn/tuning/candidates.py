"""Kernels that ``vattn tune`` times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ops.skinny_linear import LinearConfig

__all__ = ["attention_candidates", "linear_candidates"]


def _dots(*tiles: tuple[int, int, int, int], splits: Sequence[int] = (1, 2, 4)) -> list[LinearConfig]:
    return [LinearConfig(n, k, s, warps, stages) for n, k, warps, stages in tiles for s in splits]


# Configurations to time. The key is the largest number of tokens that they are for. They are the best ones of a sweep
# of 300 over the shapes of Llama 8B on an H100 and of 350 on an H200, and their neighbours.
_CANDIDATES: dict[int, list[LinearConfig]] = {
    1: [
        *(
            LinearConfig(n, k, s, warps, stages, dot=False)
            for n, k, warps, stages, splits in (
                (2, 2048, 8, 1, (1,)),
                (1, 2048, 8, 1, (1,)),
                (4, 2048, 8, 1, (1,)),
                (2, 1024, 4, 1, (1, 2)),
                (4, 1024, 4, 1, (1, 2)),
                (4, 1024, 4, 3, (1, 2)),
                (8, 1024, 8, 1, (1, 2)),
                (8, 512, 4, 3, (1, 2)),
                (8, 512, 2, 1, (1, 2)),
                (8, 512, 2, 3, (1, 2)),
                (8, 2048, 8, 4, (1,)),
                (1, 2048, 2, 3, (1,)),
                (1, 1024, 4, 1, (1,)),
                (2, 1024, 8, 1, (1,)),
                (2, 2048, 4, 3, (1,)),
                (4, 2048, 4, 3, (1,)),
            )
            for s in splits
        ),
        *_dots((32, 128, 2, 4), (64, 128, 4, 4), splits=(1, 2, 4, 8)),
    ],
    16: _dots(
        *((16, 256, 1, 3), (16, 256, 1, 4), (16, 256, 2, 2), (16, 512, 1, 3), (32, 128, 2, 3), (32, 128, 2, 4)),
        *((32, 256, 2, 4), (32, 256, 2, 3), (64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 4, 3)),
        *((128, 64, 4, 4), (128, 128, 8, 3), (16, 128, 1, 4), (32, 128, 2, 5), (32, 256, 2, 5)),
        (64, 128, 4, 5),
    ),
    64: _dots(
        *((32, 128, 2, 3), (32, 128, 2, 4), (32, 128, 4, 3), (32, 256, 2, 3), (64, 64, 4, 4), (64, 128, 4, 2)),
        *((64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 2), (64, 256, 4, 3), (128, 64, 4, 3), (128, 64, 4, 4)),
        *((128, 64, 8, 4), (128, 128, 4, 2), (128, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 5)),
    ),
}


def linear_candidates(outputs: int, inputs: int, tokens: int, whole: bool) -> list[LinearConfig]:
    """Configurations to time for a product ``[tokens, inputs] x [inputs, outputs]``.

    There are none for more than 64 tokens, where cuBLAS is faster.

    Args:
        whole: leave out those that split the sum over ``inputs``.
    """
    limit = next((limit for limit in _CANDIDATES if tokens <= limit), None)
    if limit is None:
        return []
    return [
        config
        for config in _CANDIDATES[limit]
        if inputs >= config.splits * config.block_k
        and not (whole and config.splits > 1)
        and (config.splits == 1 or outputs // config.block_n * config.splits <= 1056)  # eight programs per SM
    ]


def attention_candidates() -> list[tuple[str, dict[str, Any]]]:
    """(backend, options) to time for captured decode steps."""
    triton = [
        {"block_n": block_n, "num_warps": warps, "num_stages": stages, "fused_combine": fused}
        for block_n, warps, stages in ((64, 4, 3), (64, 4, 2), (128, 4, 2), (128, 8, 2), (32, 2, 4))
        for fused in (True, False)
    ]
    return [
        ("flash-attn-3", {}),
        ("flash-attn-2", {}),
        ("torch-varlen", {}),
        *(("triton-decode", options) for options in triton),
    ]
