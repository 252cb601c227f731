"""Draws the plots of the experiments' READMEs from their records: ``python experiments/plots.py`` (needs matplotlib).

Colours are Okabe and Ito's, which the colour-blind can tell apart; markers differ in shape, for print in grey.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from common import read
from plots_layouts import decode_attention, how_it_works, layouts, prefill_attention
from tables_common import fields

FOLDER = Path(__file__).parent
STYLE = {  # colour, marker
    "vattn": ("#0072B2", "o"),
    "vattn-margin": ("#56B4E9", "s"),
    "layer-major": ("#D55E00", "^"),
    "full": ("#000000", "x"),
    "torch-compile": ("#009E73", "D"),
    "transformers-static-compile": ("#E69F00", "^"),
    "transformers-dynamic": ("#CC79A7", "v"),
}
Record = dict[str, Any]


def dots(axes: Any, rows: list[str], systems: list[str], values: dict[tuple[str, str], float]) -> None:
    """One line a row, one marker a system; rows from the top."""
    for y, row in enumerate(rows):
        axes.axhline(y, color="#dddddd", linewidth=0.8, zorder=0)
        for system in systems:
            if (row, system) in values:
                colour, marker = STYLE[system]
                axes.plot(values[row, system], y, marker=marker, color=colour, markersize=7, linestyle="none")
    for system in systems:
        colour, marker = STYLE[system]
        axes.plot([], [], marker=marker, color=colour, markersize=7, linestyle="none", label=system)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def capacity(records: list[Record]) -> Any:
    """Sequences admitted, as a share of what a block table of 16-token blocks admits."""
    rows: list[str] = []
    values: dict[tuple[str, str], float] = {}
    peers = {r["case"]: r["value"] for r in records if (r["system"], r["metric"]) == ("paged-16", "sequences")}
    for record in records:
        words = fields(record["case"])
        if words["driver"] == "ledger" and record["metric"] == "sequences" and record["system"] != "paged-16":
            row = f"{words['shape']}, {words['trace']}"
            if row not in rows:
                rows.append(row)
            values[row, record["system"]] = record["value"] / peers[record["case"]]
    figure, axes = plt.subplots(figsize=(7.5, 3.9))
    dots(axes, rows, ["vattn", "vattn-margin", "layer-major", "full"], values)
    axes.axvline(1, color="#888888", linewidth=1, linestyle="--", zorder=0)
    axes.set_xlim(0, 1.06)
    axes.set_xlabel("sequences admitted at 60 GiB, paged with 16-token blocks = 1")
    figure.legend(loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def decode(records: list[Record]) -> Any:
    """Decode steps, in multiples of the time that reading weights and cache once takes."""
    steps = {(r["case"], r["system"]): r["value"] for r in records if r["metric"] == "decode_step"}
    systems = ["vattn", "torch-compile", "transformers-static-compile", "transformers-dynamic"]
    cases = [case for case, system in steps if system == "limit"]
    values = {
        (case, system): steps[case, system] / steps[case, "limit"]
        for case in cases
        for system in systems
        if (case, system) in steps
    }
    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    dots(axes, cases, systems, values)
    axes.axvline(1, color="#888888", linewidth=1, linestyle="--", zorder=0)
    axes.set_xscale("log")
    ticks = [1, 1.5, 2, 3, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.95, 1.1 * max(values.values()))
    axes.set_xlabel("time of a decode step, reading weights and cache once = 1 (H100; logarithmic)")
    figure.legend(loc="upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1.0, handletextpad=0.2)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    return figure


PLOTS = {
    "04_decode": decode,
    "05_capacity": capacity,
    "07_decode_attention": decode_attention,
    "08_prefill_attention": prefill_attention,
    "10_layouts": layouts,
}


def main() -> None:
    # The same records give the same file.
    mpl.rcParams.update({"svg.hashsalt": "vattn", "font.size": 10})
    write(how_it_works(), FOLDER.parent / "docs" / "how_it_works.svg")
    for experiment, draw in PLOTS.items():
        results = FOLDER / experiment / "results.jsonl"
        if results.exists():
            write(draw(read(results)), FOLDER / experiment / f"{draw.__name__}.svg")


def write(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    if len(sys.argv) > 1:  # a folder for PNGs, to look at
        figure.savefig(Path(sys.argv[1]) / f"{path.stem}.png", dpi=110)
    print(f"written: {path.relative_to(FOLDER.parent)}")


if __name__ == "__main__":
    main()
