"""The direction of imports: a room knows only the rooms before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a KVCache is made of, lowest first; each file is a room of its own.
MEMORY = [
    "undo",
    "lock",
    "tensors",
    "page_sizes",
    "pages",
    "guard",
    "reservation",
    "work",
    "parking",
    "plans",
    "planner",
    "page_table",
]
MEMORY += ["backing", "slot_states", "stored", "slots", "opened", "steps", "integrity"]
# Lowest first. "" is the package itself, vattn/__init__.py: it shows what is public, and only the command line uses it.
ROOMS = [
    *("errors", "arguments", "stats", "interrupts", "machine", "driver", "layout"),
    *("memory", *(f"memory.{name}" for name in MEMORY), "stored", "kv_cache"),
    *("ops", "attention", "tuning", "models", "requests", "graphs", "decode", "engine", "hf"),
    *("serve", "", "cli", "__main__"),
]
# A model takes a cache and an attention; how pages come and go is none of its business.
CLOSED_TO_MODELS = {"driver", "memory", "kv_cache"}


@dataclass(frozen=True)
class Import:
    module: str  # as "vattn.driver.base"
    line: int
    type_checking: bool


def room_of(module: str) -> str:
    """The room of ``vattn.driver.base`` is ``driver``; of ``vattn.memory.pages``, ``memory.pages``."""
    room, *inside = module.removeprefix("vattn").removeprefix(".").split(".")
    return ".".join([room, *inside[:1]]) if room == "memory" else room


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, module: str, is_package: bool, modules: set[str], guarded: bool = False) -> Iterator[Import]:
    """Every import of a part of vattn in the tree, those inside functions too."""
    if is_type_checking(tree):
        for child in tree.body:
            yield from imports(child, module, is_package, modules, True)
        for child in tree.orelse:
            yield from imports(child, module, is_package, modules, guarded)
        return
    if isinstance(tree, ast.Import):
        for alias in tree.names:
            if alias.name.split(".")[0] == "vattn":
                yield Import(alias.name, tree.lineno, guarded)
    elif isinstance(tree, ast.ImportFrom):
        base = tree.module or ""
        if tree.level:
            parents = module.split(".")
            parents = parents[: len(parents) - tree.level + is_package]
            base = ".".join([*parents, *filter(None, [tree.module])])
        if base.split(".")[0] == "vattn":
            for alias in tree.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in modules else base, tree.lineno, guarded)
    for child in ast.iter_child_nodes(tree):
        yield from imports(child, module, is_package, modules, guarded)


def violations(files: dict[str, str]) -> list[str]:
    """What is wrong in a tree of ``{path: source}``, with paths as in the repository."""
    sources = {}
    for path, text in files.items():
        parts = list(Path(path).with_suffix("").parts)
        parts = ["vattn", *parts] if parts[0] == "models" else parts
        is_package = parts[-1] == "__init__"
        sources[".".join(parts[:-1] if is_package else parts)] = (path, text, is_package)
    found = []
    for module, (path, text, is_package) in sources.items():
        room = room_of(module)
        if room not in ROOMS:
            found.append(f"{path}: room {room!r} is not in the list of rooms")
            continue
        for used in imports(ast.parse(text), module, is_package, set(sources)):
            where, other = f"{path}:{used.line}", room_of(used.module)
            if other not in ROOMS:
                found.append(f"{where}: room {other!r} is not in the list of rooms")
            elif other != room and ROOMS.index(other) > ROOMS.index(room):
                found.append(
                    f"{where}: {room or 'vattn'} must not import {other or 'vattn itself'}, which comes after it"
                )
            elif (
                room == "models"
                and other.split(".")[0] in CLOSED_TO_MODELS
                and not (used.type_checking and other == "kv_cache")
            ):
                found.append(f"{where}: models must not import {other}")
    return found


def test_every_import_points_up():
    paths = [path for folder in ("vattn", "models") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 20
    assert violations({str(path.relative_to(ROOT)): path.read_text() for path in paths}) == []


# -- the checker itself ----------------------------------------------------------------------------------------------
TREE = {
    "vattn/__init__.py": "",
    "vattn/errors.py": "",
    "vattn/memory/pages.py": "",
    "vattn/memory/slots.py": "",
    "vattn/kv_cache.py": "",
    "vattn/driver/__init__.py": "",
    "vattn/driver/base.py": "",
    "models/__init__.py": "",
    "models/llama.py": "",
}
BAD = {
    "vattn/memory/pages.py": [
        "from ..kv_cache import KVCache",
        "from .. import kv_cache",
        "import vattn.kv_cache",
        "from vattn.kv_cache import KVCache as Cache",
        "from vattn import kv_cache",
        "from vattn import KVCache",
        "def late():\n    from ..kv_cache import KVCache",
        "try:\n    import vattn.models.llama\nexcept ImportError:\n    pass",
        "from ..nowhere import thing",
        "from .slots import Slots",
    ],
    "vattn/driver/base.py": [
        "from ..memory.pages import Page",
        "from ..memory import pages",
        "from vattn.memory.pages import Page",
    ],
    "vattn/driver/__init__.py": ["from ..memory.pages import Page"],
    "models/llama.py": [
        "from ..memory.pages import Page",
        "from ..driver.base import Driver",
        "from vattn.kv_cache import KVCache",
        "from ..kv_cache import KVCache",
        "if TYPE_CHECKING:\n    from ..memory.pages import Page",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from ..kv_cache import KVCache",
        "import vattn",
    ],
    "vattn/__init__.py": ["from .cli import main"],
    "vattn/surprise.py": [""],
}
GOOD = {
    "vattn/__init__.py": ["from .kv_cache import KVCache", "from .models.llama import Llama"],
    "vattn/kv_cache.py": ["from .driver.base import Driver", "import torch, numpy.linalg", "from vattn import errors"],
    "vattn/driver/base.py": ["from ..errors import DriverError", "from . import base", "from vattn.driver import base"],
    "models/llama.py": ["if TYPE_CHECKING:\n    from ..kv_cache import KVCache", "from ..errors import ConfigError"],
    "vattn/memory/slots.py": ["from .pages import Page"],
    "vattn/cli/generate.py": ["from .. import __version__", "from ..models import llama", "from .main import main"],
}


def pairs(table):
    return [(path, text) for path, texts in table.items() for text in texts]


@pytest.mark.parametrize(("path", "text"), pairs(BAD))
def test_the_checker_catches(path, text):
    assert [found.split(":")[0] for found in violations({**TREE, path: text})] == [path]


@pytest.mark.parametrize(("path", "text"), pairs(GOOD))
def test_the_checker_allows(path, text):
    assert violations({**TREE, "vattn/cli/main.py": "", path: text}) == []


# -- what an import costs --------------------------------------------------------------------------------------------
_IMPORT = """
import sys, torch
before = set(sys.modules)
import vattn
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"transformers", "gguf", "safetensors", "triton", "flash_attn", "rich"}
print(sorted(new & heavy), torch.cuda.is_initialized())
"""


def test_importing_vattn_is_light():
    child = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=120)
    assert (child.stdout, child.stderr) == ("[] False\n", "")
