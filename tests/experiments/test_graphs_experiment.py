"""Experiment 15: each forward runs, and the table says how each way of capture went."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import render
import table
from common import Records

FOLDER = table.FOLDER / "15_graphs"


def record(case, system, metric, value):
    return {"case": case, "system": system, "metric": metric, "value": value, "unit": "ms", "gpu": "none"}


def test_the_table_says_how_it_went():
    found = "b at=x.py:3 kind=read mended={} operation=torch.Tensor.item"
    records = [
        *(
            record("a", system, "forward", value)
            for system, value in (("eager", 3.0), ("torch-capture", 1.0), ("vattn", 1.5))
        ),
        *(record("b", "eager", "forward", 2.0), record("b", "torch-capture", "refused", 1)),
        *(record(found.format("no"), "vattn", "found", 4), record(found.format("yes"), "vattn", "found", 1)),
        *(record("c", "eager", "forward", 2.0), record("c", "torch-capture", "wrong", 1)),
        record("c kind=output mended=no operation=a_set_in_the_output", "vattn", "found", 1),
    ]
    lines = [line.strip("| ").split(" | ") for line in render.report(FOLDER).twelve(records).splitlines()[2:]]
    item = "read: torch.Tensor.item at x.py:3"
    assert lines == [
        ["a", "captured", "captured", "3.000", "1.000", "1.500", "2.00", "nothing"],
        ["b", "fails", "stays eager", "2.000", "–", "–", "–", f"{item}; {item} (mended)"],
        ["c", "captured, wrong results", "stays eager", "2.000", "–", "–", "–", "output: a_set_in_the_output"],
    ]
    assert render.report(FOLDER).twelve([]) == ""


def test_each_machine_has_a_row_of_its_own():
    def of(gpu, *records):
        return [{**each, "gpu": gpu} for each in records]

    found = record("a at=x.py:3 kind=read mended=no operation=torch.Tensor.item", "vattn", "found", 1)
    again = [record("a", "eager", "again", 3.0), record("a", "graph", "again", 2.0)]
    regret = record("a choice=graph", "vattn", "regret", 0.5)
    records = [
        *of("NVIDIA H100 80GB HBM3", record("a", "eager", "forward", 1.0), found),
        *of("NVIDIA H200", record("a", "eager", "forward", 2.0), found, *again, regret),
    ]
    report = render.report(FOLDER)
    lines = [line.strip("| ").split(" | ") for line in report.twelve(records).splitlines()[2:]]
    item = "read: torch.Tensor.item at x.py:3"
    assert lines == [
        ["a", "NVIDIA H100", "–", "stays eager", "1.000", "–", "–", "–", item],
        ["a", "NVIDIA H200", "–", "stays eager", "2.000", "–", "–", "–", "the same"],
    ]
    assert "| a | 3.000 | 2.000 | – | graph | 0.5 |" in report.choices(records)


def test_the_table_of_choices_says_what_was_lost_and_how_many_graphs_hurt():
    def forward(name, choice, regret, **ms):
        again = [record(name, way, "again", value) for way, value in ms.items()]
        return [*again, record(f"{name} choice={choice}", "vattn", "regret", regret)]

    records = [
        *forward("a", "indirect", 0.0, eager=3.0, graph=2.0, indirect=1.0),
        *forward("b", "eager", 0.0, eager=1.0, graph=2.0),
        *forward("c", "graph", 12.5, eager=8.0, graph=9.0, indirect=9.5),
        record("d", "eager", "forward", 1.0),  # not captured
        record("indirection bytes=4096 kernels=1", "graph", "call", 5.0),
    ]
    *lines, _, hurt = render.report(FOLDER).choices(records).splitlines()
    assert [line.strip("| ").split(" | ") for line in lines[2:]] == [
        ["a", "3.000", "2.000", "1.000", "indirect", "0.0"],
        ["b", "1.000", "2.000", "–", "eager", "0.0"],
        ["c", "8.000", "9.000", "9.500", "graph", "12.5"],
    ]
    assert hurt.startswith("2 of 3 graphs")
    assert render.report(FOLDER).choices(records[-2:]) == ""


def test_copies_of_inputs_are_measured(tmp_path):
    sys.path.insert(0, str(FOLDER))
    try:
        from indirection import CASES, QUICK_SIZES, indirection
    finally:
        sys.path.remove(str(FOLDER))
    records = Records("15_graphs", True, ["indirection"])
    records.path = tmp_path / "quick.jsonl"
    indirection(records, True)
    records.end()
    ways = {"eager", "graph", "indirect"} if torch.cuda.is_available() else {"eager"}
    calls = {(r["case"], r["system"]) for r in table.read(records.path) if r["metric"] == "call" and r["value"] > 0}
    cases = [f"indirection bytes={size} kernels={kernels}" for size in QUICK_SIZES for kernels in CASES]
    assert calls == {(case, way) for case in cases for way in ways}


@pytest.mark.parametrize("name", ["host-mask-and-table", "looped-experts", "llama", "vit"])
def test_a_forward_is_measured(name):
    pytest.importorskip("transformers")
    command = [sys.executable, FOLDER / "run.py", "--forward", name, "--quick"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    measured = json.loads(child.stdout.splitlines()[-1])
    assert min(measured["eager"]) > 0
    kinds = {(kind, mended) for kind, _, _, _, mended, _ in measured["findings"]}
    assert ("vattn" in measured) == torch.cuda.is_available()
    if name == "host-mask-and-table":
        assert kinds == {("host", True)}
    if name == "looped-experts":
        assert kinds == {("shape", False)}
