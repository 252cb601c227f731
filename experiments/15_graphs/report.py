"""The tables of the twelve forwards."""

from __future__ import annotations

from table import Record, fields, markdown, number

HOW = {"forward": "captured", "wrong": "captured, wrong results", "refused": "fails"}


def twelve(records: list[Record]) -> str:
    """Forward, how each way of capture went, milliseconds of each, and what was found."""
    rows = []
    for name in _forwards(records):
        own = [record for record in records if record["case"].split()[0] == name]
        ms = {record["system"]: record["value"] for record in own if record["metric"] == "forward"}
        found = [record for record in own if record["metric"] == "found"]
        plain = [HOW[record["metric"]] for record in own if record["system"] == "torch-capture"]
        gain = f"{ms['eager'] / ms['vattn']:.2f}" if "vattn" in ms else "–"
        times = [number(ms[system]) if system in ms else "–" for system in ("eager", "torch-capture", "vattn")]
        made = "captured" if "vattn" in ms else "stays eager"
        rows.append([name, *(plain or ["–"]), made, *times, gain, "; ".join(map(_words, found)) or "nothing"])
    if not rows:
        return ""
    times = ["eager, ms", "captured as it is, ms", "after make_capturable, ms", "eager / after"]
    return markdown(["forward", "captured as it is", "after `make_capturable`", *times, "found"], rows)


def choices(records: list[Record]) -> str:
    """Which way was chosen, what each was when it was timed again, and how many graphs are slower than the forward."""
    rows, hurt = [], 0
    for name in _forwards(records):
        own = [record for record in records if record["case"].split()[0] == name]
        ms = {record["system"]: record["value"] for record in own if record["metric"] == "again"}
        regret = next((record for record in own if record["metric"] == "regret"), None)
        if regret is None:
            continue
        hurt += ms["graph"] > ms["eager"]
        times = [number(ms[way]) if way in ms else "–" for way in ("eager", "graph", "indirect")]
        rows.append([name, *times, fields(regret["case"])["choice"], f"{regret['value']:.1f}"])
    if not rows:
        return ""
    header = ["forward", "eager, ms", "graph, ms", "graph that reads inputs where they are, ms", "choice", "regret, %"]
    table = markdown(header, rows)
    return f"{table}\n{hurt} of {len(rows)} graphs that copy their inputs are slower than the forward.\n"


def _forwards(records: list[Record]) -> list[str]:
    """Their names, in the order of the records."""
    names = dict.fromkeys(record["case"].split()[0] for record in records)
    return [name for name in names if name != "indirection"]


def _words(record: Record) -> str:
    words = fields(record["case"])
    at = f" at {words['at']}" if "at" in words else ""
    mended = " (mended)" if words["mended"] == "yes" else ""
    return f"{words['kind']}: {words['operation']}{at}{mended}"
