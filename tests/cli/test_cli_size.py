"""``vattn info MODEL``: what it says fits does fit, and one more does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.llama import save_folder

import vattn
from vattn.cli.main import main
from vattn.models import load
from vattn.models.loader import find

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


def size(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["info", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_what_fits(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = size(capfd, folder, "--memory-limit", "21MiB")
    (row,) = document["sequences"]
    assert (row["tokens"], document["context_tokens"]) == (512, 512)
    model, _ = load(folder)
    layout = model.kv_layout()
    assert document["bytes_per_token"] == layout.bytes_per_token
    assert document["weight_bytes"] == sum(parameter.nbytes for parameter in model.parameters())
    fit = row["num_sequences"]
    assert fit > 1
    with vattn.KVCache(layout, fit + 1, "cpu", 21 << 20) as cache:
        slots = [cache.acquire() for _ in range(fit + 1)]
        cache.ensure_batch(slots[:fit], [512] * fit)
        assert cache.stats().in_use_bytes == fit * row["bytes"]
        with pytest.raises(vattn.OutOfPages):
            cache.ensure(slots[fit], 512)


def test_the_dtype_and_the_free_memory(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    single, half = (size(capfd, folder, "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    assert single["bytes_per_token"] == 2 * half["bytes_per_token"]
    assert single["weight_bytes"] == 2 * half["weight_bytes"]
    assert single["cache_bytes"] > 0


def test_no_weights_are_needed(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    whole, bare = (size(capfd, path, "--memory-limit", "1GiB") for path in (folder, tmp_path))
    assert {**whole, "model": ""} == {**bare, "model": ""}


def test_a_gguf_file(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        find("smollm2")
    except vattn.ConfigError as error:
        pytest.skip(str(error))
    document = size(capfd, "smollm2", "--memory-limit", "1GiB")
    assert document["bytes_per_token"] == 2 * 30 * 3 * 64 * 4
    assert document["weight_bytes"] == 134_515_008 * 4
    assert [row["tokens"] for row in document["sequences"]] == [1024, 4096, 8192]


def test_as_a_table(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder), "--device", "cpu", "--memory-limit", "1GiB"]) == 0
    text = capfd.readouterr().out
    assert str(folder) in text  # not folded
    for word in ("weights", "K and V of a token", "tokens of context", "sequences that fit", "512"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-limit", "1GiB"], "--memory-limit says where a model is to run"),
        (["--device", "cpu"], "--device says"),
        (["nowhere"], "no model at"),
        (["FOLDER", "--device", "cpu", "--memory-limit", "1MiB"], "at least one page"),
        (["FOLDER", "--device", "tpu"], "tpu"),
        (["OTHER"], "gpt2"),
        (["BROKEN"], "cannot read"),
    ],
)
def test_what_has_no_size(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for name, text in (("OTHER", '{"model_type": "gpt2"}'), ("BROKEN", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    places = {"FOLDER": folder, "OTHER": tmp_path / "OTHER", "BROKEN": tmp_path / "BROKEN"}
    capfd.readouterr()
    assert main(["info", *(str(places.get(argument, argument)) for argument in arguments)]) == 2
    captured = capfd.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err
