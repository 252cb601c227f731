"""``vattn bench`` over a folder of experiments that take no time."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from vattn.cli.main import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RUN = """
import argparse, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Records
NEEDS = ({needs})
parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true")
records = Records("{name}", parser.parse_args().quick)
for system in ("vattn", "paged-16"):
    records.add("B=1 L=2", system, "decode_step", "ms", [1.0, 2.0, 3.0])
{then}
records.write()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments"
    folder.mkdir()
    for path in EXPERIMENTS.glob("*.py"):
        shutil.copy(path, folder)
    for name, needs, then in (
        ("01_quick", "", ""),
        ("02_broken", "", "raise SystemExit(3)"),
        ("03_elsewhere", '"no_such_module", ', ""),
    ):
        (folder / name).mkdir()
        (folder / name / "run.py").write_text(RUN.format(name=name, needs=needs, then=then))
        table = "<!-- table pivot case vattn,paged-16 where=decode_step -->\n<!-- end -->\n"
        text = f"# Is {name} fast?\n\n<!-- table cards -->\n<!-- end -->\n\n{table}"
        (folder / name / "README.md").write_text(text)
    return folder


def test_all(folder, capfd):
    assert main(["bench", "--all", "--folder", str(folder)]) == 1
    out, err = capfd.readouterr()
    assert "[1/3] 01_quick: Is 01_quick fast?" in out
    assert "skipped: needs the module no_such_module" in out
    assert err == "vattn: failed: 02_broken\n"
    assert "skipped: 03_elsewhere" in out
    records = [json.loads(line) for line in (folder / "01_quick" / "results.jsonl").read_text().splitlines()]
    assert [(record["system"], record["value"]) for record in records] == [("vattn", 2.0), ("paged-16", 2.0)]
    assert records[0]["command"] == "python experiments/01_quick/run.py"
    assert "* CPU only" in (folder / "01_quick" / "README.md").read_text() or "* NVIDIA" in out
    assert "| B=1 L=2 | 2.000 | 2.000 |" in (folder / "01_quick" / "README.md").read_text()
    assert not (folder / "02_broken" / "results.jsonl").exists()


def test_a_quick_run_changes_no_record(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder.parent)
    before = (folder / "01_quick" / "README.md").read_text()
    assert main(["bench", "--quick", "quick", "01"]) == 0
    out, _ = capfd.readouterr()
    assert "[1/1] 01_quick" in out
    assert "experiments/01_quick/run.py --quick`" in out  # the table's card, last
    assert not (folder / "01_quick" / "results.jsonl").exists()
    assert (folder / "01_quick" / "README.md").read_text() == before


def test_records_are_not_written_anew_unasked(folder, capfd):
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["bench", "--folder", str(folder)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "give --all for that, or names out of 01_quick, 02_broken" in err
    assert main(["bench", "--all", "--folder", str(folder), "quick"]) == 2
    assert "names of experiments or --all, not both" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert main(["bench", "--quick", "--folder", str(folder)]) == 1  # of all
    assert "[3/3] 03_elsewhere" in capfd.readouterr().out
    assert not (folder / "01_quick" / "results.jsonl").exists()


def test_wrong_names(folder, tmp_path, capfd):
    assert main(["bench", "--folder", str(folder), "nonsense"]) == 2
    assert "there is no experiment 'nonsense', only 01_quick" in capfd.readouterr().err
    assert main(["bench", "--folder", str(tmp_path)]) == 2
    assert "clone of the repository" in capfd.readouterr().err


def test_every_experiment_says_what_it_needs():
    for path in EXPERIMENTS.glob("*/run.py"):
        text = path.read_text()
        needs = re.search(r"^NEEDS = \((.*)\)$", text, re.MULTILINE)
        wants_gpu = needs is not None and '"cuda"' in needs[1]
        assert wants_gpu == ("Needs an NVIDIA GPU" in text), path
