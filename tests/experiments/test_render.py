"""The READMEs of experiments are made of records: tables, figures in sentences, the overview, plots; and what differs
from its records is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import render
import table

EXPERIMENTS = table.FOLDER


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    return tmp_path


def write(folder, experiment, metric, cases, name="results.jsonl"):
    (folder / experiment).mkdir(exist_ok=True)
    with (folder / experiment / name).open("a") as file:
        for case, values in cases.items():
            for system, value in values.items():
                place = {"case": case, "system": system, "metric": metric, "unit": "ms", "value": value}
                file.write(
                    json.dumps({**place, "p20": value, "p80": value, "gpu": "none", "date": "2026-01-02"}) + "\n"
                )


def test_a_figure_in_a_sentence(folder):
    write(folder, "04_decode", "step", {"8B B=1": {"vattn": 2.0, "limit": 1.0}, "8B B=2": {"vattn": 4.0, "limit": 3.0}})
    write(folder, "04_decode", "step", {"8B B=2": {"vattn": 5.0}}, "again.jsonl")
    readme = folder / "README.md"
    readme.write_text(
        "It takes <!-- fig 04 step:B=1 vattn .2f -->9.99<!-- end --> ms\n"
        "(<!-- fig 04 step limit/vattn .0% --><!-- end -->), in two runs\n"
        "<!-- fig 04+ step:B=2 vattn .1f --><!-- end -->, and <!-- fig 05 step vattn .1f -->7<!-- end -->."
    )
    text = render.render(readme)
    assert "-->2.00<!-- end --> ms\n(<!-- fig 04 step limit/vattn .0% -->50% to 75%<!-- end -->)" in text
    assert "-->4.0 to 5.0<!-- end -->, and <!-- fig 05 step vattn .1f -->–<!-- end -->." in text


def test_a_table_nobody_makes_is_an_error(folder):
    write(folder, "04_decode", "step", {"8B B=1": {"vattn": 2.0}})
    readme = folder / "04_decode" / "README.md"
    readme.write_text("# What?\n\n<!-- table nonsense -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="nonsense"):
        render.render(readme)


def overview_of(name):
    """The cells of an experiment's line, but for the first."""
    made = render.report(EXPERIMENTS).overview([])
    (line,) = (line for line in made.splitlines() if line.startswith(f"| [{name}]"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_overview_has_a_readmes_question_and_answer(folder):
    (folder / "10_layouts").mkdir()
    readme = folder / "10_layouts" / "README.md"
    readme.write_text(
        "# What?\n\n**Answer.** From <!-- fig 10 step vattn .1f -->2.0<!-- end -->\nms on.\n\nMore.\n\nAnd more.\n"
    )
    assert overview_of("10_layouts") == ["What?", "From 2.0 ms on.", "–", "–"]
    (folder / "10_layouts" / "run.py").touch()
    assert overview_of("10_layouts")[1] == "not measured yet"
    write(folder, "10_layouts", "step", {"8B": {"vattn": 2.0}})
    assert overview_of("10_layouts") == ["What?", "From 2.0 ms on.", "CPU only", "1, 2026-01-02"]


def test_every_experiment_has_an_answer():
    for path in EXPERIMENTS.glob("*/README.md"):
        assert "–" not in overview_of(path.parent.name)[1]


def test_records_that_are_thrown_away_take_their_tables_along(folder):
    write(folder, "08_prefill", "prefill_first", {"8B total=2": {"vattn": 1.0}})
    (folder / "08_prefill" / "run.py").touch()
    readme = folder / "08_prefill" / "README.md"
    empty = "# Why?\n\n<!-- table pivot case vattn -->\n<!-- end -->\n\nThe end.\n"
    readme.write_text(empty)
    made = render.render(readme)
    assert "| 8B total=2 | 1.000 |" in made
    readme.write_text(made)
    (folder / "08_prefill" / "results.jsonl").unlink()
    assert render.render(readme) == empty


def test_the_results_have_at_most_eight_rows_and_what_is_lost_most():
    lines = render.report(EXPERIMENTS).results([]).splitlines()[2:]
    assert len(lines) <= 8
    assert not any("–" in line for line in lines)
    steps = table.by_case(table.records_of("04_decode"), "decode_step")
    for line, case in zip(lines, ("8B B=1", "1B B=1"), strict=False):
        assert f"| {steps[f'{case} L=1024']['vattn']:.2f} ms (" in line
    steps = table.by_case(table.records_of("13_serving"), "engine_step")
    for system, found in (("vattn", "| {} ms ("), ("vllm", "| vLLM {} |")):
        assert found.format(", ".join(f"{steps[f'8B B={b} L=1024'][system]:.2f}" for b in (1, 8, 64))) in lines[2]
    ratios = {}
    for name, metric in (("10_layouts", "decode_step"), ("11_prefill", "prefill")):
        for case, each in table.by_case(table.records_of(name), metric).items():
            ratios[case] = min(value for system, value in each.items() if system.startswith("paged-")) / each["vattn"]
    assert "total=8192" in min(ratios, key=ratios.__getitem__)
    assert "8,192 tokens, the worst of four lengths" in lines[-1]


@pytest.fixture
def copy(tmp_path):
    """A copy of one experiment with a plot, and of what renders it."""
    (tmp_path / "experiments").mkdir()
    for path in EXPERIMENTS.glob("*.py"):
        shutil.copy(path, tmp_path / "experiments")
    shutil.copytree(EXPERIMENTS / "05_capacity", tmp_path / "experiments" / "05_capacity")
    return tmp_path / "experiments"


def run(copy, *options):
    command = [sys.executable, copy / "render.py", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("of", "old", "new"),
    [
        ("README.md", "| 240 |", "| 241 |"),  # in a table
        ("README.md", "-->0.985 to 1.000<!--", "-->0.995 to 1.000<!--"),  # in a sentence
        ("README.md", "over_paged-16 vattn .3f", "over_paged-17 vattn .3f"),  # a figure of no record
        ("capacity.svg", "#0072b2", "#0072b3"),
        ("results.jsonl", '"value": 240.0, ', '"value": 239.0, '),
    ],
)
def test_what_differs_from_its_records_is_found(copy, of, old, new):
    path = copy / "05_capacity" / of
    if of.endswith("svg"):
        pytest.importorskip("matplotlib")
        path.unlink()  # the repository's may be another version's
        run(copy)
    assert run(copy, "--check").returncode == 0
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    check = run(copy, "--check")
    assert check.returncode == 1
    assert "05_capacity" in check.stdout
    assert path.read_text() == text.replace(old, new)  # nothing is written
    if new not in text and "17" not in new and of != "results.jsonl":
        assert run(copy).returncode == 0
        assert path.read_text() == text


def test_pages_of_docs_are_rendered_and_checked(copy):
    page = copy.parent / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("Of <!-- fig 05 over_paged-16 vattn .3f -->1.000<!-- end -->.\n")
    assert run(copy, "--check").returncode == 1
    assert "page.md" in run(copy).stdout
    assert page.read_text() == "Of <!-- fig 05 over_paged-16 vattn .3f -->0.985 to 1.000<!-- end -->.\n"
    assert run(copy, "--check").returncode == 0


def test_the_same_records_draw_the_same_plots(copy):
    pytest.importorskip("matplotlib")
    path = copy / "05_capacity" / "capacity.svg"
    drawn = []
    for _ in range(2):
        path.unlink()
        assert "capacity.svg" in run(copy).stdout
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]
    assert b'order="token"' in drawn[0].replace(b"&quot;", b'"')
    assert b'order="layer"' in drawn[0].replace(b"&quot;", b'"')


def test_a_run_cut_short_keeps_the_plot_and_the_other_tables(copy):
    pytest.importorskip("matplotlib")
    results, plot = copy / "05_capacity" / "results.jsonl", copy / "05_capacity" / "capacity.svg"
    kept = [line for line in results.read_text().splitlines(keepends=True) if json.loads(line)["system"] == "vattn"]
    results.write_text("".join(kept))
    before = plot.read_bytes()
    done = run(copy)
    assert done.returncode == 0, done.stderr
    assert "capacity.svg is as it was" in done.stdout
    assert plot.read_bytes() == before
    assert "| 60GiB | ledger | 8B | 2,048 | – | – | – | 240 |" in (copy / "05_capacity" / "README.md").read_text()


def test_the_picture_of_how_it_works_maps_pages_to_themselves():
    tag = "{http://www.w3.org/2000/svg}"
    root = ET.parse(EXPERIMENTS.parent / "docs" / "how_it_works.svg").getroot()
    boxes = [
        (float(rect.get("x")), float(rect.get("y")), float(rect.get("width")), float(rect.get("height")), text.text)
        for rect, text in zip(list(root)[:-1], list(root)[1:], strict=True)
        if rect.tag == f"{tag}rect" and text.get("class") in ("n", "f")
    ]
    lines = root.findall(f"{tag}line")

    def page_at(x, y):
        (found,) = (
            n for left, top, width, height, n in boxes if left <= x <= left + width and top <= y <= top + height
        )
        return found

    assert len(lines) == 5
    for line in lines:
        x1, y1, x2, y2 = (float(line.get(name)) for name in ("x1", "y1", "x2", "y2"))
        assert page_at(x1, y1) == page_at(x2, y2)
