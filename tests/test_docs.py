"""Every Python block of the docs runs, in order and in one namespace a page; every measured figure has a source."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS_ONLY = {"choosing", "how-it-works", "installing", "reproducing", "serving"}
LINKING = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *sorted((ROOT / "experiments").glob("*/README.md"))]
RENDERED = re.compile(r"<!-- (?:fig|table) .*?<!-- end -->|^```.*?^```", re.DOTALL | re.MULTILINE)
MEASURED = re.compile(r"\d[\d,.]*(?: (?:to|and|or) \d[\d,.]*)? ?(?:%|(?:ms|µs|us|[GT]B/s|TFLOP/s|tokens/s|times)\b)")
SETTINGS = ("90 % of", "5 ms by default")
PROBE = re.compile(r"\(probe, [^)]*\d{4}-\d\d-\d\d[^)]*\)")


def without_a_source(text):
    """Times, rates and shares that neither ``experiments/render.py`` writes nor a probe beside them dates."""
    text = RENDERED.sub("", text)
    for setting in SETTINGS:
        text = text.replace(setting, "")
    blocks = re.split(r"\n(?=\n|\* |\|)", text)
    return [figure for block in blocks if not PROBE.search(block) for figure in MEASURED.findall(block)]


def a_users_model():
    """What the README takes for granted: a model of transformers, and its inputs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**small, num_key_value_heads=2, vocab_size=256)
    return {"model": LlamaForCausalLM(config).eval(), "inputs": {"input_ids": torch.randint(3, 256, (2, 9))}}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in WORDS_ONLY], ids=lambda page: page.stem)
def test_the_page_runs_as_it_stands(page, capsys):
    transformers = pytest.importorskip("transformers")
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    if Version(transformers.__version__) < Version("5.24"):  # where the argument has its older name, as the page says
        blocks = [re.sub(r"\bcache=(past|mine|VirtualCache)\b", r"past_key_values=\1", block) for block in blocks]
    namespace = a_users_model() if page.stem == "README" else {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    namespace.clear()
    gc.collect()


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_families_are_those_that_are_compared():
    """Rows of docs/huggingface.md, against what the tests of ``accelerate`` and of the engine compare."""
    pytest.importorskip("transformers")
    from helpers.hf_families import MORE
    from hf import test_accelerate, test_transformers_model

    def names(cell):
        return [name.split(",")[0].split(" with ")[0] for name in cell.split(", ")]

    page = (ROOT / "docs" / "huggingface.md").read_text()
    table = page.partition("## Which families")[2].partition("The six ways")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    by_state = {(accelerated, engine): names(family) for family, accelerated, engine in rows[2:]}

    def known(models):
        return sorted({model.split(",")[0] for model in models})

    ways = len(test_accelerate.COLUMNS), len(test_accelerate.SOME)
    assert sorted(by_state[f"same, in {ways[0]} ways to generate", "same"]) == known(test_accelerate.FAMILIES)
    assert (f"same, in {ways[1]} ways to generate", "same") in by_state
    assert sorted(set(by_state["not compared", "same"])) == known(MORE)
    assert sorted(by_state["same, by their own forward", "refused"]) == known(test_transformers_model.REFUSED)
    assert {*known(test_transformers_model.REFUSED), "Llama 4"} == set(known(test_accelerate.REFUSED))


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_measured_figure_has_a_source(page):
    assert without_a_source(page.read_text()) == []


def test_a_figure_without_a_source_is_found():
    marked = "* It takes <!-- fig 02 map vattn .0f -->5 to 6<!-- end --> µs\n  and 1.5 times that.\n"
    assert without_a_source(marked + "* 3 to 4 ms (probe, H100, 2026-11-27)\n\n12 % more, 90 % of it.") == [
        "1.5 times",
        "12 %",
    ]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_begins_with_a_figure(page):
    """Markdown takes such a line for HTML and shows its links and emphasis as they are typed."""
    assert not re.search(r"^ *<!-- fig ", page.read_text(), re.MULTILINE)
