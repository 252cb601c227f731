"""The plot of how many sequences fit."""

from __future__ import annotations

from typing import Any

from table import Record, by_case, fields

NAMES = {
    "vattn": 'vattn, order="token"',
    "vattn-margin": "vattn with a margin for FlashAttention-3",
    "layer-major": 'pages of one layer, order="layer"',
    "full": "32,768 tokens reserved for each",
}
TRACES = {"2048": "all of 2,048 tokens", "log-normal": "log-normal", "shared": "log-normal, shared prompt"}


def plot(records: list[Record]) -> Any:
    """As a share of what a block table of 16-token blocks admits."""
    from plotting import dots

    rows = {
        f"{fields(case)['shape']}, {TRACES[fields(case)['trace']]}": {
            name: count / each["paged-16"] for name, count in each.items()
        }
        for case, each in by_case(records, "sequences:driver=ledger").items()
    }
    figure, axes = dots(rows, NAMES, "sequences in 60 GiB, with blocks of 16 tokens = 1")
    axes.set_xlim(0, 1.06)
    return figure
