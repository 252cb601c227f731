"""What tables are made with: an experiment's records by case, ratios of two systems, and their range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import read

Record = dict[str, Any]
Found = dict[str, dict[str, float]]  # case -> system -> value


def records_of(folder: Path, name: str = "results.jsonl") -> list[Record]:
    """An experiment's records; none where it was not run."""
    return read(folder / name) if (folder / name).exists() else []


def fields(case: str) -> dict[str, str]:
    """``"driver=cuda handle=2MiB release"`` -> its words, those without a value under their own name."""
    return dict(word.partition("=")[::2] for word in case.split())


def by_case(records: list[Record], metric: str) -> Found:
    """One metric: case -> system -> value, both in the order of the records."""
    found = Found()
    for record in records:
        if record["metric"] == metric:
            found.setdefault(record["case"], {})[record["system"]] = record["value"]
    return found


def ratios(found: Found, over: str, under: str, where: Callable[[str], bool] = lambda case: True) -> list[float]:
    """Of two systems, in every case that has both."""
    return [
        values[over] / values[under] for case, values in found.items() if where(case) and {over, under} <= set(values)
    ]


def best_paged(found: Found, where: Callable[[str], bool] = lambda case: True) -> list[float]:
    """The fastest paged system's time over vattn's, in every case that has both."""
    paged = {
        case: [value for system, value in values.items() if "paged-" in system]
        for case, values in found.items()
        if "vattn" in values and where(case)
    }
    return [min(times) / found[case]["vattn"] for case, times in paged.items() if times]


def span(values: list[float], digits: int = 2) -> str:
    """``"0.99 to 1.51"``, or one number where they are the same."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"
