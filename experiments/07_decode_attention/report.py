"""How the time of decode attention grows, and the plot of it."""

from __future__ import annotations

from typing import Any

from attention_growth import fit
from table import Record, by_case, fields, markdown

NAMES = {
    "vattn": 'vattn, order="token"',
    "flash-attn-2-contiguous": "FlashAttention-2, contiguous",
    "flash-attn-3-paged-16": "FlashAttention-3, blocks of 16",
    "flash-attn-2-paged-256": "FlashAttention-2, blocks of 256",
    "flashinfer-tensor-cores-paged-16": "FlashInfer, blocks of 16",
}


def growth(records: list[Record]) -> str:
    found = by_case(records, "decode_attention")
    systems = dict.fromkeys(system for each in found.values() for system in each if system != "limit")
    rows = [
        [system, f"{g.launch_us:.1f}", f"{g.terabytes_per_s:.2f}", f"{g.largest_error:.0%}", f"{g.far_ms:.1f}"]
        for system in systems
        if (g := fit(found, system))
    ]
    header = ["system", "launch, µs", "bandwidth, TB/s", "largest error of the fit", "128 × 65,536 extrapolated, ms"]
    return markdown(header, rows)


def plot(records: list[Record]) -> Any:
    """Share of the limit that it reaches, by context; one panel a batch size."""
    from plotting import Figure, line

    found: dict[int, dict[int, dict[str, float]]] = {}
    for case, each in by_case(records, "decode_attention").items():
        found.setdefault(int(fields(case)["B"]), {})[int(fields(case)["L"])] = each
    figure = Figure(figsize=(9.5, 3.2))
    for axes, (batch, lengths) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for system, name in NAMES.items():
            line(axes, name, list(lengths), [100 * each["limit"] / each[system] for each in lengths.values()])
        axes.set_title(f"batch {batch}", fontsize=10)
    figure.axes[0].set_ylabel("share of the limit, %")
    figure.supxlabel("tokens of each sequence", fontsize=10)
    return figure
