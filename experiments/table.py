"""Tables and figures of records. A *selector* says which: regular expressions joined by colons, each of which has to be
the record's system, metric or case, or a word of its case, as ``vattn:decode_step:8B:B=1:L=1024``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
COUNTED = ("sequences", "requests", "calls", "MiB")  # units
HEADINGS = {"B": "batch", "L": "tokens", "max": "maximum"}
Record = dict[str, Any]
Found = dict[str, dict[str, float]]  # case -> system -> value


def read(path: Path) -> list[Record]:
    """The records of a file; none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def records_of(experiment: str) -> list[Record]:
    """An experiment's records, each with a second run's value under ``"again"`` where there is one."""
    records = read(FOLDER / experiment / "results.jsonl")
    places = {tuple(r[key] for key in ("gpu", "case", "system", "metric")): r for r in records}
    for again in read(FOLDER / experiment / "again.jsonl"):
        if first := places.get(tuple(again[key] for key in ("gpu", "case", "system", "metric"))):
            first["again"] = again["value"]
    return records


def fields(case: str) -> dict[str, str]:
    """``"driver=cuda handle=2MiB release"`` -> its words, those without a value under their own name."""
    return dict(word.partition("=")[::2] for word in case.split())


def matches(record: Record, selector: str) -> bool:
    words = (record["system"], record["metric"], record["case"], *record["case"].split())
    return all(any(re.fullmatch(part, word) for word in words) for part in selector.split(":"))


def by_case(records: list[Record], selector: str) -> Found:
    """Case -> system -> value, both in the order of the records."""
    found = Found()
    for record in records:
        if matches(record, selector):
            found.setdefault(record["case"], {})[record["system"]] = record["value"]
    return found


def figure(records: list[Record], selector: str, systems: str, form: str = "") -> str:
    """Lowest and highest of all cases: ``"0.99 to 1.51"``; one number where they are the same; a dash where none is.

    Args:
        systems: a regular expression: whose values. ``over/under``: ratios of the lowest of each, in the cases that
            have both.
        form: as of ``format``; by default as in a table. ``.0f/1000`` divides by 1000 first: milliseconds of
            microseconds.
    """
    form, _, divisor = form.partition("/")
    over, _, under = systems.partition("/")
    values = []
    for each in by_case(records, selector).values():
        top, bottom = ([value for name, value in each.items() if re.fullmatch(of, name)] for of in (over, under))
        values += top if not under else [min(top) / min(bottom)] if top and bottom else []
    extremes = [end / float(divisor or 1) for end in (min(values), max(values))] if values else []
    ends = [f"{end:{form}}" if form else number(end) for end in extremes] or ["–"]
    return " to ".join(dict.fromkeys(ends))


def marked(marker: str) -> str:
    """``figure`` of a marker's words: experiment 04, or 04+ for both of its runs, and the arguments."""
    experiment, *arguments = marker.split()
    folder = next(FOLDER.glob(f"{experiment[:2]}_*"), FOLDER)
    records = records_of(folder.name)
    if experiment.endswith("+"):
        records += [{**r, "value": r["again"], "case": f"{r['case']} again"} for r in records if "again" in r]
    return figure(records, *arguments)


def number(value: float, unit: str = "") -> str:
    """Four digits, at most three of them after the point; none after it of what is counted."""
    digits = 0 if unit in COUNTED else max(0, min(3, 4 - len(str(int(abs(value))))))
    return f"{value:,.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def pivot(records: list[Record], rows: str, columns: str, *options: str) -> str:
    """Records as a table with a dash where there is none; nothing at all where none matches.

    Which machine made a record is a column of its own where there are several.

    Args:
        rows: what names a row, with commas between: words of the case, ``case`` itself, or ``system``.
        columns: selectors with commas between.
        options: ``where=SELECTOR`` for records that all columns are of; ``spread`` to have the 20th and 80th percentile
            in brackets; ``share`` to have the limit's share there, the limit being the record of that system in a row;
            ``best=REGEX`` for a last column with the best of those systems over vattn.
    """
    given = dict(option.partition("=")[::2] for option in options)
    names, found = columns.split(","), dict[tuple[str, ...], list[Record]]()
    for record in records:
        if matches(record, given.get("where", ".*")):
            words = fields(record["case"]) | {"case": record["case"], "system": record["system"]}
            key = (machine(record), *(_word(words.get(word) or "–") for word in rows.split(",")))
            found.setdefault(key, []).append(record)
    lines, units = [], dict.fromkeys(names, "")
    for key, group in found.items():
        cells: dict[str, Record] = {}
        for name, record in ((name, record) for record in group for name in names if matches(record, name)):
            if (other := cells.setdefault(name, record)) is not record:
                raise SystemExit(f"column {name!r} has two records: {_place(other)}; {_place(record)}")
        systems = {record["system"]: record for record in group}
        if cells.keys() <= {"limit"}:
            continue
        units |= {name: record["unit"] for name, record in cells.items()}
        limit = systems.get("limit") if "share" in given else None
        line = [_cell(cells[name], limit, "spread" in given) if name in cells else "–" for name in names]
        lines.append([*key, *line, *([_best(systems, given["best"])] if "best" in given else [])])
    if not lines:
        return ""
    several = len({line[0] for line in lines}) > 1
    header = ["machine", *(HEADINGS.get(word, word) for word in rows.split(","))]
    header += [_heading(name, unit) for name, unit in units.items()]
    header += ["best of the others / vattn"] * ("best" in given)
    return markdown(header[not several :], [line[not several :] for line in lines])


def _place(record: Record) -> str:
    return f"{record['system']}, {record['metric']}, {record['case']!r}"


def _word(word: str) -> str:
    return f"{int(word):,}" if word.isdigit() else word


def _heading(column: str, unit: str) -> str:
    name = column.replace(":", " ").replace("_", " ")
    return name if unit in ("", "1", "×", "ratio") or unit in name.split() else f"{name}, {unit.replace('us', 'µs')}"


def _cell(record: Record, limit: Record | None, spread: bool) -> str:
    text, ends = (number(record["value"], record["unit"]), [number(record[p], record["unit"]) for p in ("p20", "p80")])
    if spread and ends != [text, text]:
        return f"{text} ({'–'.join(ends)})"
    return f"{text} ({limit['value'] / record['value']:.0%})" if limit and record["system"] != "limit" else text


def _best(systems: dict[str, Record], pattern: str) -> str:
    peers = [record for name, record in systems.items() if re.fullmatch(pattern, name)]
    best = min(peers, key=lambda record: float(record["value"]), default=None)
    return f"{best['value'] / systems['vattn']['value']:.3f} ({best['system']})" if best and "vattn" in systems else "–"


def machine(record: Record) -> str:
    return "CPU only" if record["gpu"] == "none" else str(record["gpu"]).split(" 80GB")[0]
