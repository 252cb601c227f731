"""The tables, figures and plots of the READMEs are those of the records, and the records have every field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RESULTS = [*sorted(EXPERIMENTS.glob("*/results.jsonl")), *sorted(EXPERIMENTS.glob("*/again.jsonl"))]
FIELDS = {
    *("experiment", "case", "system", "metric", "value", "unit", "p20", "p50", "p80"),
    *("gpu", "driver", "torch", "commit", "date", "command"),
}


def test_tables_agree_with_their_records():
    check = subprocess.run(
        [sys.executable, EXPERIMENTS / "render.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, f"{check.stdout}{check.stderr}run python experiments/render.py"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_records_are_complete(path):
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert record.keys() == FIELDS
        assert record["experiment"] == path.parent.name
        assert record["p20"] <= record["p50"] == record["value"] <= record["p80"]
        assert "+changes" not in record["commit"], "made by code that is not committed"
