"""Writes the tables of the experiments' READMEs from their records: ``python experiments/tables.py [--check]``.

Tables stand between ``<!-- table NAME -->`` and ``<!-- end -->``; the function of that name makes what belongs there.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import markdown, read
from tables_common import by_case, fields, records_of
from tables_layouts import LAYOUT_TABLES
from tables_overview import OVERVIEW_TABLES
from tables_paper import PAPER_TABLES
from tables_sharing import SHARING_TABLES

FOLDER = Path(__file__).parent
Record = dict[str, Any]
_MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def number(record: Record | None) -> str:
    if record is None:
        return "–"
    value = record["value"]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def cards(records: list[Record]) -> str:
    """One line for each machine and command that made records."""
    seen = {}
    for record in records:
        where = record["gpu"] if record["gpu"] != "none" else "CPU only"
        seen[where, record["command"]] = (
            f"{where} ({record['driver']}), torch {record['torch']}, {record['date']}, commit {record['commit']}, "
            f"`{record['command']}`"
        )
    return "".join(f"* {line}\n" for line in seen.values())


def _within(values: list[float], share: float) -> float:
    """What this share of the values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def again(records: list[Record]) -> str:
    """By metric: the spread within the first run, (p80 - p20) / median, and how far a second run was from it."""
    ratios: dict[str, list[tuple[float, Record]]] = {}
    for record in records:
        if "again" in record and record["value"] and record["system"] != "limit":
            ratios.setdefault(record["metric"], []).append((record["again"] / record["value"], record))
    rows = []
    for metric, pairs in ratios.items():
        apart = [abs(ratio - 1) for ratio, _ in pairs]
        spread = [(record["p80"] - record["p20"]) / record["value"] for _, record in pairs]
        ratio, record = max(pairs, key=lambda pair: abs(pair[0] - 1))
        rows.append(
            [
                metric,
                str(len(pairs)),
                f"{_within(spread, 0.5):.1%}, {_within(spread, 0.9):.1%}" if any(spread) else "–",
                f"{statistics.median(ratio for ratio, _ in pairs):.3f}",
                f"{_within(apart, 0.9):.1%}",
                f"{ratio:.3f} ({record['case']}, {record['system']})",
            ]
        )
    header = ["metric", "figures", "20th to 80th percentile of the median: half, nine of ten within"]
    header += ["second / first, median", "nine of ten within", "furthest apart"]
    return markdown(header, rows) if rows else ""


def driver_calls(records: list[Record]) -> str:
    calls = ("create", "map", "set_access", "unmap", "release")
    found = {
        (record["gpu"], words["driver"], words["handle"], record["metric"]): record
        for record in records
        if "handle" in (words := fields(record["case"]))
    }
    groups = list(dict.fromkeys(key[:3] for key in found))
    rows = [
        [
            driver,
            handle,
            "CPU only" if gpu == "none" else gpu,
            *(number(found.get((gpu, driver, handle, call))) for call in calls),
        ]
        for gpu, driver, handle in groups
    ]
    return markdown(["driver", "handle", "machine", *(f"{call}, µs" for call in calls)], rows)


def ensure_batch(records: list[Record]) -> str:
    found = {}
    for record in records:
        words = fields(record["case"])
        if "slots" in words:
            what = words.get("crossing", "release")
            key = (record["gpu"], words["driver"], int(words["slots"]), int(words["layers"]))
            found.setdefault(key, {})[what, record["metric"]] = record
    rows = []
    for (gpu, driver, slots, layers), cells in found.items():
        rows.append(
            [driver, "CPU only" if gpu == "none" else gpu, f"{slots:,}", str(layers)]
            + [
                number(cells.get(key))
                for key in (
                    ("none", "ensure_batch"),
                    ("1%", "ensure_batch"),
                    ("1%", "per_page"),
                    ("all", "ensure_batch"),
                    ("all", "per_page"),
                    ("release", "per_page"),
                )
            ]
        )
    header = ["driver", "machine", "slots", "layers", "no crossing, µs", "1 % crossing, µs", "… per page"]
    return markdown([*header, "all crossing, µs", "… per page", "release, µs per page"], rows)


def hf_memory(records: list[Record]) -> str:
    """Memory beyond the weights: MiB, and times what K and V alone take."""
    return _hf(records, "peak_memory", lambda found, limit: f"{found['value']:,.0f} ({found['value'] / limit:.2f}×)")


def hf_steps(records: list[Record]) -> str:
    """Eager decode steps, each number of tokens for the first time: ms, and the limit's share of them."""
    return _hf(records, "decode_step", lambda found, limit: f"{found['value']:.1f} ({limit / found['value']:.0%})")


def hf_ratios(records: list[Record]) -> str:
    """A step over the dynamic cache's step beside it: median, 20th and 80th percentile."""
    found = {(record["case"], record["system"], record["metric"]): record for record in records}
    rows = []
    for case in dict.fromkeys(record["case"] for record in records if record["metric"] == "step_ratio"):
        words, ratio = fields(case), found[case, "vattn", "step_ratio"]
        times = (found[case, system, "decode_step_again"]["value"] for system in ("transformers-dynamic", "vattn"))
        spread = f"{ratio['value']:.3f} ({ratio['p20']:.2f}–{ratio['p80']:.2f})"
        sizes = (f"{int(words[key]):,}" for key in ("L", "max" if "max" in words else "L"))
        allocator = words.get("allocator", "default")
        rows.append([words["B"], *sizes, allocator, *(f"{time:.1f}" for time in times), spread])
    last = ("transformers-dynamic, ms", "vattn, ms", "vattn / dynamic, step by step")
    return markdown(["batch", "tokens", "maximum", "allocator", *last], rows)


def _hf(records: list[Record], metric: str, cell: Callable[[Record, float], str]) -> str:
    found = {
        (record["case"], record["system"]): record
        for record in records
        if record["metric"] == metric and not record["case"].startswith("ratio ")
    }
    systems = ("transformers-dynamic", "transformers-static", "vattn")
    rows = []
    cases = {case: fields(case) for case, system in found if system != "limit"}

    def order(words: dict[str, str]) -> tuple[bool, bool, int, int]:
        return "allocator" in words, "max" in words, int(words["L"]), int(words["B"])

    for case, words in sorted(cases.items(), key=lambda item: order(item[1])):
        limit = found[f"8B B={words['B']} L={words['L']}", "limit"]["value"]
        values = [found.get((case, system)) for system in systems]
        rows.append(
            [
                words["B"],
                f"{int(words['L']):,}",
                f"{int(words.get('max', words['L'])):,}",
                words.get("allocator", "default"),
                f"{limit:,.0f}" if metric == "peak_memory" else f"{limit:.1f}",
                *("–" if record is None else cell(record, limit) for record in values),
            ]
        )
    unit = "MiB" if metric == "peak_memory" else "ms"
    return markdown(
        ["batch", "tokens", "maximum", "allocator", f"limit, {unit}", *(f"{name}, {unit}" for name in systems)], rows
    )


def capacity(records: list[Record]) -> str:
    """Sequences that fit, medians over the seeds, and how many times a peer's vattn's are."""
    systems = ("full", "layer-major", "paged-16", "vattn", "vattn-margin")
    found = {(record["case"], record["system"], record["metric"]): record for record in records}
    rows = []
    for case in dict.fromkeys(record["case"] for record in records):
        words = fields(case)
        counts = [found[case, system, "sequences"] for system in systems]
        ratios = [found[case, "vattn", f"over_{peer}"] for peer in ("paged-16", "layer-major")]
        rows.append(
            [
                f"{words['limit'].removesuffix('GiB')} GiB, {words['driver']}",
                words["shape"],
                words["trace"],
                *(f"{count['value']:,.0f} ({count['p20']:,.0f}–{count['p80']:,.0f})" for count in counts),
                *(f"{ratio['value']:.3f}" for ratio in ratios),
            ]
        )
    return markdown(["memory", "shape", "trace", *systems, "vattn / paged-16", "vattn / layer-major"], rows)


def page_sizes(records: list[Record]) -> str:
    """Sequences that fit, and the share of their memory that holds no row."""
    found = {(record["case"], record["system"], record["metric"]): record["value"] for record in records}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for case, system in dict.fromkeys((record["case"], record["system"]) for record in records):
        words = fields(case)
        name, tokens = (system, "") if "page" in words else system.rsplit("-", 1)
        size = f"block of {tokens} tokens"
        if "page" in words:
            kib = int(words["page"].removesuffix("KiB"))
            size = f"page of {kib} KiB" if kib < 1024 else f"page of {kib // 1024} MiB"
        cell = f"{found[case, system, 'sequences']:,.0f} ({found[case, system, 'waste']:.1%})"
        rows.setdefault((words["shape"], size), {})[name] = cell
    systems = ("vattn", "layer-major", "paged")
    return markdown(
        ["shape", "size", *systems],
        [[*row, *(cells.get(system, "–") for system in systems)] for row, cells in rows.items()],
    )


def decode_steps(records: list[Record]) -> str:
    """Every case against the limit and the peers: ms, and the limit's share of them."""
    systems = ("vattn", "torch-compile", "transformers-static-compile", "transformers-dynamic")
    rows = []
    for case, values in by_case(records, "decode_step").items():
        if "limit" in values:
            cells = [f"{values[s]:.2f} ({values['limit'] / values[s]:.0%})" if s in values else "–" for s in systems]
            rows.append([case, f"{values['limit']:.2f}", *cells])
    return markdown(["case", "limit, ms", *(f"{system}, ms" for system in systems)], rows)


def decode_ablations(records: list[Record]) -> str:
    """What each change adds to a step: µs and percent."""
    cases = {case: values for case, values in by_case(records, "decode_step").items() if "vattn-no-graph" in values}
    systems = list(dict.fromkeys(s for values in cases.values() for s in values if s.startswith("vattn-")))
    rows = [
        [system]
        + [
            f"{(values[system] - values['vattn']) * 1e3:+.0f} ({values[system] / values['vattn'] - 1:+.1%})"
            for values in cases.values()
        ]
        for system in systems
    ]
    return markdown(["instead", *(f"{case}, µs" for case in cases)], rows)


def decode_attention(records: list[Record]) -> str:
    """The whole step with each attention backend: ms."""
    systems = ["vattn", *(f"vattn-{n}" for n in ("triton-decode", "flash-attn-2", "flash-attn-3", "torch-varlen"))]
    rows = [
        [case, *(f"{values[system]:.2f}" if system in values else "–" for system in systems)]
        for case, values in by_case(records, "decode_step").items()
        if "limit" in values
    ]
    return markdown(["case", "measured choice, ms", *(f"{system[6:]}, ms" for system in systems[1:])], rows)


def decode_mapping(records: list[Record]) -> str:
    """Pages mapped as sequences grow against pages mapped beforehand: p50 and p99, ms and ratio."""
    found = {(r["system"], r["metric"]): r["value"] for r in records if "staggered" in r["case"]}
    rows = []
    for system in ("vattn-premapped", "vattn", "vattn-inline-mapping"):
        row = [system]
        for metric in ("decode_step", "decode_step_p99"):
            value, base = found[system, metric], found["vattn-premapped", metric]
            row += [f"{value:.3f}", f"{value / base:.4f}"]
        rows.append(row)
    return markdown(["system", "p50, ms", "ratio", "p99, ms", "ratio"], rows)


TABLES: dict[str, Callable[[list[Record]], str]] = (
    {
        function.__name__: function
        for function in (
            *(cards, again, driver_calls, ensure_batch, hf_memory, hf_steps, hf_ratios),
            *(capacity, page_sizes),
            *(decode_steps, decode_ablations, decode_attention, decode_mapping),
        )
    }
    | LAYOUT_TABLES
    | OVERVIEW_TABLES
    | PAPER_TABLES
    | SHARING_TABLES
)


def tables(folder: Path, records: list[Record]) -> str:
    """The tables of an experiment's README, made of these records; what they have no cases for is left out."""
    made = []
    for _, name, _ in _MARKED.findall((folder / "README.md").read_text()):
        with suppress(KeyError, StopIteration):
            made.append(TABLES[name](records))
    return "\n".join(made)


def render(folder: Path) -> str:
    """The README of an experiment with its tables made anew."""
    records = records_of(folder)
    places = {(r["gpu"], r["case"], r["system"], r["metric"]): r for r in records}
    for record in records_of(folder, "again.jsonl"):
        place = (record["gpu"], record["case"], record["system"], record["metric"])
        if place in places:
            places[place]["again"] = record["value"]
    text = (folder / "README.md").read_text()
    if not records and (folder / "run.py").exists():  # not measured yet, or not any more
        return _MARKED.sub(lambda match: match[1] + match[3], text)
    return _MARKED.sub(lambda match: match[1] + TABLES[match[2]](records) + match[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", metavar="FILE", help="print the tables that these records make, and write nothing")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a table differs from its records"
    )
    options = parser.parse_args()
    if options.show:
        print(tables(Path(options.show).parent, read(Path(options.show))))
        return 0
    stale = []
    for readme in [FOLDER.parent / "README.md", *sorted(FOLDER.rglob("README.md"))]:
        folder = readme.parent
        if not readme.exists():
            continue  # a copy of the experiments alone
        text = render(folder)
        if text != readme.read_text():
            stale.append(str(readme))
            if not options.check:
                readme.write_text(text)
    print("\n".join(f"{'differs' if options.check else 'written'}: {path}" for path in stale) or "all tables agree")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
