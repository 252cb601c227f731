"""What the fuzz walks over: layouts, and what else is going on."""

from __future__ import annotations

from typing import Any

import torch

import vattn

MAX_SEQ_LEN = 90
LARGEST = 8  # units of a page, where they are of several sizes

VARIANTS: dict[str, dict[str, Any]] = {
    "sound driver": {},
    "failing driver": {"fail": True},
    "masked over-read": {"over_read": 30},
    "over-read, failing driver": {"over_read": 7, "masked": False, "fail": True},
    "queued streams": {"streams": True},
    "queued streams, over-read": {"streams": True, "over_read": 45, "masked": False},
    "readers on two streams": {"streams": True, "readers": True},
    "guard, failing driver": {"guard": True, "fail": True},
    "guard, queued streams, over-read": {"guard": True, "streams": True, "over_read": 45, "masked": False},
}
SIZES: dict[str, dict[str, Any]] = {
    "sizes": {},
    "sizes, failing driver": {"fail": True},
    "sizes, over-read, failing driver": {"over_read": 7, "masked": False, "fail": True},
    "sizes, masked over-read": {"over_read": 30},
    "sizes, queued streams, over-read": {"streams": True, "over_read": 45, "masked": False},
    "sizes, readers on two streams": {"streams": True, "readers": True},
    "sizes, guard, failing driver": {"guard": True, "fail": True},
}
VARIANTS |= {name: {**settings, "sizes": True} for name, settings in SIZES.items()}
# What was a page becomes so many units, for sequences to have 70 to 110 of them.
UNITS = {"token": 16, "layer": 64, "groups": 16, "row larger than page": 1}
LAYOUTS = ("token", "layer", "groups", "row larger than page")


def make_layout(kind: str, page_bytes: int) -> vattn.KVLayout:
    """A layout with about 20 tokens, never a whole number, in a page; or less than one."""
    unit = page_bytes // 4096
    if kind == "groups":
        groups = [
            vattn.LayerGroup([0, 3], num_kv_heads=1, head_dim=5 * unit, v_head_dim=3 * unit),
            vattn.LayerGroup([1], num_kv_heads=2, head_dim=7 * unit, window=16),
        ]
        return vattn.KVLayout(groups=groups, max_seq_len=MAX_SEQ_LEN, dtype=torch.float64)
    head_dim = 80 * unit if kind == "row larger than page" else 3 * unit
    order = "layer" if kind == "layer" else "token"
    return vattn.KVLayout(2, 2, head_dim, MAX_SEQ_LEN, torch.float64, order=order)
