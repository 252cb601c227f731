"""Putting named tensors into a model, one at a time, in the wanted dtype and place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .config import LlamaConfig
from .llama import Llama

__all__ = ["Stored", "build"]


class Stored(NamedTuple):
    """A tensor in a file: its shape, which its header tells, and how to read it."""

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

    All names and shapes are compared with the config before anything is built or read. Two copies of all weights are
    never alive: tensors are read, converted and dropped one by one.

    Args:
        tensors: names as in a Hugging Face checkpoint (a leading ``model.`` is dropped), any float dtype.
        source: where they come from, for the error message.

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
    """The names of the model's tensors, all of which are there and of the right shape, and nothing else is."""
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
        parts = [f"missing tensors: {_first(missing)}"] if missing else []
        parts += [f"unexpected tensors: {_first(unexpected)}"] if unexpected else []
        raise ConfigError(f"{source}: {'; '.join(parts)}")
    return list(wanted)


def _shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, from a model of one layer: all are alike."""
    with torch.device("meta"):
        model = Llama(replace(config, num_layers=1, windows=None))
    for name, tensor in model.state_dict().items():
        if name.startswith("layers.0."):
            continue
        yield name, tuple(tensor.shape)
    for name, tensor in model.layers[0].state_dict().items():
        for layer in range(config.num_layers):
            yield f"layers.{layer}.{name}", tuple(tensor.shape)


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Tensors that checkpoints carry although they follow from the rest."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _first(names: Iterable[str], limit: int = 5) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(escaped(name) for name in listed[:limit]) + more
