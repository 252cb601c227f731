"""Tables of what is better when it is more."""

from __future__ import annotations

from table import Record, by_case, markdown, number


def rates(records: list[Record], metric: str, *systems: str) -> str:
    """Tokens per second of each system, as shares of the limit where there is one, and vattn's over the other's."""
    found = {case: each for case, each in by_case(records, metric).items() if "vattn" in each}
    if not found:
        return ""
    rows = []
    for case, each in found.items():
        cells = [_cell(each, system) for system in ("limit", *systems)]
        others = [each["vattn"] / each[name] for name in systems if name in each and name != "vattn"]
        rows.append([case, *cells, f"{min(others):.3f}" if others else "–"])
    return markdown(["case", *(f"{name}, tokens/s" for name in ("limit", *systems)), "vattn / the other"], rows)


def _cell(each: dict[str, float], system: str) -> str:
    if system not in each:
        return "–"
    text = number(each[system])
    return f"{text} ({each[system] / each['limit']:.0%})" if "limit" in each and system != "limit" else text
