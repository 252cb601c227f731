"""20,000 seeded random operations over the contract; see ``fuzz.py``."""

from __future__ import annotations

import contextlib

import pytest
from fuzz import LAYOUTS, Fuzz

OPERATIONS = 20_000


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("fail", [False, True], ids=["sound driver", "failing driver"])
def test_random_walk(kind, fail, device):
    with contextlib.closing(Fuzz(20_261, kind, device, fail=fail)) as fuzz:
        fuzz.run(OPERATIONS // (2 * len(LAYOUTS)) if device == "cpu" else 300)
        wanted = {"acquire", "ensure", "ensure_batch", "fork", "truncate", "release", "rewrite", "step", "trim"}
        wanted |= {"OutOfPages", "OutOfSlots"} if device == "cpu" else set()
        wanted |= {"DriverError"} if fail else set()
        assert wanted <= fuzz.counts.keys()
