"""How plots look: the systems' colours, Okabe and Ito's, which the colour-blind can tell apart; markers for grey."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

VERSION = f"Matplotlib v{mpl.__version__}"
# The same records give the same file, with letters as letters and not as outlines.
mpl.rcParams.update({"svg.hashsalt": "vattn", "svg.fonttype": "none", "font.size": 10})
STYLE = {  # name in the legend: colour, marker, line
    'vattn, order="token"': ("#0072B2", "o", "-"),
    "vattn with a margin for FlashAttention-3": ("#56B4E9", "s", "-"),
    'pages of one layer, order="layer"': ("#D55E00", "^", "-"),
    "32,768 tokens reserved for each": ("#000000", "x", "-"),
    "torch.compile": ("#009E73", "D", "-"),
    "transformers, static, compiled": ("#E69F00", "^", "-"),
    "transformers, dynamic": ("#CC79A7", "v", "-"),
    "FlashAttention-3, contiguous": ("#000000", "x", ":"),
    "FlashAttention-2, contiguous": ("#000000", "+", ":"),
    "FlashAttention-3, blocks of 16": ("#D55E00", "^", "--"),
    "FlashAttention-3, blocks of 128": ("#E69F00", "v", "--"),
    "FlashAttention-2, blocks of 256": ("#CC79A7", "s", "-."),
    "FlashInfer, blocks of 16": ("#009E73", "D", "-."),
}


def in_words(case: str) -> str:
    """``"8B B=1 L=1024"`` -> ``"8B, batch 1, 1,024 tokens"``."""
    shape, batch, tokens = case.split()
    return f"{shape}, batch {batch[2:]}, {int(tokens[2:]):,} tokens"


def line(axes: Any, name: str, x: list[int], y: list[float]) -> None:
    """One system's line over a logarithmic axis of tokens."""
    colour, marker, style = STYLE[name]
    axes.plot(x, y, color=colour, marker=marker, linestyle=style, markersize=5, linewidth=1.2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{tick // 1024}k" for tick in x])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="y", color="#dddddd", linewidth=0.8)


def dots(rows: dict[str, dict[str, float]], names: dict[str, str], xlabel: str) -> tuple[Figure, Any]:
    """(figure, axes) with a line a row, from the top, a marker a system, and a dashed line at 1.

    Args:
        rows: what a row is called -> system -> where its marker stands.
        names: system -> its name in the legend.
    """
    figure = Figure(figsize=(7.5, 1.1 + 0.3 * len(rows)))
    axes = figure.subplots()
    for system, name in names.items():
        colour, marker, _ = STYLE[name]
        points = [(each[system], y) for y, each in enumerate(rows.values()) if system in each]
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, markersize=6, linestyle="none", label=name)
    axes.axvline(1, color="#888888", linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=True, axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(xlabel)
    return figure, axes


def svg(figure: Figure, png: Path | None = None) -> str:
    """The figure under a legend, as a file's text."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 3 if figure.get_figwidth() > 8 else 2
    figure.legend(handles, labels, loc="upper center", ncols=columns, frameon=False, fontsize=9)
    legend_inches = 0.08 + 0.2 * -(-len(labels) // columns)
    figure.tight_layout(rect=(0, 0, 1, 1 - legend_inches / figure.get_figheight()))
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    if png:
        figure.savefig(png, dpi=110)
    return file.getvalue()
