"""Weights from a Hugging Face folder: ``config.json`` beside ``*.safetensors``, sharded or not."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .config import LlamaConfig
from .fields import lacks_package
from .llama import Llama
from .weights import Stored, build

__all__ = ["load_folder", "read_json"]

_MAX_JSON_BYTES = 64 << 20  # an index of a model of a hundred thousand tensors has a tenth of it


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model in ``folder``.

    Raises:
        ConfigError: no or unreadable ``config.json`` or weights, another architecture, tensors that do not fit it,
            shards outside the folder.
    """
    config = LlamaConfig.from_hf(read_json(folder / "config.json"))
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise lacks_package("reading safetensors files needs", "safetensors") from error
    tensors: dict[str, Stored] = {}
    with ExitStack() as opened:
        for file in _weight_files(folder):
            try:
                reader = opened.enter_context(safe_open(file, framework="pt", device=str(device)))
                for name in reader.keys():  # noqa: SIM118 - a reader, not a mapping
                    if name in tensors:
                        raise ConfigError(f"{folder}: the tensor {escaped(name)} is in several files")
                    shape = tuple(reader.get_slice(name).get_shape())
                    tensors[name] = Stored(shape, partial(reader.get_tensor, name))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"cannot read {escaped(str(file), 500)}: {escaped(str(error))}") from error
        try:
            return build(config, tensors, device=device, dtype=dtype, source=str(folder))
        except SafetensorError as error:
            raise ConfigError(f"cannot read the weights in {folder}: {escaped(str(error))}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError when there is none."""
    try:
        if not path.is_file():
            raise FileNotFoundError(path)
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB, too large for such a file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read {path}: {escaped(str(error))}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, else every safetensors file there."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [file for file in sorted(folder.glob("*.safetensors")) if file.is_file()]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and name for name in shards.values()):
        raise ConfigError(f"{index}: expected weight_map to name a file for each tensor")
    names = sorted(set(shards.values()))
    if outside := [name for name in names if not _is_inside(folder, name)]:
        raise ConfigError(f"{index} names files outside the folder: {_listed(outside)}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ConfigError(f"{folder}: shards named in {index.name} are missing: {_listed(absent)}")
    return [folder / name for name in names]


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a file that an index names lies in the folder; one of Hugging Face's cache has links to ``blobs``."""
    if "\0" in name:
        return False
    folder = folder.resolve()
    rooms = [folder]
    if folder.parent.name == "snapshots" and Path(name).name == name:
        rooms.append(folder.parent.parent / "blobs")
    return any((folder / name).resolve().is_relative_to(room) for room in rooms)


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(escaped(name) for name in names[:limit]) + (" …" if len(names) > limit else "")
