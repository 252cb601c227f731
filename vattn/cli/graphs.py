"""``vattn info --graphs``: which way to run a step was measured as fastest, and what the others would cost."""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..tuning.choices import EAGER, Choices, choices_for, kept_choices, versions_now
from .report import facts_table, show
from .text import one_line

__all__ = ["graph_choices", "print_graph_choices"]

_COLUMNS = ("batch", "signature")  # parts of keys that a table has a line for each of
_HOW = 'DecodeLoop(model, cache, graphs="measure") measures them when it opens'


def graph_choices(args: argparse.Namespace) -> dict[str, Any]:
    """The choices in the file that is named, else in those of every GPU, ready for JSON.

    Raises:
        ConfigError: there is no such file.
    """
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if args.graphs:
        if not (path := Path(args.graphs)).is_file():
            raise ConfigError(f"no file of choices at {path}: `vattn info --graphs` alone lists those that there are")
        stores = [Choices(path)]
    else:
        stores = kept_choices()
        if here is not None:
            own = choices_for(torch.device("cuda", torch.cuda.current_device()))
            stores = [own, *(store for store in stores if store.path != own.path)]
    return {"versions": dict(versions_now()), "files": [_file(store, here) for store in stores]}


def _file(store: Choices, here: str | None) -> dict[str, Any]:
    records, reason = store.read()
    choices: list[dict[str, Any]] = [
        {
            "key": key,
            "way": choice.way,
            "us": dict(choice.us),
            "slower_percent": {way: round(choice.slower_percent(way), 1) for way in choice.us},
            "failed": dict(choice.failed),
            "versions": dict(choice.versions),
            "current": choice.current if store.gpu == here else None,
            "made": choice.made,
        }
        for key, choice in records
    ]
    choices.sort(key=lambda each: (*_what(each), each["key"].get("batch", 0), str(each["key"].get("signature"))))
    return {"path": str(store.path), "gpu": store.gpu, "here": store.gpu == here, "reason": reason, "choices": choices}


def _what(choice: dict[str, Any]) -> tuple[str, str]:
    """What the choices of one table have in common."""
    return str(_shape(choice)), str(choice["versions"])


def _shape(choice: dict[str, Any]) -> dict[str, str | int]:
    return {name: value for name, value in choice["key"].items() if name not in _COLUMNS}


def print_graph_choices(document: dict[str, Any]) -> None:
    """The document of ``graph_choices``: for each file and each shape a few facts and a table."""
    tables: list[Table] = []
    for file in document["files"]:
        facts = [("GPU", (file["gpu"] or "not named") + (", this machine's" if file["here"] else ""))]
        facts.append(("file", file["path"]))
        if file["reason"] is not None:
            facts.append(("broken", file["reason"]))
        if not file["choices"]:
            facts.append(("choices", f"none: {_HOW}"))
        tables.append(facts_table(facts))
        for _, group in groupby(file["choices"], _what):
            tables += _tables(list(group))
    if not tables:
        tables.append(facts_table([("choices", f"none: {_HOW}, on a machine with an NVIDIA GPU")]))
    show(sys.stdout, *tables)


def _tables(choices: list[dict[str, Any]]) -> list[Table]:
    """Of choices for one shape, measured with the same versions."""
    first = choices[0]
    facts = [("", "")] + [(name, str(value)) for name, value in _shape(first).items()]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    days = sorted(choice["made"] for choice in choices)
    facts.append(("measured", days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"))
    facts.append(("with", versions if first["current"] is not False else f"{versions}: not today's, measured again"))
    columns = [name for name in _COLUMNS if any(name in choice["key"] for choice in choices)]
    for choice in choices:
        where = "".join(f", {name} {choice['key'][name]}" for name in columns if name in choice["key"])
        facts += [("failed", f"{way}{where}: {why}") for way, why in choice["failed"].items()]
    table = Table(title="µs, and how much longer than what was chosen", title_justify="left", box=None)
    for name in columns:
        table.add_column(name, justify="right" if name == "batch" else "left")
    ways = list(dict.fromkeys(way for choice in choices for way in (EAGER, *choice["us"], *choice["failed"])))
    for way in ways:
        table.add_column(Text(one_line(way)), justify="right", min_width=len("1234.5 +678 %"))
    for choice in choices:
        cells = [Text(_cell(choice, way), style="bold" if way == choice["way"] else "") for way in ways]
        table.add_row(*(Text(one_line(choice["key"].get(name, ""))) for name in columns), *cells)
    return [facts_table(facts), table]


def _cell(choice: dict[str, Any], way: str) -> str:
    if way not in choice["us"]:
        return "failed" if way in choice["failed"] else ""
    more = "chosen" if way == choice["way"] else f"{choice['slower_percent'][way]:+.0f} %"
    return f"{choice['us'][way]:.1f} {more:>6}"
