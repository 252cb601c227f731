"""Every Python block of the docs runs, in order and in one namespace a page."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
WORDS_ONLY = {"how-it-works", "reproducing"}
LINKING = [*PAGES, *ROOT.glob("*.md"), *sorted((ROOT / "experiments").glob("*/README.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in WORDS_ONLY], ids=lambda page: page.stem)
def test_the_page_runs_as_it_stands(page, capsys):
    pytest.importorskip("transformers")
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    namespace.clear()
    gc.collect()


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
