"""``sanitize.py`` by itself: what it runs where, and what it says of it. The rest takes a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sanitize
import torch


def test_every_test_is_in_one_chunk_of_its_module():
    tests = [f"tests/{module}.py::test[{k}]" for module in ("test_ops", "test_fuzz", "test_hf_gpu") for k in range(61)]
    chunks = sanitize.chunks_of(tests)
    assert sorted(test for chunk in chunks for test in chunk.tests) == sorted(tests)
    assert [chunk.module for chunk in chunks[:16]] == ["test_hf_gpu"] * 16  # the long ones begin first
    assert len({chunk.log for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        assert {sanitize.module_of(test) for test in chunk.tests} == {chunk.module}
        assert len(chunk.tests) <= sanitize.CHUNKS.get(chunk.module, sanitize.USUAL_CHUNK)


@pytest.mark.parametrize(("leaves", "outcome"), [("pass", 0), ("assert 0", 1), ("import time; time.sleep(60)", None)])
def test_a_chunk_and_what_became_of_it(leaves, outcome, tmp_path, monkeypatch):
    """In a process of its own, with pytest alone in the tool's place."""
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {leaves}\n")
    monkeypatch.setattr(sanitize, "LOGS", tmp_path)
    chunk = sanitize.Chunk(0, [f"{tmp_path}/test_it.py::test_it"])
    assert chunk.summary() == "no summary"
    command = (sys.executable, "-m", "pytest", "-q", "-c", "/dev/null")
    chunk.run(command, "", seconds=4 if outcome is None else 120)
    assert chunk.outcome == outcome
    assert chunk.summary().startswith({0: "1 passed", 1: "1 failed", None: "no summary"}[outcome])


def test_a_chunk_of_which_no_test_is_to_run(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("import pytest\n\n\n@pytest.mark.skip\ndef test_it():\n    pass\n")
    monkeypatch.setattr(sanitize, "LOGS", tmp_path)
    chunk = sanitize.Chunk(0, [f"{tmp_path}/test_it.py::test_it"])
    chunk.run((sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-k", "other"), "", seconds=120)
    assert chunk.outcome == sanitize.NO_TESTS


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_says_what_it_needs():
    done = subprocess.run([sys.executable, Path(sanitize.__file__)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stderr
