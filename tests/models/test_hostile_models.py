"""Broken and hostile model folders: each is loaded, or refused in one line, soon."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.llama import hf_llama, hf_model_of, save_folder

from vattn.arguments import escaped
from vattn.errors import ConfigError
from vattn.models import load
from vattn.models.config import LlamaConfig
from vattn.models.loader import find, load_model, load_tokenizer

pytest.importorskip("transformers")

DEEP: Any = {}
for _ in range(50):
    DEEP = {"a": [DEEP]}
WRONG: list[Any] = [
    None, "abc", "", -1, 0, 0.5, 1e300, 10**5, 10**9, 10**30, [], [1], {}, True, False, float("nan"), float("inf"), DEEP
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(action: Callable[[], Any]) -> str | None:
    """The line with which ``action`` refuses, None where it does not; nothing else may be raised, nor take long."""
    start = time.process_time()
    message = None
    try:
        action()
    except ConfigError as error:
        message = str(error)
        assert len(message) < 2000
        assert "\x1b" not in message
    took_s = time.process_time() - start
    assert took_s < 1, f"{took_s:.1f} s of CPU time: {message}"
    return message


# Values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_single_change_of_a_config(tmp_path: Path, model_type: str) -> None:
    """Each key with each wrong value, and each key gone. Keys that change no shape here are added to those saved."""
    hf_model_of(model_type).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    keys = {*config, "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window", "layer_types", "is_causal"}
    keys |= {"max_window_layers", "partial_rotary_factor", "per_layer_config", "original_max_position_embeddings"}
    changes = [{**config, key: wrong} for key in sorted(keys) for wrong in WRONG]
    changes += [{k: v for k, v in config.items() if k != key} for key in config]
    scalings = [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    ]
    for rope in scalings:
        changes += [{**config, "rope_parameters": {**rope, key: wrong}} for key in rope for wrong in WRONG]
    outcomes = []
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps(change))
        outcomes.append(refusal(lambda: load_model(find(tmp_path))))
    assert 200 < sum(outcome is not None for outcome in outcomes) < len(changes) - 100


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_every_single_change_of_a_tokenizer(folder: Path, name: str) -> None:
    """A folder whose tokenizer loads encodes and decodes, or says in a line why not."""
    whole = json.loads((folder / name).read_text())
    if name == "tokenizer_config.json":
        whole.setdefault("chat_template", (folder / "chat_template.jinja").read_text())
        (folder / "chat_template.jinja").unlink(missing_ok=True)

    def use() -> None:
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer.stop_tokens, frozenset)
        if tokenizer.has_chat_template:
            tokenizer.encode_chat([{"role": "user", "content": "the fox"}])

    values = WRONG if name != "tokenizer.json" else [*WRONG[:3], 10**30, [], {}, DEEP]
    for key in {*whole, "eos_token_id", "auto_map", "tokenizer_class"}:
        for wrong in values:
            (folder / name).write_text(json.dumps({**whole, key: wrong}))
            refusal(use)
    for wrong in ("-1", '"abc"', "0.5", "true", "[1, -1]", str(10**30), '{"a": 1}'):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        (folder / name).write_text(json.dumps(whole)) if name != "generation_config.json" else None
        assert "eos_token_id" in str(refusal(lambda: load_tokenizer(folder)))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"a"', "[" * 100_000, '{"a":' * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "\xff\xfe", "null"],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_that_is_none(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="latin-1")
    assert refusal(lambda: load(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": False}, "is_causal must be true"),
        ({"is_causal": None}, "is_causal must be true"),
        ({"per_layer_config": {"0": {"sliding_window": 4}}}, "layers that differ"),
        ({"is_encoder_decoder": True}, "an encoder"),
        ({"compression_config": {"bits": 4}}, "quantised weights"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling and a rope_parameters that differ"),
        ({"rope_scaling": "abc"}, "rope_scaling must be an object or null, got 'abc'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be an integer from 1"),
        ({"head_dim": 0}, "head_dim must be an integer from 1"),
        ({"num_hidden_layers": 10**4}, "holds tensors of 3 layers, its config names 10000"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers must be an integer from 1"),
        ({"head_dim": 10**9}, "head_dim must be an integer from 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"model_type": "phi3"}, "VirtualCache"),
        ({"model_type": "llama\x1b]0;owned\x07\u202e"}, r"'llama\\x1b\]0;owned\\x07\\u202e'"),
    ],
)
def test_what_is_said(folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        load_model(find(folder))


def test_windows_that_a_config_names_but_turns_off() -> None:
    """transformers refuses them too: such a layer finds no window."""
    config = {"model_type": "qwen2", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 4}
    kinds = ["full_attention", "sliding_attention"]
    assert LlamaConfig.from_hf({**config, "use_sliding_window": True, "layer_types": kinds}).windows == (None, 4)
    with pytest.raises(ConfigError, match="use_sliding_window is false"):
        LlamaConfig.from_hf({**config, "layer_types": kinds})


def test_the_original_context_beside_the_scaling(tmp_path: Path) -> None:
    """transformers lets the key of the config win over that of the rotary parameters."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    hf_model = hf_llama(
        rope_parameters={**rope, "original_max_position_embeddings": 64}, original_max_position_embeddings=32
    )
    config = LlamaConfig.from_hf(json.loads(hf_model.config.to_json_string(use_diff=False)))
    assert config.rope_divisors is not None
    ours = 1 / (config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim))
    torch.testing.assert_close(ours / torch.tensor(config.rope_divisors), hf_model.model.rotary_emb.inv_freq)


# Files -------------------------------------------------------------------------------------------------------------


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], str | None]) -> None:
    """Replace a safetensors file's header by what ``change`` returns, or did to it."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    text = change(header) or json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + size :])


def _set(header: dict[str, Any], **fields: Any) -> None:
    header["model.norm.weight"].update(fields)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: _set(header, data_offsets=[0, 10**12]),
        lambda header: _set(header, data_offsets=[-8, 0]),
        lambda header: _set(header, data_offsets=[192, 0]),
        lambda header: _set(header, shape=[10**9, 10**9, 10**9]),
        lambda header: _set(header, shape=[49]),
        lambda header: _set(header, dtype="F99"),
        lambda header: "{",
        lambda header: "[" * 100_000,
        lambda header: (
            json.dumps(header)[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}"
        ),
        lambda header: json.dumps({f"\x1b]0;owned\x07\u202e{name}": value for name, value in header.items()}),
    ],
)
def test_safetensors_headers(folder: Path, change: Callable[[dict[str, Any]], str | None]) -> None:
    rewrite_header(folder / "model.safetensors", change)
    message = refusal(lambda: load_model(find(folder)))
    assert message is None or message.isprintable()


def test_names_cannot_reach_the_terminal(folder: Path) -> None:
    rewrite_header(
        folder / "model.safetensors",
        lambda header: json.dumps(
            {f"{name}\x1b[2J\x9b\u202e\U000e0041\n" if "norm" in name else name: v for name, v in header.items()}
        ),
    )
    message = refusal(lambda: load_model(find(folder)))
    assert message is not None
    assert message.isprintable()
    assert r"norm.weight\x1b[2J\x9b\u202e\U000e0041\n" in message
    assert escaped("naïve → 日本") == "naïve → 日本"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated_safetensors(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    assert "cannot read" in str(refusal(lambda: load_model(find(folder))))


def test_integers_are_no_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: expected floats, got torch\.int8"):
        load_model(find(folder))


def sharded(tmp_path: Path, names: dict[str, str] | None = None) -> tuple[Path, list[Path]]:
    hf_llama().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model", sorted((tmp_path / "model").glob("*.safetensors"))


def rename_shard(folder: Path, old: str, new: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{old}"', json.dumps(new)))


@pytest.mark.parametrize("how", ["absolute", "parent", "link", "absent", "nul"])
def test_an_index_names_files_of_its_folder(tmp_path: Path, how: str) -> None:
    folder, shards = sharded(tmp_path)
    outside = tmp_path / "outside.safetensors"
    shutil.move(shards[1], outside)
    if how == "link":
        shards[1].symlink_to(outside)
    names = {
        "absolute": str(outside),
        "parent": "../outside.safetensors",
        "absent": "gone\x1b[2J.safetensors",
        "nul": "a\0b",
    }
    rename_shard(folder, shards[1].name, names.get(how, shards[1].name))
    message = str(refusal(lambda: load_model(find(folder))))
    assert ("are missing" if how == "absent" else "outside the folder") in message


def test_a_folder_of_the_cache_of_hugging_face(tmp_path: Path) -> None:
    """Its files are links to ``blobs``."""
    folder, shards = sharded(tmp_path)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert len(shards) > 2
    assert load_model(find(snapshot)).config.num_layers == 3


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder, shards = sharded(tmp_path)
    shutil.copy(shards[1], folder / "again.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["another"] = "again.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="is in several files"):
        load_model(find(folder))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ""}}])
def test_an_index_that_is_none(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map" in str(refusal(lambda: load_model(find(folder))))


def test_pipes_are_no_files(folder: Path) -> None:
    """Opening one would wait for ever."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert refusal(lambda: load(folder))
