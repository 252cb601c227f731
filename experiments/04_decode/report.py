"""What each part of a decode step is worth, and the plot of all."""

from __future__ import annotations

from typing import Any

from table import Record, by_case, markdown

NAMES = {
    "vattn": 'vattn, order="token"',
    "torch-compile": "torch.compile",
    "transformers-static-compile": "transformers, static, compiled",
    "transformers-dynamic": "transformers, dynamic",
}


def ablations(records: list[Record]) -> str:
    """What each change adds to a step: µs and percent."""
    found = {case: each for case, each in by_case(records, "decode_step").items() if "vattn-no-graph" in each}
    rows = [
        [
            name,
            *(
                f"{(each[name] - each['vattn']) * 1e3:+.0f} ({each[name] / each['vattn'] - 1:+.1%})"
                for each in found.values()
            ),
        ]
        for name in dict.fromkeys(name for each in found.values() for name in each if name.startswith("vattn-"))
    ]
    return markdown(["instead", *(f"{case}, µs" for case in found)], rows)


def plot(records: list[Record]) -> Any:
    """In multiples of the time that reading weights and cache once takes."""
    from plotting import dots, in_words

    found = {case: each for case, each in by_case(records, "decode_step").items() if "limit" in each}
    rows = {in_words(case): {name: time / each["limit"] for name, time in each.items()} for case, each in found.items()}
    figure, axes = dots(rows, NAMES, "decode step / reading weights and cache once (H100, logarithmic)")
    axes.set_xscale("log")
    ticks = [1, 1.5, 2, 3, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return figure
