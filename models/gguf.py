"""GGUF files, the format of llama.cpp: what lies where in one, and its weights, dequantised on the way in.

Every length and offset is checked against the file before anything is read by it. gguf's own reader believes what a
file says, and spends seconds on numpy arrays of every string of a vocabulary; this one steps over them.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vattn.arguments import escaped, is_int
from vattn.errors import ConfigError

from .config import LlamaConfig
from .files import lacks_package
from .llama import Llama
from .weights import Stored, build

__all__ = ["config_of", "load_file", "open_file"]

# GGUF name -> Hugging Face name; the blocks' names are completed with their layer index.
_OUTER = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"

_STRING, _ARRAY = 8, 9
# value type -> its struct code; uint8, int8, uint16, ... as the format numbers them
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_KEPT_ELEMENTS = 1 << 14  # longer arrays are for tokenizers
_MAX_DIMS = 4
_MAX_ENTRIES = 1 << 16  # keys, and tensors: a model of 1,000 layers has some 10,000; more would only take time


class StoredTensor(NamedTuple):
    """A tensor as the file holds it.

    Attributes:
        shape: sizes in elements, slowest first as in PyTorch.
        type: a ``gguf.GGMLQuantizationType``.
        data: uint8 ``[*shape[:-1], bytes of a row]``, a view of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: Any
    data: np.ndarray


class GGUFFile(NamedTuple):
    """Metadata by key, None for the tokenizer's and for long arrays; and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Broken(Exception):
    """Says what is wrong with the file."""


def open_file(path: Path) -> GGUFFile:
    """Read the header of a GGUF file of version 2 or 3.

    Raises:
        ConfigError: not such a file; parts of it that do not lie within it, overlap, or come twice; a model split into
            several files; the package gguf is not installed.
    """
    try:
        import gguf  # noqa: F401 - for its tables of types
    except ImportError as error:
        raise lacks_package("reading GGUF files needs", "gguf") from error
    try:
        file = _read(np.asarray(np.memmap(path, mode="r")))
    except (OSError, ValueError, _Broken) as error:
        raise ConfigError(f"cannot read {path} as a GGUF file: {escaped(str(error))}") from error
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(f"{path}: GGUF files split in several parts are not supported")
    return file


class _Cursor:
    """Reads a file from its start; no read passes its end."""

    def __init__(self, data: np.ndarray) -> None:
        self.view, self.at = memoryview(data.data), 0
        self.kept = 0  # elements of arrays

    def skip(self, size: int) -> int:
        """Step over ``size`` bytes; returns where they start."""
        if size > (left := len(self.view) - self.at):
            raise _Broken(f"it ends too early: {size} bytes wanted at {self.at}, {left} left")
        self.at += size
        return self.at - size

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack_from(layout, self.view, self.skip(struct.calcsize(layout)))

    def string(self) -> str:
        start = self.skip(self.scalars("Q")[0])
        try:
            return bytes(self.view[start : self.at]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Broken(f"a name or text at {start} is no UTF-8") from error

    def value(self, kind: int, keep: bool) -> Any:
        """The value that follows, None for one that is stepped over."""
        if kind != _ARRAY:
            return self._elements(kind, 1, keep, f"unknown value type {kind} at {self.at}")[0]
        (element,), (count,) = self.scalars("I"), self.scalars("Q")
        if keep := keep and count <= _KEPT_ELEMENTS:
            self.kept += count
            keep = self.kept <= _MAX_ENTRIES  # a sum that a model's sizes never reach
        found = self._elements(element, count, keep, f"an array of unknown value type {element} at {self.at}")
        return list(found) if keep else None

    def _elements(self, kind: int, count: int, keep: bool, unknown: str) -> Any:
        if kind in _SCALARS and (keep or count == 1):
            return self.scalars(_SCALARS[kind], count)
        if kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind != _STRING:
            raise _Broken(unknown)
        elif keep:
            return [self.string() for _ in range(count)]
        else:
            self._skip_strings(count)
        return (None,)

    def _skip_strings(self, count: int) -> None:
        unpack, view, at = struct.Struct("<Q").unpack_from, self.view, self.at
        try:
            for _ in range(count):
                at += 8 + unpack(view, at)[0]
        except (struct.error, OverflowError):
            raise _Broken("it ends too early, within a list of texts") from None
        self.skip(at - self.at)


def _read(data: np.ndarray) -> GGUFFile:
    cursor = _Cursor(data)
    if cursor.scalars("c", 4) != (b"G", b"G", b"U", b"F"):
        raise _Broken("it does not start with GGUF")
    (version,) = cursor.scalars("I")
    if version not in (2, 3):
        raise _Broken(f"version {version}, expected 2 or 3 with the lowest byte first")
    num_tensors, num_keys = cursor.scalars("Q", 2)
    if num_keys > _MAX_ENTRIES or num_tensors > _MAX_ENTRIES:
        raise _Broken(f"it says that it has {num_keys} keys and {num_tensors} tensors, expected at most {_MAX_ENTRIES}")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise _Broken(f"the key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.scalars("I")[0], keep=not key.startswith("tokenizer."))
    alignment = metadata.get("general.alignment", 32)
    if not is_int(alignment) or alignment < 1 or alignment & (alignment - 1):
        raise _Broken(f"general.alignment must be a power of two, got {alignment!r}")
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in infos:
            raise _Broken(f"the tensor {name!r} comes twice")
        (num_dims,) = cursor.scalars("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise _Broken(f"the tensor {name!r} has {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
        infos[name] = cursor.scalars("Q", num_dims)[::-1], *cursor.scalars("I"), *cursor.scalars("Q")
    start = -(-cursor.at // alignment) * alignment
    return GGUFFile(metadata, _tensors(data[start:], alignment, infos))


def _tensors(
    data: np.ndarray, alignment: int, infos: dict[str, tuple[tuple[int, ...], int, int]]
) -> dict[str, StoredTensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, (shape, number, offset) in infos.items():
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise _Broken(f"the tensor {name!r} is of the unknown type {number}") from None
        if 0 in shape or shape[-1] % block:
            raise _Broken(f"the tensor {name!r} of shape {[*shape]} is not made of blocks of {block}")
        rows = [*shape[:-1], shape[-1] // block * block_bytes]
        size = math.prod(rows)
        if offset % alignment or offset + size > len(data):
            raise _Broken(f"the tensor {name!r} at offset {offset}, {size} bytes, does not lie in its data")
        spans.append((offset, offset + size, name))
        found[name] = StoredTensor(name, shape, kind, data[offset : offset + size].reshape(rows))
    for (_, end, name), (offset, _, following) in itertools.pairwise(sorted(spans)):
        if offset < end:
            raise _Broken(f"the tensors {name!r} and {following!r} overlap")
    return found


# -- weights ---------------------------------------------------------------------------------------------------------
def config_of(file: GGUFFile) -> LlamaConfig:
    """The model's shape, from the metadata and from which tensors there are; ConfigError for another architecture."""
    embedding, divisors = file.tensors.get("token_embd.weight"), file.tensors.get(_ROPE_DIVISORS)
    return LlamaConfig.from_gguf(
        file.metadata,
        vocab_size=1 if embedding is None else embedding.shape[0],  # its absence is reported with the others'
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        rope_divisors=None if divisors is None else tuple(_dequantize(divisors).flatten().tolist()),
    )


def load_file(path: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model in a GGUF file.

    Raises:
        ConfigError: not a GGUF file, another architecture, an unknown quantisation, tensors that do not fit.
    """
    file = open_file(path)
    config = config_of(file)
    tensors = {name: tensor for name, tensor in file.tensors.items() if name != _ROPE_DIVISORS}
    stored = {
        hf_name(name) or name: Stored(tensor.shape, partial(_weights, tensor, config))
        for name, tensor in tensors.items()
    }
    if len(stored) < len(tensors):
        raise ConfigError(f"{path}: two tensors stand for the same weights")
    return build(config, stored, device=device, dtype=dtype, source=str(path))


def hf_name(gguf_name: str) -> str | None:
    """Hugging Face's name of a llama tensor without ``model.``, or None where there is none.

    ``blk.3.attn_q.weight`` -> ``layers.3.self_attn.q_proj.weight``
    """
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name):
        layer, part, kind = match.groups()
        return f"layers.{layer}.{_BLOCK[part]}.{kind}" if part in _BLOCK else None
    part, _, kind = gguf_name.partition(".")
    return f"{_OUTER[part]}.{kind}" if part in _OUTER else None


def unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of Q and K rows, ``[num_heads * head_dim, ...]``.

    GGUF keeps the two halves of a rotary pair side by side (0, 1, 2, …), Hugging Face half a head apart (0, D/2, 1, …).
    """
    pairs = tensor.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _weights(stored: StoredTensor, config: LlamaConfig) -> torch.Tensor:
    tensor = _dequantize(stored)
    for part, num_heads in ((".attn_q.", config.num_heads), (".attn_k.", config.num_kv_heads)):
        if part in stored.name:
            return unpermute(tensor, num_heads)
    return tensor


def _dequantize(stored: StoredTensor) -> torch.Tensor:
    from gguf import quants

    try:
        array = quants.dequantize(stored.data, stored.type)
    except NotImplementedError as error:
        raise ConfigError(f"{escaped(stored.name)}: {error}") from error
    return torch.tensor(array)  # a copy: plain float32 would otherwise stay a view of the read-only file
