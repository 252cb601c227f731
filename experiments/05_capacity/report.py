"""The plot of how many sequences fit."""

from __future__ import annotations

from typing import Any

from table import Record, by_case, fields

NAMES = {
    "vattn": 'vattn, order="token"',
    "vattn-margin": 'vattn with FA3\'s margin, order="token"',
    "layer-major": 'pages of one layer, order="layer"',
    "full": "room for the longest",
}


def plot(records: list[Record]) -> Any:
    """As a share of what a block table of 16-token blocks admits."""
    from plotting import dots

    rows = {
        "{shape}, {trace}".format(**fields(case)): {name: count / each["paged-16"] for name, count in each.items()}
        for case, each in by_case(records, "sequences:driver=ledger").items()
    }
    figure, axes = dots(rows, NAMES, "sequences admitted at 60 GiB, paged with 16-token blocks = 1")
    axes.set_xlim(0, 1.06)
    return figure
