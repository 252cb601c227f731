"""Weights into a model, one tensor at a time; and the tensors of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .config import LlamaConfig
from .files import lacks_package, listed, read_json
from .llama import Llama

__all__ = ["Stored", "build", "load_folder"]


class Stored(NamedTuple):
    """A tensor in a file: its shape, from the file's header, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def build(
    config: LlamaConfig,
    tensors: Mapping[str, Stored],
    *,
    device: torch.device,
    dtype: torch.dtype,
    source: str,
) -> Llama:
    """A model with those weights.

    All names and shapes are compared with the config before anything is built or read. Tensors are read, converted and
    dropped one by one, so that memory never holds two copies of all weights.

    Args:
        tensors: names as in a Hugging Face checkpoint (a leading ``model.`` is dropped), any float dtype.
        source: where they come from, for error messages.

    Raises:
        ConfigError: tensors missing, unexpected, twice, of a wrong shape or not of floats; names them.
    """
    found: dict[str, tuple[str, Stored]] = {}
    for full_name, stored in tensors.items():
        if (name := full_name.removeprefix("model.")) in found:
            raise ConfigError(f"{source}: {escaped(full_name)} and {escaped(found[name][0])} are the same tensor")
        found[name] = full_name, stored
    names = _require_fit(config, found, source)
    with torch.device("meta"):
        model = Llama(config)
    loaded: dict[str, torch.Tensor] = {}
    for name in names:
        full_name, stored = found[name]
        tensor = stored.read()
        if not tensor.is_floating_point():
            raise ConfigError(f"{source}: {escaped(full_name)}: expected floats, got {tensor.dtype}")
        loaded[name] = tensor.to(device, dtype)
    model.load_state_dict(loaded, assign=True)
    return model.requires_grad_(False)


def _require_fit(config: LlamaConfig, found: Mapping[str, tuple[str, Stored]], source: str) -> list[str]:
    """The names of the model's tensors; ConfigError unless just these are there, in the right shapes."""
    layers = {name.split(".")[1] for name in found if name.startswith("layers.") and name.count(".") > 1}
    if layers and len(layers) != config.num_layers:
        raise ConfigError(f"{source}: holds tensors of {len(layers)} layers, its config names {config.num_layers}")
    wanted = dict(_shapes(config))
    for name, shape in wanted.items():
        if name in found and tuple(found[name][1].shape) != shape:
            full_name, stored = found[name]
            raise ConfigError(f"{source}: {escaped(full_name)}: expected shape {[*shape]}, got {[*stored.shape]}")
    missing = [name for name in wanted if name not in found]
    unexpected = [full for name, (full, _) in found.items() if name not in wanted and not _is_redundant(name, config)]
    if missing or unexpected:
        parts = [f"missing tensors: {listed(missing)}"] if missing else []
        parts += [f"unexpected tensors: {listed(unexpected)}"] if unexpected else []
        raise ConfigError(f"{source}: {'; '.join(parts)}")
    return list(wanted)


def _shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, from a model of one layer: the layers are alike."""
    with torch.device("meta"):
        model = Llama(replace(config, num_layers=1, windows=None))
    for name, tensor in model.state_dict().items():
        if not name.startswith("layers.0."):
            yield name, tuple(tensor.shape)
    for name, tensor in model.layers[0].state_dict().items():
        for layer in range(config.num_layers):
            yield f"layers.{layer}.{name}", tuple(tensor.shape)


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Whether a checkpoint carries this tensor although it follows from the rest."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


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
        raise ConfigError(f"{index} names files outside the folder: {listed(outside)}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ConfigError(f"{folder}: shards named in {index.name} are missing: {listed(absent)}")
    return [folder / name for name in names]


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a file that an index names lies in the folder, or in ``blobs``, to which Hugging Face's cache links."""
    folder = folder.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots" and Path(name).name == name:
        allowed.append(folder.parent.parent / "blobs")
    return "\0" not in name and any((folder / name).resolve().is_relative_to(place) for place in allowed)
