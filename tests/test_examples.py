"""The examples run, as a user would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str) -> str:
    child = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300)
    assert (child.returncode, child.stderr) == (0, "")
    return child.stdout


def test_bring_your_own_attention() -> None:
    assert "the same as with the built-in attention" in run_example("bring_your_own_attention.py")
