"""How a decode step grows, and the plot of the layouts."""

from __future__ import annotations

from typing import Any

from step_growth import Steps
from table import Record, by_case, markdown, records_of

NAMES = {
    "vattn": 'vattn, order="token"',
    "paged-16": "FlashAttention-3, blocks of 16",
    "paged-128": "FlashAttention-3, blocks of 128",
    "paged-256-flash-attn-2": "FlashAttention-2, blocks of 256",
}


def growth(records: list[Record]) -> str:
    """With those of a smaller model in experiment 04, which tell a layer's part from a step's."""
    smaller = by_case(records_of("04_decode"), "decode_step:1B")
    steps = Steps(by_case(records, "decode_step") | smaller)
    systems = dict.fromkeys(["vattn"]) | dict.fromkeys(s for each in steps.found.values() for s in each if s != "limit")
    rows = []
    for system in systems:
        if g := steps.fit(system):
            row = [system, ", ".join(g.shapes), f"{g.times_limit:.3f}", f"{g.layer_us:.1f}", f"{g.sequence_us:.2f}"]
            rows.append([*row, f"{g.largest_error:.1%}", *(f"{ms:,.1f}" for ms in g.far_ms.values())])
    header = ["system", "fitted to", "times the limit", "plus a layer, µs", "plus a sequence in a layer, µs"]
    header += ["largest error of the fit", "8B, 128 × 65,536, ms", "70B on 8 GPUs, 64 × 4,096, ms"]
    return markdown(header, rows)


def plot(records: list[Record]) -> Any:
    """In multiples of vattn's."""
    from plotting import dots, in_words

    steps = by_case(records, "decode_step")
    rows = {in_words(case): {name: time / each["vattn"] for name, time in each.items()} for case, each in steps.items()}
    return dots(rows, NAMES, 'time of a decode step, vattn (order="token") = 1 (H100, bfloat16)')[0]
