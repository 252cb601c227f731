"""What there is to know of a model before its first pass: whether it can be run, what it caches and attends to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..arguments import require_int
from ..decode.options import require_state_room
from ..driver import open_driver
from ..errors import ConfigError, OutOfPages
from .configs import decoder_config, layers_of
from .pass_attention import Recording
from .passes import IMPLEMENTATIONS
from .shadow import Shadow
from .shapes import ConfiguredLayer, Shapes

__all__ = [
    "Plan",
    "attention_layers",
    "checked",
    "described",
    "implementations",
    "learnt",
    "positions",
    "refusing",
    "require_memory",
    "require_positions",
]

_HOLDER = "TransformersModel"
LEAST_POSITIONS = 8  # more than are tried before the first pass
_INSTEAD = "use vattn.hf.VirtualCache with its generate()"


@dataclass(frozen=True)
class Plan:
    """What a pass that computed nothing showed.

    Attributes:
        shapes: of K and V, of every layer that caches.
        dtype: of K and V.
        features: that attention needs, of SOFTCAP and SINKS.
        num_heads: query heads, of the layer that has most.
        late: layers whose attention reads other K and V than the model gives to its cache.
    """

    shapes: Shapes
    dtype: torch.dtype
    features: frozenset[str]
    num_heads: int
    late: frozenset[int]


def checked(model: Any) -> PreTrainedConfig:
    """The config of a model's text part.

    Raises:
        ConfigError: the model cannot be run; says what to do.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"TransformersModel takes a model of transformers, got {described(model)}")
    name = type(model).__name__
    text = decoder_config(model.config, _HOLDER)
    # accelerate() makes its own with the model's forward overridden, but none of its parts'.
    fused = any(isinstance(vars(part).get("forward"), Shadow) for part in model.modules() if part is not model)
    if fused or text._attn_implementation in IMPLEMENTATIONS:
        raise ConfigError(
            f"another TransformersModel runs this {name}, perhaps accelerate's: close it first, or use that one"
        )
    if model.training:
        raise ConfigError(f"this {name} is in training mode: call model.eval()")
    checkpointing = "is_activation_checkpointing"  # its name from 5.24 on
    if getattr(model, checkpointing if hasattr(type(model), checkpointing) else "is_gradient_checkpointing"):
        raise ConfigError(f"this {name} has gradient checkpointing on: call model.gradient_checkpointing_disable()")
    devices = sorted({str(each.device) for each in model.parameters()})
    if len(devices) != 1 or "meta" in devices:
        raise ConfigError(
            f"this {name} is on {' and '.join(devices) or 'no device'}, a TransformersModel needs it on one: load it "
            "without device_map, or with device_map={'': device}"
        )
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise ConfigError(f"{type(text).__name__} has no vocab_size: it is of no model that generates tokens")
    if model.get_output_embeddings() is None:
        raise ConfigError(f"{name} has no head that returns logits: load it with AutoModelForCausalLM")
    return text


def described(model: Any) -> str:
    """What was given in place of a model of transformers, and which one is inside of it."""
    name = f"a {type(model).__name__}"
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    inside = next((type(each).__name__ for each in parts if isinstance(each, PreTrainedModel)), None)
    if isinstance(model, PreTrainedModel):
        return f"{name}, which has no head that returns logits: give it what AutoModelForCausalLM loads"
    if inside is None:
        return name
    if type(model).__module__.partition(".")[0] == "peft":
        return f"{name}: merge its adapters, and give the {inside} that merge_and_unload() returns"
    return f"{name}: give it the {inside} inside"


def require_positions(name: str, parameters: Mapping[str, Any]) -> None:
    """ConfigError unless a model can be told where each token stands, by the parameters of its forward."""
    if "position_ids" not in parameters:
        raise ConfigError(f"{name} takes no position_ids, so its sequences cannot share a pass: {_INSTEAD}")


def attention_layers(name: str, config: PreTrainedConfig) -> tuple[int, dict[int, ConfiguredLayer]]:
    """The number of all layers, and those that keep K and V.

    Raises:
        ConfigError: a layer keeps something else.
    """
    templates, configured = layers_of(config, _HOLDER)
    for index, template in enumerate(templates):
        if index not in configured and type(template).__name__ != "DummyLayer":
            raise ConfigError(
                f"layer {index} of {name} keeps a recurrent state, the runtime has room for K and V only: {_INSTEAD}"
            )
    return len(templates), configured


def require_memory(model: PreTrainedModel, max_batch: int, memory_limit: int | None) -> None:
    """Refuse what no call could be served with, as far as the config tells. Says nothing of models and devices that
    cannot be served anyway.

    Args:
        max_batch: sequences of a step; there are slots for twice as many.
        memory_limit: bytes for K and V.

    Raises:
        ConfigError: there is no memory for so many slots; or the limit does not hold a token, which takes a page for
            each kind of attention layer, and on a GPU as many for the row that fills up batches.
    """
    name, text, device = type(model).__name__, model.config.get_text_config(decoder=True), model.device
    try:
        _, configured = attention_layers(name, text)
        driver = open_driver(device)
    except ConfigError:
        return
    page_bytes = driver.default_page_bytes
    driver.close()
    if isinstance(vocab_size := getattr(text, "vocab_size", None), int):
        require_state_room(max_batch, 2 * max_batch + 1, vocab_size, device)
    kinds = {(each.num_kv_heads, each.head_dim, None if each.chunked else each.window) for each in configured.values()}
    least = len(kinds) * page_bytes * (2 if device.type == "cuda" else 1)
    if memory_limit is not None and memory_limit < least:
        raise ConfigError(
            f"memory_limit must be at least {least} bytes, the pages that one token of this {name} takes, got "
            f"{memory_limit}"
        )


def implementations(model: PreTrainedModel) -> dict[str, str]:
    """The attention of a model and of its parts, as ``set_attn_implementation`` takes them."""
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    names = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": model.config._attn_implementation, **names}


def positions(
    config: PreTrainedConfig, asked: int | None, configured: dict[int, ConfiguredLayer], rope_limit: int | None
) -> int:
    """How long a text may be: as asked, but no longer than the model allows; None for that.

    Args:
        rope_limit: of ``FixedRopes``.

    Raises:
        ConfigError: it is longer, or the config does not say.
    """
    # A query sees the rows of its own chunk, a window would move with it: they are the same in the first chunk.
    limits = [layer.window for layer in configured.values() if layer.chunked]
    limits += [getattr(config, "max_position_embeddings", None), rope_limit]
    limit = min((limit for limit in limits if limit is not None), default=None)
    if asked is None and limit is None:
        raise ConfigError(f"{type(config).__name__} does not say how long a text may be: give max_seq_len")
    return require_int("max_seq_len", limit if asked is None else asked, LEAST_POSITIONS, limit)


def learnt(name: str, config: PreTrainedConfig, recording: Recording, logits: torch.Tensor) -> Plan:
    """From a pass that was recorded.

    Args:
        name: of the model.
        logits: ``[1, vocab_size]``, that the pass returned.

    Raises:
        ConfigError: the model does not do what its config says, or keeps no K and V.
    """
    num_layers, configured = attention_layers(name, config)
    own = {}  # of each layer of the cache
    for layer in sorted(recording.shapes):
        if layer % num_layers not in configured:
            raise ConfigError(f"{name} caches K and V in layer {layer}, which its config does not know: {_INSTEAD}")
        own[layer] = configured[layer % num_layers]
        window, found = own[layer].window, recording.windows.get(layer, set())
        if len(found) > 1 or not found <= {window}:
            raise ConfigError(f"{name} gives layer {layer} windows {found}, its config says {window}: {_INSTEAD}")
    if not recording.shapes:
        raise ConfigError(f"{name} kept no K and V in a pass: it has no attention layers to run over a cache")
    if logits.shape[-1] != config.vocab_size:
        raise ConfigError(
            f"{name} returns {logits.shape[-1]} logits a token, its config has a vocab_size of {config.vocab_size}: "
            "set config.vocab_size"
        )
    # A chunk is not a window; texts end with the first.
    shapes = Shapes({layer: replace(each, window=None) if each.chunked else each for layer, each in own.items()})
    shapes.seen = recording.shapes
    return Plan(shapes, recording.dtype, recording.features, recording.num_heads, frozenset(recording.late))


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """What the code of a model raises inside, as ConfigError."""
    try:
        yield
    except (OutOfPages, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"vattn cannot run {name}: {error}; {_INSTEAD}") from error
