"""Tables of the experiment on sharing and parking. What was not measured yet has a line that says so instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common import markdown
from tables_common import fields

Record = dict[str, Any]
_MISSING = "Not measured yet: it takes an NVIDIA GPU.\n"


def _part(records: list[Record], part: str) -> list[tuple[dict[str, str], Record]]:
    """(words of the case, record) of those whose case begins with the name of the part."""
    return [(fields(record["case"]), record) for record in records if record["case"].split()[0] == part]


def _machine(record: Record) -> str:
    return "CPU only" if record["gpu"] == "none" else str(record["gpu"])


def _cell(record: Record | None, digits: int = 2) -> str:
    return "–" if record is None else f"{record['value']:,.{digits}f}"


def sharing_forks(records: list[Record]) -> str:
    """All forks, or copies, of a prompt: ms with the spread, driver calls, and what they add."""
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    extra: dict[tuple[str, ...], Record] = {}
    for words, record in _part(records, "forks"):
        key = (_machine(record), words["driver"], words["prompt"], words["ways"], record["system"])
        if record["metric"] == "extra_bytes":
            extra[key] = record
        else:
            found.setdefault((*key, words.get("slots", "")), {})[record["metric"]] = record
    rows = []
    for (*key, how), cells in found.items():
        machine, driver, prompt, ways, system = key
        name = "copy" if system == "copy" else f"fork, {'fresh slots' if how == 'fresh' else 'the same slots again'}"
        time = cells["all_ways"]
        ms = f"{time['value'] / 1e3:,.2f} ({time['p20'] / 1e3:,.2f}–{time['p80'] / 1e3:,.2f})"
        calls = _cell(cells.get("driver_calls"), 0)
        rows.append([machine, driver, f"{int(prompt):,}", ways, name, ms, calls, _cell(extra.get(tuple(key)), 0)])
    header = ["machine", "driver", "prompt", "ways", "how", "all of them, ms", "driver calls", "extra memory, MiB"]
    return markdown(header, rows)


def sharing_requests(records: list[Record]) -> str:
    """Driver calls of a request; the same on every machine, so the newest records count."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for words, record in _part(records, "serving"):
        key = (words["lengths"], words["limit"], record["system"])
        found.setdefault(key, {})[record["metric"]] = record["value"]
    rows = []
    for (lengths, share, system), cells in found.items():
        after = cells.get("warmed_up_after")
        rows.append(
            [
                *(lengths, f"{share}× ({cells['limit']:.1f} GiB)", system),
                *(f"{cells['warm_up']:,.0f} + {cells['requests']:,.0f}", f"{cells['busy']:.1f}"),
                *(f"{cells['pages']:.1f}", f"{cells['calls_mean']:.3f}", f"{cells['calls_any']:.2f} %"),
                *("never" if after is None else f"{after:,.0f}", f"{cells['peak_memory']:.1f}"),
            ]
        )
    header = ["lengths", "limit", "system", "requests", "busy slots", "pages", "driver calls", "with any call"]
    return markdown([*header, "under 0.1 after", "peak, GiB"], rows)


def sharing_mapping(records: list[Record]) -> str:
    """Microseconds of the host per page: all of it, Python's alone, and the driver's calls by themselves."""
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    for words, record in _part(records, "mapping"):
        column = "calls-only" if record["system"] == "calls-only" else words["driver"]
        column = column if column in ("calls-only", "ledger") else "real"
        cells = found.setdefault((_machine(record), words["kind"], words["pages"]), {})
        cells[column] = record
        if column == "real":
            cells["name"] = record | {"driver": words["driver"]}
    rows = []
    for (machine, kind, pages), cells in found.items():
        real, python, calls = (cells.get(column) for column in ("real", "ledger", "calls-only"))
        share = f"{python['value'] / real['value']:.0%}" if real and python else "–"
        name = cells["name"]["driver"] if "name" in cells else "–"
        rows.append([machine, name, kind, pages, _cell(real, 1), _cell(python, 1), share, _cell(calls, 1)])
    header = ["machine", "driver", "pages are", "pages", "ensure_batch, µs a page", "on the ledger, µs a page"]
    return markdown([*header, "Python’s share", "calls alone, µs a page"], rows)


def sharing_scrub(records: list[Record]) -> str:
    """Microseconds of the GPU to zero a page, by how it comes to that."""
    rows = [
        [_machine(record), words["how"], _cell(record, 3), f"{record['p20']:.3f} to {record['p80']:.3f}"]
        for words, record in _part(records, "scrub")
        if record["metric"] == "gpu_per_page"
    ]
    return markdown(["machine", "how", "µs a page", "20th to 80th percentile"], rows) if rows else _MISSING


def sharing_scrub_share(records: list[Record]) -> str:
    """What scrubbing is of a decode step."""
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for words, record in _part(records, "scrub"):
        if "B" in words:
            found.setdefault((_machine(record), words["B"], words["L"]), {})[record["metric"]] = record
    rows = [
        [*key, _cell(cells.get("decode_step")), f"{int(key[1]) / 16:g}", f"{_cell(cells.get('scrub_share'), 3)} %"]
        for key, cells in found.items()
    ]
    header = ["machine", "batch", "tokens", "decode step, ms", "pages a step", "scrubbing them"]
    return markdown(header, rows) if rows else _MISSING


def sharing_beside(records: list[Record]) -> str:
    """Decode steps with something beside them: ms, and ratios to those without."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for _, record in _part(records, "beside"):
        found.setdefault((_machine(record), record["system"]), {})[record["metric"]] = record
    rows = [
        [
            *key,
            _cell(cells.get("churn_rate"), 0),
            *(_cell(cells.get(name), 3) for name in ("decode_step", "decode_step_p99", "decode_step_max")),
            *(_cell(cells.get(name), 3) for name in ("p50_ratio", "p99_ratio")),
            f"{blocks['p20']:.3f}–{blocks['p80']:.3f}" if (blocks := cells.get("block_p99_ratio")) else "–",
        ]
        for key, cells in found.items()
    ]
    header = ["machine", "beside", "pages/s", "p50, ms", "p99, ms", "longest, ms", "p50 ratio", "p99 ratio"]
    header.append("p99 ratio of its blocks, 20th to 80th percentile")
    return markdown(header, rows) if rows else _MISSING


SHARING_TABLES: dict[str, Callable[[list[Record]], str]] = {
    function.__name__: function
    for function in (
        *(sharing_forks, sharing_requests, sharing_mapping, sharing_scrub, sharing_scrub_share, sharing_beside),
    )
}
