"""The plot of prefill attention."""

from __future__ import annotations

from typing import Any

from table import Record, by_case, fields

NAMES = {
    "vattn": 'vattn, order="token"',
    "flash-attn-3-contiguous": "FlashAttention-3, contiguous",
    "flash-attn-3-paged-16": "FlashAttention-3, blocks of 16",
    "flash-attn-3-paged-128": "FlashAttention-3, blocks of 128",
    "flash-attn-2-paged-256": "FlashAttention-2, blocks of 256",
    "flashinfer-paged-16": "FlashInfer, blocks of 16",
}


def plot(records: list[Record]) -> Any:
    """TFLOP/s over whole prompts."""
    from plotting import Figure, line

    whole = by_case(records, r"prefill_attention:8B new=(\d+) total=\1")
    found = {int(fields(case)["total"]): each for case, each in whole.items()}
    figure = Figure(figsize=(7.5, 3.6))
    axes = figure.subplots()
    for system, name in NAMES.items():
        # The limit is what 989 TFLOP/s would take.
        line(axes, name, list(found), [989 * each["limit"] / each[system] for each in found.values()])
    axes.set_ylim(0, None)
    axes.set_ylabel("TFLOP/s")
    axes.set_xlabel("tokens of the prompt (one sequence, causal, a layer of 8B heads)")
    return figure
