"""A tiny model behind a server; one of the tests' modules shares it."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.llama import save_folder

from vattn import Engine
from vattn.models import Llama, Tokenizer
from vattn.models import load as load_model

MISSING = [name for name in ("fastapi", "openai", "transformers") if importlib.util.find_spec(name) is None]
if not MISSING:
    from helpers.server import Running, running


class _Skipped(pytest.Module):
    """A module in this folder where a package is missing. A skip out of this file would end pytest where the folder is
    named on its command line."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"without {', '.join(MISSING)}: pip install 'vattn[hf,serve,dev]'")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return _Skipped.from_parent(parent, path=module_path) if MISSING else None


def _mapped() -> set[str]:
    return {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:vattn" in line}


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays() -> Iterator[None]:
    """A module's tests share a server, whose cache takes and keeps pages in the middle of any of them."""
    before = _mapped()
    yield
    gc.collect()
    assert not _mapped() - before


@pytest.fixture(autouse=True)
def _no_leaks() -> None:
    """In place of the look after each test."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for more tokens than anyone waits for."""
    return save_folder(tmp_path_factory.mktemp("endless"), max_position_embeddings=100_000)


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[Llama, Tokenizer]:
    return load_model(folder)


@pytest.fixture(scope="module")
def server(loaded: tuple[Llama, Tokenizer]) -> Iterator[Running]:
    model, tokenizer = loaded
    with running(lambda: Engine(model, max_batch=16, memory_limit=256 << 20, max_waiting=64), tokenizer) as found:
        yield found
