"""``vattn tune`` as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.llama import save_folder

from vattn.cli.main import main
from vattn.models import LlamaConfig
from vattn.models.fused_llama import products
from vattn.tuning.choices import Choice, choices_for
from vattn.tuning.table import TuningTable, table_paths

pytest.importorskip("transformers")
COMMAND = [sys.executable, "-m", "vattn"]
ON_CPU = ["--device", "cpu", "--memory-limit", "256MiB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


def vattn(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120)


def generate_json(capfd: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, Any]:
    assert main(["generate", "--device", "cpu", *map(str, args), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_tune_without_a_gpu_and_wrong_arguments(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["tune", str(folder / "nowhere")], "config.json"),
        (["tune", str(folder), "--batches", "1,x"], "--batches"),
        (["tune", str(folder), "--contexts", "0"], "--contexts"),
        (["tune"], "FOLDER"),
    ]
    if not torch.cuda.is_available():
        cases.append((["tune", str(folder)], "needs an NVIDIA GPU"))
    for arguments, message in cases:
        assert main(arguments) == 2
        output = capfd.readouterr()
        assert message in output.err
        assert output.err.count("\n") == 1
        assert output.out == ""


@pytest.mark.gpu
def test_tune(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    steps, module = {"kind": "decode step", "batch": 1}, {"kind": "module", "batch": 1}
    choices = choices_for(torch.device("cuda"))
    for key in (steps, module):
        choices.keep(key, Choice.of({"eager": 1.0}))
    assert main(["tune", str(folder), "--batches", "1,3", "--contexts", "200"]) == 0
    assert [key for key, _ in choices.read()[0]] == [module], "steps of the kernels of before are measured again"
    (path,) = {*(tmp_path / "vattn" / "tuned").glob("*.json")} - {choices.path}
    table = TuningTable.read(path)
    output = capfd.readouterr().out
    assert str(path) in output
    steps = re.findall(r"step, batch (\d), context 200: +([\d.]+) us before the choice, ([\d.]+) us", output)
    assert [int(batch) for batch, _, _ in steps] == [1, 3]
    assert "runners_up" not in path.read_text()
    config = json.loads((folder / "config.json").read_text())
    for outputs, inputs, kind in products(LlamaConfig.from_hf(config)):
        found = [
            r for r in table.linear if (r["outputs"], r["inputs"], r["swiglu"]) == (outputs, inputs, kind == "swiglu")
        ]
        assert {record["tokens"] for record in found} == {1, 3}
        assert all(0 < record["us"] <= record["cublas_us"] for record in found)
    ours = [record for record in table.attention if record["context"] == 200]
    assert {record["batch"] for record in ours} == {1, 3}
    assert all(record["backend"] in record["us"] for record in ours)
    _, shipped = table_paths(table.gpu)
    if shipped.exists():  # of some GPUs only
        before = TuningTable.read(shipped)
        assert len(before.linear) > 20
        assert all(record in table.linear for record in before.linear), "shipped measurements were lost"
        assert all(record in table.attention for record in before.attention), "shipped measurements were lost"
