"""54,000 seeded random operations over the contract, half of them in any run; see ``fuzz.py``."""

from __future__ import annotations

import contextlib

import pytest
from fuzz import LAYOUTS, VARIANTS, Fuzz

OPERATIONS = 428  # of each walk


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_random_walk(seed, kind, variant, device):
    settings = VARIANTS[variant]
    with contextlib.closing(Fuzz(seed, kind, device, **settings)) as fuzz:
        fuzz.run(OPERATIONS if device == "cpu" else 80)
        if device == "cpu":  # long enough to have met everything
            wanted = {"acquire", "ensure", "ensure_batch", "fork", "truncate", "release", "rewrite", "family", "step"}
            wanted |= {"trim", "OutOfPages", "OutOfSlots"} | ({"DriverError"} if "fail" in settings else set())
            wanted |= {"late reads"} if "readers" in settings else set()
            wanted |= {"large pages", "split"} if "sizes" in settings else set()
            # A page is kept where memory is short or a step is open, which not every walk meets; the first does.
            wanted |= {"kept"} if "sizes" in settings and seed == 1 else set()
            wanted |= {"adopted", "reclaimed"} | ({"parked aliases"} if kind != "layer" else set())
            assert wanted <= {name for name, count in fuzz.counts.items() if count}
