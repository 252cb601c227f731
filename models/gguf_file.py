"""What lies where in a GGUF file. Every length and offset is checked against the file before anything is read by it.

gguf's own reader makes several numpy arrays of every string of a vocabulary, which takes seconds, and believes the
file's counts. This one steps over what nobody asks for.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vattn.arguments import escaped
from vattn.errors import ConfigError

__all__ = ["GGUFFile", "StoredTensor", "open_file"]

_STRING, _ARRAY = 8, 9
# value type -> its struct code; uint8, int8, uint16, ... as the format numbers them
_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
_KEPT_ELEMENTS = 1 << 14  # longer arrays are for tokenizers
_MAX_DIMS = 4
_MAX_ENTRIES = 1 << 16  # keys, and tensors: a model of 1,000 layers has some 10,000; more would only take time


@dataclass(frozen=True)
class StoredTensor:
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


@dataclass(frozen=True)
class GGUFFile:
    """Metadata, without that of the tokenizer and without long arrays, and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Broken(Exception):
    """Says what is wrong with the file."""


def open_file(path: Path) -> GGUFFile:
    """Look through a GGUF file of version 2 or 3.

    Raises:
        ConfigError: not such a file, or one whose parts do not lie within it, overlap, or come twice.
    """
    try:
        return _read(np.asarray(np.memmap(path, mode="r")))
    except (OSError, ValueError, _Broken) as error:
        raise ConfigError(f"cannot read {path} as a GGUF file: {escaped(str(error))}") from error


class _Cursor:
    def __init__(self, data: np.ndarray) -> None:
        self.data, self.view, self.at = data, memoryview(data.data), 0
        self.kept = 0  # elements of arrays

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def skip(self, size: int) -> int:
        """Step over ``size`` bytes; returns where they start."""
        if size > self.left:
            raise _Broken(f"it ends too early: {size} bytes wanted at {self.at}, {self.left} left")
        self.at += size
        return self.at - size

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack_from(layout, self.view, self.skip(struct.calcsize(layout)))

    def string(self) -> str:
        size = self.scalars("Q")[0]
        start = self.skip(size)
        try:
            return bytes(self.view[start : self.at]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Broken(f"a name or text at {start} is no UTF-8") from error

    def value(self, kind: int, keep: bool) -> Any:
        """The value that follows, None for one that is stepped over."""
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind])[0]
        if kind == _STRING:
            if keep:
                return self.string()
            self._skip_strings(1)
            return None
        if kind != _ARRAY:
            raise _Broken(f"unknown value type {kind} at {self.at}")
        element, count = self.scalars("I")[0], self.scalars("Q")[0]
        if element in _SCALARS:
            if keep and self.keeps(count):
                return list(self.scalars(_SCALARS[element], count))
            self.skip(count * struct.calcsize("<" + _SCALARS[element]))
        elif element == _STRING:
            if count > self.left // 8:
                raise _Broken(f"it ends too early: {count} texts wanted at {self.at}, {self.left} bytes left")
            if keep and self.keeps(count):
                return [self.string() for _ in range(count)]
            self._skip_strings(count)
        else:
            raise _Broken(f"an array of unknown value type {element} at {self.at}")
        return None

    def keeps(self, count: int) -> bool:
        """Whether an array of so many elements is kept: short ones, up to a sum that a model's sizes never reach."""
        self.kept += count if count <= _KEPT_ELEMENTS else 0
        return count <= _KEPT_ELEMENTS and self.kept <= _MAX_ENTRIES

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
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
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
    return GGUFFile(metadata, _tensors(data, start, alignment, infos))


def _tensors(
    data: np.ndarray, start: int, alignment: int, infos: dict[str, tuple[tuple[int, ...], int, int]]
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
        size = 1
        for length in rows:
            size *= length
        if offset % alignment or start + offset + size > len(data):
            raise _Broken(f"the tensor {name!r} at offset {offset}, {size} bytes, does not lie in its data")
        spans.append((offset, offset + size, name))
        found[name] = StoredTensor(name, shape, kind, data[start + offset : start + offset + size].reshape(rows))
    spans.sort()
    for (_, end, name), (offset, _, following) in itertools.pairwise(spans):
        if offset < end:
            raise _Broken(f"the tensors {name!r} and {following!r} overlap")
    return found
