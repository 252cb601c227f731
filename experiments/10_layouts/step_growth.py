"""How a decode step grows: ms = factor × limit + layers × (fixed + batch × each), by least squares.

A layer's part and a step's cannot be told apart with one number of layers, so models of other shapes belong to a fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from table import Found, fields
from traces import MAX_SEQ_LEN, SHAPES

from vattn import KVLayout

WEIGHTS_70B = 2 * (70_553_706_496 - 128_256 * 8_192)  # bytes that a step reads, bfloat16: all but the input embedding


def kv_bytes(shape: str) -> int:
    """Of a token, in all layers."""
    return KVLayout(*SHAPES[shape], MAX_SEQ_LEN, torch.bfloat16).bytes_per_token


def terms(limit_ms: float, shape: str, batch: int) -> tuple[float, float, float]:
    """What a step's time is the sum of, each times a part of the fit."""
    layers = SHAPES[shape][0]
    return limit_ms, layers, layers * batch


@dataclass(frozen=True)
class Growth:
    """The fit of one system to the shapes that it was measured with, its largest relative error, and what it says of
    steps that do not fit in one GPU: (shape, batch) -> ms."""

    shapes: tuple[str, ...]
    times_limit: float
    layer_us: float
    sequence_us: float
    largest_error: float
    far_ms: dict[tuple[str, int], float]


@dataclass(frozen=True)
class Steps:
    """Times to fit. ``found``: case -> system -> ms, the limit among the systems; a case begins with its shape."""

    found: Found

    def of(self, case: str) -> tuple[float, str, int]:
        """(limit, shape, batch)."""
        return self.found[case]["limit"], case.split()[0], int(fields(case)["B"])

    @cached_property
    def far(self) -> dict[tuple[str, int], float]:
        """Limits of steps that do not fit in one GPU: 8B at 128 × 65,536, and one of 8 GPUs at 70B's 64 × 4,096."""
        larger = [case for case in self.found if case.startswith("8B ")]
        tokens = [int(fields(case)["B"]) * int(fields(case)["L"]) for case in larger]
        ms_a_token, weights_ms = np.polyfit(tokens, [self.found[case]["limit"] for case in larger], 1)
        sharded_bytes = WEIGHTS_70B / 8 + 64 * 4096 * kv_bytes("70B/8")
        sharded_ms = ms_a_token / kv_bytes("8B") * sharded_bytes
        return {("8B", 128): weights_ms + ms_a_token * 128 * 65536, ("70B/8", 64): sharded_ms}

    def fit(self, system: str) -> Growth | None:
        """Relative errors count alike, over all cases. None of fewer than six."""
        cases = [case for case, each in self.found.items() if system in each]
        if len(cases) < 6:
            return None
        design = np.array([terms(*self.of(case)) for case in cases])
        ms = np.array([self.found[case][system] for case in cases])
        parts, *_ = np.linalg.lstsq(design / ms[:, None], np.ones(len(ms)), rcond=None)
        far = {shape: float(parts @ terms(limit, *shape)) for shape, limit in self.far.items()}
        worst = float(np.abs(design @ parts / ms - 1).max())
        shapes = sorted({self.of(case)[1] for case in cases}, reverse=True)
        return Growth(tuple(shapes), float(parts[0]), float(parts[1]) * 1e3, float(parts[2]) * 1e3, worst, far)
