"""How the time of decode attention grows with what it reads: µs = launch + bytes / bandwidth, by least squares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from table import Found, fields

TOKEN_BYTES = 4096  # K and V of a token in one layer of the 8B shape
FAR = 128 * 65536  # sequences × tokens that do not fit in one GPU


@dataclass(frozen=True)
class Growth:
    """The fit of one system: its two parts, its largest relative error, and what it says of ``FAR`` tokens."""

    launch_us: float
    terabytes_per_s: float
    largest_error: float
    far_ms: float


def fit(found: Found, system: str) -> Growth | None:
    """Relative errors count alike, over all cases. None of fewer than six.

    Args:
        found: case -> system -> µs.
    """
    cases = [case for case, each in found.items() if system in each]
    if len(cases) < 6:
        return None
    size = np.array([float(int(fields(case)["B"]) * int(fields(case)["L"]) * TOKEN_BYTES) for case in cases])
    us = np.array([found[case][system] for case in cases])
    design = np.stack([1 / us, size / us], axis=1)  # each equation divided by what was measured
    (launch, slope), *_ = np.linalg.lstsq(design, np.ones(len(us)), rcond=None)
    worst = np.abs((launch + slope * size) / us - 1).max()
    return Growth(float(launch), float(1e-6 / slope), float(worst), float((launch + slope * FAR * TOKEN_BYTES) / 1e3))
