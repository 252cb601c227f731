"""Putting named tensors into a model, one at a time, in the wanted dtype and place."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vattn.errors import ConfigError

from .config import LlamaConfig
from .llama import Llama

__all__ = ["build"]


def build(
    config: LlamaConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    source: str,
) -> Llama:
    """A model with those weights.

    Two copies of all weights are never alive: tensors are taken from the iterator, converted and dropped one by one.

    Args:
        tensors: names as in a Hugging Face checkpoint (a leading ``model.`` is dropped), any float dtype.
        source: where they come from, for the error message.

    Raises:
        ConfigError: tensors missing, unexpected or of a wrong shape; names them.
    """
    with torch.device("meta"):
        model = Llama(config)
    missing = dict(model.state_dict())
    loaded: dict[str, torch.Tensor] = {}
    unexpected: list[str] = []
    for full_name, tensor in tensors:
        name = full_name.removeprefix("model.")
        expected = missing.pop(name, None)
        if expected is None:
            unexpected += [] if _is_redundant(name, config) else [full_name]
            continue
        if tensor.shape != expected.shape:
            raise ConfigError(f"{source}: {full_name}: expected shape {[*expected.shape]}, got {[*tensor.shape]}")
        loaded[name] = tensor.to(device, dtype)
    if missing or unexpected:
        parts = [f"missing tensors: {_first(missing)}"] if missing else []
        parts += [f"unexpected tensors: {_first(unexpected)}"] if unexpected else []
        raise ConfigError(f"{source}: {'; '.join(parts)}")
    model.load_state_dict(loaded, assign=True)
    return model.requires_grad_(False)


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Tensors that checkpoints carry although they follow from the rest."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _first(names: Iterable[str], limit: int = 5) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
