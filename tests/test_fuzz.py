"""20,000 seeded random operations over the contract; see ``fuzz.py``."""

from __future__ import annotations

import contextlib

import pytest
from fuzz import LAYOUTS, VARIANTS, Fuzz

OPERATIONS = 20_000


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_random_walk(kind, variant, device):
    settings = VARIANTS[variant]
    with contextlib.closing(Fuzz(20_261, kind, device, **settings)) as fuzz:
        fuzz.run(OPERATIONS // (len(VARIANTS) * len(LAYOUTS)) if device == "cpu" else 150)
        wanted = {"acquire", "ensure", "ensure_batch", "fork", "truncate", "release", "rewrite", "step", "trim"}
        wanted |= {"OutOfPages", "OutOfSlots"} if device == "cpu" else set()
        wanted |= {"DriverError"} if "fail" in settings and device == "cpu" else set()
        assert wanted <= fuzz.counts.keys()
