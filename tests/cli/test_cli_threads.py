"""How the command line's threads wait, which has to be said before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_CHILD = """
import os, sys
import vattn
assert "torch" not in sys.modules, "importing vattn loads torch"
from vattn.cli import main
assert "torch" not in sys.modules, "importing the command line loads torch"
code = main(sys.argv[1:])
print(code, "torch" in sys.modules, *(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")))
"""


def run(*arguments: str, **given: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in _WAITING} | given
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, timeout=120, env=environment
    )
    return child.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (("generate", ""), {}, "2 True PASSIVE None"),  # an empty prompt: it gets as far as to load torch
        (("generate", ""), {"OMP_WAIT_POLICY": "ACTIVE"}, "2 True ACTIVE None"),
        (("generate", ""), {"GOMP_SPINCOUNT": "1000"}, "2 True None 1000"),
        (("generate", ""), {"KMP_BLOCKTIME": "200"}, "2 True None None"),
        (("--version",), {}, "0 False None None"),
        (("bench", "nonsense"), {}, "2 True None None"),  # experiments are measured as they are by themselves
    ],
)
def test_threads_sleep_while_they_wait(arguments: tuple[str, ...], given: dict[str, str], expected: str) -> None:
    assert run(*arguments, **given) == expected


def test_the_package_shows_what_it_loads_later() -> None:
    text = """
import sys, vattn
assert {"KVCache", "KVLayout", "LayerGroup"} <= set(dir(vattn))
from vattn import *
from vattn import KVCache as named
print(KVCache is named is vattn.KVCache, hasattr(vattn, "Nonsense"))
"""
    child = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert (child.stdout, child.stderr) == ("True False\n", "")
