"""GGUF files: what their metadata means, as llama.cpp takes it, and files that are broken or hostile."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hostile_models import refusal

from vattn.errors import ConfigError
from vattn.models.config import LlamaConfig
from vattn.models.gguf import open_file
from vattn.models.loader import find, load_model, load_tokenizer

gguf = pytest.importorskip("gguf")

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def from_gguf(divisors: tuple[float, ...] | None = None, **changes: Any) -> LlamaConfig:
    changed = {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    return LlamaConfig.from_gguf(
        {**METADATA, **changed}, vocab_size=8, tie_word_embeddings=True, rope_divisors=divisors
    )


@pytest.mark.parametrize(
    ("changes", "divisors"),
    [
        ({}, None),
        ({"rope__scaling__factor": 4.0}, (4.0, 4.0)),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, (4.0, 4.0)),
        ({"rope__scaling__type": "linear"}, None),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scale_linear": 2.0}, (2.0, 2.0)),
        ({"rope__scale_linear": 2.0, "rope__scaling__factor": 4.0}, (4.0, 4.0)),
        ({"rope__scaling__factor": 0.0}, None),
    ],
)
def test_scaling_of_rotary_embeddings(changes: dict[str, Any], divisors: tuple[float, ...] | None) -> None:
    """Linear unless it says otherwise, and on top of ``rope_freqs``."""
    assert from_gguf(**changes).rope_divisors == divisors
    factor = 1.0 if divisors is None else divisors[0]
    assert from_gguf((1.0, 8.0), **changes).rope_divisors == (factor, 8 * factor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope__scaling__type": "yarn"}, "rotary scaling 'yarn'"),
        ({"rope__scaling__type": 3}, "rotary scaling 3"),
        ({"rope__scaling__factor": -1.0}, "rope.scaling.factor must be"),
        ({"rope__scaling__factor": float("nan")}, "rope.scaling.factor must be"),
        ({"rope__scaling__attn_factor": 0.5}, "rope.scaling.attn_factor 0.5"),
        ({"attention__scale": 0.25}, "attention.scale 0.25"),
        ({"attention__causal": False}, "attention.causal False"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"attention__head_count": [4, 2]}, "head_count differs between layers"),
        ({"attention__head_count_kv": []}, "head_count_kv differs between layers"),
        ({"attention__head_count": 0}, "head_count must be an integer from 1"),
        ({"attention__head_count": "4"}, "head_count must be an integer from 1"),
        ({"block_count": 10**5}, "block_count must be an integer from 1 to 16384"),
        ({"attention__key_length": 10**9}, "key_length must be an integer"),
        ({"rope__freq_base": 0.0}, "freq_base must be a finite number above 0"),
        ({"attention__layer_norm_rms_epsilon": None}, "lacks 'llama.attention.layer_norm_rms_epsilon'"),
    ],
)
@pytest.mark.parametrize("divisors", [None, (1.0, 8.0)])
def test_metadata_that_is_refused(changes: dict[str, Any], message: str, divisors: tuple[float, ...] | None) -> None:
    with pytest.raises(ConfigError, match=message):
        from_gguf(divisors, **changes)


def test_arrays_of_equal_layers() -> None:
    config = from_gguf(attention__head_count=[4, 4], attention__head_count_kv=[2, 2], feed_forward_length=[24, 24])
    assert (config.num_heads, config.num_kv_heads, config.intermediate_size) == (4, 2, 24)


@pytest.mark.parametrize("divisors", [(0.0, 1.0), (float("nan"), 1.0), (1.0,), (-1.0, 1.0)])
def test_divisors_that_are_none(divisors: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"rope_freqs must be|rotary divisors"):
        from_gguf(divisors)


def write(path: Path, metadata: dict[str, Any] = METADATA, drop: tuple[str, ...] = ()) -> Path:
    """A whole file of two layers, through gguf's own writer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "<s>"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (8, 16), "output_norm.weight": (16,)}
    parts = {"attn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
    parts |= {"ffn_norm": (16,), "ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}
    shapes |= {f"blk.{layer}.{part}.weight": shape for layer in range(2) for part, shape in parts.items()}
    for name, shape in shapes.items():
        if name not in drop:
            writer.add_tensor(name, torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_same_as_the_reader_of_gguf(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", {**METADATA, "llama.attention.head_count": [4, 4], "llama.x": -0.5})
    reader, ours = gguf.GGUFReader(path), open_file(path)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert list(ours.tensors) == list(theirs)
    for name, tensor in ours.tensors.items():
        assert (tensor.shape, tensor.type) == (tuple(theirs[name].shape.tolist()[::-1]), theirs[name].tensor_type)
        assert (tensor.data.view("float32") == theirs[name].data).all()
    fields = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith(("GGUF.", "tokenizer."))
    }
    assert {key: value for key, value in ours.metadata.items() if not key.startswith("tokenizer.")} == fields
    assert ours.metadata["tokenizer.ggml.tokens"] is None
    assert load_model(path).config.num_heads == 4


def test_every_truncation(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    data = path.read_bytes()
    for size in [*range(0, 2000, 7), *range(2000, len(data) - 32, 997), len(data) - 32]:
        path.write_bytes(data[:size])
        assert "as a GGUF file" in str(refusal(lambda: load_model(path)))


def test_every_eight_bytes_of_the_header_set_to_the_largest(tmp_path: Path) -> None:
    """Counts and lengths of 2^64, types that are none, offsets outside: read right or refused, and soon."""
    path = write(tmp_path / "model.gguf")
    data = path.read_bytes()
    end = data.index(b"blk.1.ffn_down.weight") + 60
    refused = 0
    for fill in (b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 60), struct.pack("<II", 9, 1 << 31)):
        for at in range(0, end, 4):
            path.write_bytes(data[:at] + fill + data[at + 8 :])
            refused += refusal(lambda: load_model(path)) is not None
    assert refused > end // 4 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"), "comes twice"),
        (lambda data: data.replace(b"llama.context_length", b"llama.embedding_leng"), "lacks|must be"),
        (lambda data: data.replace(b"general.architecture", b"llama.context_length"), "comes twice"),
        (
            lambda data: data.replace(b"blk.1.attn_norm", b"blk.1.\x1b[2J_norm"),
            r"unexpected tensors: blk\.1\.\\x1b\[2J_norm",
        ),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "version"),
    ],
)
def test_wrong_names(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = write(tmp_path / "model.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=message) as raised:
        load_model(path)
    assert str(raised.value).isprintable()


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", {**METADATA, "llama.block_count": 9999})
    assert "holds tensors of 2 layers, its config names 9999" in str(refusal(lambda: load_model(path)))
    path = write(tmp_path / "model.gguf", drop=("blk.1.ffn_up.weight",))
    with pytest.raises(ConfigError, match=r"missing tensors: layers\.1\.mlp\.up_proj\.weight"):
        load_model(path)


def test_tokenizers_of_broken_files(tmp_path: Path) -> None:
    """transformers reads them only after a look at the whole header."""
    path = write(tmp_path / "model.gguf")
    refusal(lambda: load_tokenizer(find(path)))  # some versions of transformers make a tokenizer of it
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    path.write_bytes(data[:at] + struct.pack("<Q", 1 << 60) + data[at + 8 :])
    assert "ends too early" in str(refusal(lambda: load_tokenizer(find(path))))


@pytest.mark.parametrize("counts", [(0, 1 << 20), (1 << 20, 0)], ids=["keys", "tensors"])
def test_more_entries_than_any_model_has(tmp_path: Path, counts: tuple[int, int]) -> None:
    """Each of them would take time, however small."""
    path = tmp_path / "many.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(1 << 20))
    with pytest.raises(ConfigError, match="expected at most"):
        open_file(path)


def test_many_arrays_are_not_kept(tmp_path: Path) -> None:
    array = struct.pack("<IIQ", 9, 0, 1 << 14) + bytes(1 << 14)
    keys = b"".join(struct.pack("<Q", 4) + b"k%03d" % i + array for i in range(9))
    path = tmp_path / "arrays.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 9) + keys + bytes(64))
    assert sum(value is not None for value in open_file(path).metadata.values()) == 4
