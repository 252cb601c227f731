"""Weights from a Hugging Face folder: ``config.json`` beside ``*.safetensors``, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vattn.errors import ConfigError

from .config import LlamaConfig
from .llama import Llama
from .weights import build

__all__ = ["load_folder"]


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model in ``folder``.

    Raises:
        ConfigError: no or unreadable ``config.json`` or weights, another architecture, tensors that do not fit it.
    """
    config = LlamaConfig.from_hf(read_json(folder / "config.json"))
    tensors = _tensors(_weight_files(folder), device)
    return build(config, tensors, device=device, dtype=dtype, source=str(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent} has no {path.name}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, else every safetensors file there."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if absent := [file.name for file in files if not file.exists()]:
        raise ConfigError(f"{folder}: shards named in {index.name} are missing: {', '.join(absent)}")
    return files


def _tensors(files: list[Path], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError("reading safetensors files needs the package safetensors: pip install 'vattn[hf]'") from error
    for file in files:
        try:
            with safe_open(file, framework="pt", device=str(device)) as reader:
                for name in reader.keys():  # noqa: SIM118 - a reader, not a mapping
                    yield name, reader.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from error
