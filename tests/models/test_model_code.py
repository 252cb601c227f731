"""Nothing of a model's folder is run as a program, whatever it holds and whoever says yes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.llama import hf_llama, save_folder

from vattn.errors import ConfigError
from vattn.models import load

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model")


class _Mark:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("known", [True, False], ids=["known model", "unknown tokenizer"])
def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path, known: bool) -> None:
    """Python files that ``auto_map`` names, jinja2 beside the model, pickles: also when stdin says yes."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\n"
    for name in ("evil.py", "jinja2.py", "sitecustomize.py", "modeling_llama.py"):
        (folder / name).write_text(code + "class Tokenizer: pass\nclass Config: pass\nclass Model: pass\n")
    for name in ("pytorch_model.bin", "model.pt", "tokenizer.pkl", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(_Mark(mark)))
    for name, maps in (
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
    ):
        fields = json.loads((folder / name).read_text())
        if not known:
            fields |= {"tokenizer_class": "EvilTokenizer"} if "tokenizer" in name else {}
        (folder / name).write_text(json.dumps({**fields, "auto_map": maps}))
    (folder / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch "
        + str(mark)
        + "') }}"
    )
    command = [
        "generate",
        "the fox",
        "--model",
        ".",
        "--max-new-tokens",
        "1",
        "--device",
        "cpu",
        "--memory-limit",
        "64MiB",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "vattn", *command, "--memory-limit", "64MiB"],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # else Python itself takes modules from the current folder
    )
    assert not mark.exists()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert ("chat template cannot be used" if known else "Python code that comes with the model") in done.stderr
    assert "y/N" not in done.stdout + done.stderr


def test_only_pickles(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_llama().config.to_dict(), default=str))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Mark(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"holds no weights: expected \*\.safetensors"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
