"""The tables of the twelve forwards."""

from __future__ import annotations

from collections.abc import Iterator

from table import Record, fields, machine, markdown, number

HOW = {"forward": "captured", "wrong": "captured, wrong results", "refused": "fails"}


def twelve(records: list[Record]) -> str:
    """Forward, how each way of capture went, milliseconds of each, and what was found."""
    rows: list[list[str]] = []
    for name, gpu, own in _forwards(records):
        ms = {record["system"]: record["value"] for record in own if record["metric"] == "forward"}
        found = "; ".join(_words(record) for record in own if record["metric"] == "found") or "nothing"
        plain = [HOW[record["metric"]] for record in own if record["system"] == "torch-capture"]
        gain = f"{ms['eager'] / ms['vattn']:.2f}" if "vattn" in ms else "–"
        times = [number(ms[system]) if system in ms else "–" for system in ("eager", "torch-capture", "vattn")]
        made = "captured" if "vattn" in ms else "stays eager"
        before = next((row[-1] for row in reversed(rows) if row[0] == name and row[-1] != "the same"), None)
        found = "the same" if found == before else found
        rows.append([name, gpu, *(plain or ["–"]), made, *times, gain, found])
    times = ["eager, ms", "captured as it is, ms", "after make_capturable, ms", "eager / after"]
    return _table(["forward", "machine", "captured as it is", "after `make_capturable`", *times, "found"], rows)


def choices(records: list[Record]) -> str:
    """Which way was chosen, what each was when it was timed again, and how many graphs are slower than the forward."""
    rows, hurt = [], 0
    for name, gpu, own in _forwards(records):
        ms = {record["system"]: record["value"] for record in own if record["metric"] == "again"}
        regret = next((record for record in own if record["metric"] == "regret"), None)
        if regret is None:
            continue
        hurt += ms["graph"] > ms["eager"]
        times = [number(ms[way]) if way in ms else "–" for way in ("eager", "graph", "indirect")]
        rows.append([name, gpu, *times, fields(regret["case"])["choice"], f"{regret['value']:.1f}"])
    ways = ["eager, ms", "graph, ms", "graph that reads inputs where they are, ms"]
    table = _table(["forward", "machine", *ways, "choice", "regret, %"], rows)
    counted = f"\n{hurt} of {len(rows)} graphs that copy their inputs are slower than the forward.\n"
    return f"{table}{counted}" if rows else ""


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Without the machines, the second column, where there is one only; nothing where there are no rows."""
    if len({row[1] for row in rows}) < 2:
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    return markdown(header, rows) if rows else ""


def _forwards(records: list[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Name, machine and records of each, in the order of the records."""
    names = dict.fromkeys(record["case"].split()[0] for record in records)
    for name in names:
        own = [record for record in records if record["case"].split()[0] == name and name != "indirection"]
        for gpu in dict.fromkeys(map(machine, own)):
            yield name, gpu, [record for record in own if machine(record) == gpu]


def _words(record: Record) -> str:
    words = fields(record["case"])
    at = f" at {words['at']}" if "at" in words else ""
    mended = " (mended)" if words["mended"] == "yes" else ""
    return f"{words['kind']}: {words['operation']}{at}{mended}"
