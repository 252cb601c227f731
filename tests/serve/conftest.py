"""A tiny model behind a server; one of the tests' modules shares it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.llama import save_folder

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("transformers")

from helpers.server import Running, running

from vattn import Engine
from vattn.models import Llama, Tokenizer
from vattn.models import load as load_model


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
