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
