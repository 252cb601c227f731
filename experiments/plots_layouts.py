"""Plots of the experiments that compare layouts, and the picture of how vattn's works."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import ConnectionPatch, Rectangle
from tables_common import fields

Record = dict[str, Any]
LINES = {  # name in the legend: system, colour, marker, line
    "vattn": ("vattn", "#0072B2", "o", "-"),
    "FA3 contiguous": ("flash-attn-3-contiguous", "#000000", "x", ":"),
    "FA3 paged 16": ("flash-attn-3-paged-16", "#D55E00", "^", "--"),
    "FA3 paged 128": ("flash-attn-3-paged-128", "#E69F00", "v", "--"),
    "FA3 paged 256": ("flash-attn-3-paged-256", "#E69F00", "v", "--"),
    "FA2 contiguous": ("flash-attn-2-contiguous", "#000000", "+", ":"),
    "FA2 paged 256": ("flash-attn-2-paged-256", "#CC79A7", "s", "-."),
    "FlashInfer paged 16": ("flashinfer-paged-16", "#009E73", "D", "-."),
    "FlashInfer paged 16, tensor cores": ("flashinfer-tensor-cores-paged-16", "#009E73", "D", "-."),
}


def _line(axes: Any, name: str, x: list[int], y: list[float]) -> None:
    _, colour, marker, style = LINES[name]
    axes.plot(x, y, color=colour, marker=marker, linestyle=style, markersize=5, linewidth=1.2, label=name)


def _tokens_axis(axes: Any, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)


def decode_attention(records: list[Record]) -> Any:
    """Share of the limit that attention of a decode step reaches, by context; one panel a batch size."""
    names = ["vattn", "FA2 contiguous", "FA3 paged 16", "FA2 paged 256", "FlashInfer paged 16, tensor cores"]
    found: dict[tuple[int, int], dict[str, float]] = {}
    for record in records:
        if record["metric"] == "decode_attention":
            words = fields(record["case"])
            found.setdefault((int(words["B"]), int(words["L"])), {})[record["system"]] = record["value"]
    batches = sorted({batch for batch, _ in found})
    figure, panels = plt.subplots(1, len(batches), figsize=(9.5, 3.0), sharey=True)
    for axes, batch in zip(panels, batches, strict=True):
        lengths = sorted(length for each, length in found if each == batch)
        for name in names:
            times = [found[batch, length] for length in lengths]
            _line(axes, name, lengths, [100 * each["limit"] / each[LINES[name][0]] for each in times])
        _tokens_axis(axes, lengths)
        axes.set_title(f"batch {batch}", fontsize=10)
    panels[0].set_ylabel("share of the limit, %")
    figure.supxlabel("tokens of each sequence", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=5, frameon=False, fontsize=8.5)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def prefill_attention(records: list[Record]) -> Any:
    """TFLOP/s of attention over whole prompts."""
    names = ["vattn", "FA3 contiguous", "FA3 paged 16", "FA3 paged 128", "FA2 paged 256", "FlashInfer paged 16"]
    found: dict[int, dict[str, float]] = {}
    for record in records:
        words = fields(record["case"])
        if record["metric"] == "prefill_attention" and words["new"] == words["total"]:
            found.setdefault(int(words["total"]), {})[record["system"]] = record["value"]
    totals = sorted(found)
    figure, axes = plt.subplots(figsize=(7.5, 3.4))
    for name in names:
        # The limit is what 989 TFLOP/s would take.
        _line(axes, name, totals, [989 * found[n]["limit"] / found[n][LINES[name][0]] for n in totals])
    _tokens_axis(axes, totals)
    axes.set_ylim(0, None)
    axes.set_ylabel("TFLOP/s")
    axes.set_xlabel("tokens of the prompt (one sequence, causal, a layer of 8B heads)")
    figure.legend(loc="upper center", ncols=6, frameon=False, fontsize=8.5, columnspacing=1.0, handletextpad=0.4)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def layouts(records: list[Record]) -> Any:
    """Whole decode steps over blocks, in multiples of vattn's."""
    names = {
        "paged-16": "FA3 paged 16",
        "paged-128": "FA3 paged 128",
        "paged-256-flash-attn-2": "FA2 paged 256",
    }
    steps: dict[str, dict[str, float]] = {}
    for record in records:
        if record["metric"] == "decode_step":
            steps.setdefault(record["case"], {})[record["system"]] = record["value"]
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.28 * len(steps)))
    for y, values in enumerate(steps.values()):
        axes.axhline(y, color="#dddddd", linewidth=0.8, zorder=0)
        for system, name in names.items():
            if system in values:
                _, colour, marker, _ = LINES[name]
                axes.plot(values[system] / values["vattn"], y, marker=marker, color=colour, linestyle="none")
    for name in names.values():
        _, colour, marker, _ = LINES[name]
        axes.plot([], [], marker=marker, color=colour, linestyle="none", label=name)
    axes.axvline(1, color="#0072B2", linewidth=1.2, zorder=0)
    axes.set_yticks(range(len(steps)), [case.removeprefix("8B ") for case in steps])
    axes.set_ylim(len(steps) - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time of a decode step, vattn = 1 (8B, H100, bfloat16)")
    figure.legend(loc="upper center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def how_it_works() -> Any:
    """Addresses of three slots, and the pages behind them."""
    figure, axes = plt.subplots(figsize=(8.6, 3.5))
    owners = {"a": "#0072B2", "b": "#D55E00", "c": "#CC79A7", "shared": "#009E73", "free": "#ffffff"}
    slots = {  # slot: (page of the pool, whose) for each page of addresses that is backed
        "slot 0": [(1, "a"), (4, "a"), (0, "a"), (7, "a")],
        "slot 1": [(5, "shared"), (2, "shared"), (9, "b")],
        "slot 2 = fork(slot 1)": [(5, "shared"), (2, "shared"), (6, "c"), (11, "c"), (3, "c")],
    }
    width, num_addresses = 0.62, 10
    for y, (slot, pages) in enumerate(slots.items()):
        top = 4.3 - 0.8 * y
        axes.text(-0.2, top + 0.2, slot, ha="right", va="center", fontsize=9.5)
        for i in range(num_addresses):
            backed = i < len(pages)
            colour = owners[pages[i][1]] if backed else "#f4f4f4"
            axes.add_patch(
                Rectangle(
                    (i * width, top),
                    width,
                    0.4,
                    facecolor=colour,
                    edgecolor="#444444" if backed else "#bbbbbb",
                    linewidth=0.8,
                    linestyle="-" if backed else ":",
                    alpha=0.85 if backed else 1,
                )
            )
            if backed:
                number = str(pages[i][0])
                axes.text((i + 0.5) * width, top + 0.2, number, ha="center", va="center", fontsize=8, color="white")
    used = {page: whose for pages in slots.values() for page, whose in pages}
    for page in range(14):
        whose = used.get(page, "free")
        x = (page - 2.0) * width * 0.86 + 0.6
        axes.add_patch(
            Rectangle(
                (x, 0.7), width * 0.8, 0.4, facecolor=owners[whose], edgecolor="#444444", linewidth=0.8, alpha=0.85
            )
        )
        colour = "#444444" if whose == "free" else "white"
        axes.text(x + width * 0.4, 0.9, str(page), ha="center", va="center", fontsize=8, color=colour)
    end = num_addresses * width
    axes.text(
        end + 0.15,
        4.5,
        "addresses: reserved once, never move;\nthe kernel sees one plain tensor\n[slot, row, head, dim]",
        fontsize=8.5,
        va="top",
    )
    axes.text(end + 0.15, 3.1, "dotted: no memory behind it yet", fontsize=8.5, va="center", color="#666666")
    axes.text(
        end + 1.35,
        0.9,
        "physical pages of 2 MiB:\n16 tokens of an 8B model, K and V\nof all layers; white: free",
        fontsize=8.5,
        va="center",
    )
    axes.add_patch(ConnectionPatch((end / 2, 2.6), (end / 2, 1.25), "data", "data", arrowstyle="<->", color="#444444"))
    axes.text(
        end / 2 + 0.12,
        1.9,
        "cuMemMap, one page at a time, as sequences grow;\na page mapped twice is shared",
        fontsize=8.5,
        va="center",
    )
    axes.set_xlim(-2.4, end + 4.6)
    axes.set_ylim(0.4, 4.95)
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    return figure
