"""The tables made of other experiments' records: which of two is above, where nothing was measured, and that the
repository's own records make them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import tables
import tables_overview
import tables_paper


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_paper, "FOLDER", tmp_path)
    monkeypatch.setattr(tables_overview, "FOLDER", tmp_path)
    return tmp_path


def write(folder, experiment, metric, cases, **more):
    (folder / experiment).mkdir(exist_ok=True)
    with (folder / experiment / "results.jsonl").open("a") as file:
        for case, values in cases.items():
            for system, value in values.items():
                place = {"case": case, "system": system, "metric": metric, "value": value}
                file.write(json.dumps({**place, "gpu": "none", "date": "2026-01-02", **more}) + "\n")


def cells(table, row):
    """Of the row that begins so, but for its first cell."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {row}"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_nothing_measured(folder):
    for line in tables_paper.paper([]).splitlines()[2:]:
        assert "not measured yet" in line
        assert "nan" not in line


def test_a_ratio_is_paged_over_contiguous_at_16k_only(folder):
    case = {"flash-attn-2-contiguous": 2.0, "flash-attn-3-contiguous": 1.0, "flash-attn-3-paged-16": 3.0}
    cases = {f"8B B={batch} L=16384": dict(case) for batch in (1, 32)}
    cases["8B B=32 L=16384"]["flash-attn-3-paged-16"] = 4.0
    cases |= {name: {**case, "flash-attn-3-paged-16": 99.0} for name in ("8B B=128 L=16384", "8B B=1 L=1024")}
    write(folder, "07_decode_attention", "decode_attention", cases)
    table = tables_paper.paper([])
    assert cells(table, "decode attention at 16k")[1] == "FA3 on 16 3.00 to 4.00"
    assert cells(table, "… the paged kernel of the day")[1] == "FA3 on 16 1.50 to 2.00"


def test_a_prefill_is_whole_or_of_192k(folder):
    def systems(paged):
        return {"flash-attn-2-contiguous": 2.0, "flash-attn-2-paged-256": paged}

    cases = {"8B new=2048 total=2048": systems(2.2), "8B new=196608 total=196608": systems(2.5)}
    cases["8B new=2048 total=32768"] = systems(99.0)
    write(folder, "08_prefill_attention", "prefill_attention", cases)
    table = tables_paper.paper([])
    assert cells(table, "prefill attention: paged")[1] == "FA2 on 256 1.10 to 1.25"
    assert cells(table, "… a prompt of 192k")[1] == "FA2 on 256 1.25"


def test_the_overview_takes_the_fastest_paged_peer_of_each_case(folder):
    (folder / "10_layouts").mkdir()
    (folder / "10_layouts" / "README.md").write_text("# What?\n\nMore.\n")
    cases = {
        "8B B=1 L=1024": {"limit": 1.0, "vattn": 2.0, "paged-16": 3.0, "paged-256": 2.2},
        "8B B=8 L=1024": {"limit": 1.0, "vattn": 2.0, "paged-16": 1.9, "paged-256": 2.4},
    }
    assert cells(tables_overview.overview([]), "[10_layouts]")[1] == "made of the others' records"
    (folder / "10_layouts" / "run.py").write_text("")
    assert cells(tables_overview.overview([]), "[10_layouts]")[1] == "not measured yet"
    write(folder, "10_layouts", "decode_step", cases)
    question, came_out, machine, runs = cells(tables_overview.overview([]), "[10_layouts]")
    assert (question, machine, runs) == ("What?", "CPU", "1, 2026-01-02")
    assert came_out.endswith("0.950 to 1.100")


def test_every_experiment_with_records_has_a_headline():
    experiments = Path(tables_overview.__file__).parent
    measured = {path.parent.name for path in experiments.glob("*/results.jsonl")}
    assert measured <= set(tables_overview.HEADLINES)
    for name in measured:
        came_out, machine = cells(tables_overview.overview([]), f"[{name}]")[1:3]
        assert came_out != "–" != machine


def test_a_run_cut_short_has_no_headline(folder):
    (folder / "04_decode").mkdir()
    (folder / "04_decode" / "README.md").write_text("# How near?\n")
    write(folder, "04_decode", "decode_step", {"8B B=1 L=1024": {"vattn": 2.0}})
    assert cells(tables_overview.overview([]), "[04_decode]")[1] == "–"


def test_records_that_are_thrown_away_take_their_tables_along(folder):
    write(folder, "08_prefill", "prefill_first", {"8B total=2": {"vattn": 1.0}})
    (folder / "08_prefill" / "run.py").touch()
    readme = folder / "08_prefill" / "README.md"
    empty = "# Why?\n\n<!-- table layout_prefill_first -->\n<!-- end -->\n\nThe end.\n"
    readme.write_text(empty)
    made = tables.render(folder / "08_prefill")
    assert "1.0" in made
    readme.write_text(made)
    (folder / "08_prefill" / "results.jsonl").unlink()
    assert (
        tables.render(folder / "08_prefill")
        == "# Why?\n\n<!-- table layout_prefill_first -->\n<!-- end -->\n\nThe end.\n"
    )
