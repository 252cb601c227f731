"""What a model's config says of its cache: whether a ``VirtualCache`` can hold it, and its layers."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    DynamicCache,
    PreTrainedConfig,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..errors import ConfigError
from .shapes import ConfiguredLayer

__all__ = ["decoder_config", "layers_of"]

_INSTEAD = "use the cache that transformers gives it"


def turns_by_length(config: PreTrainedConfig) -> bool:
    """Whether the angles of a rotary embedding depend on how long the text is, so that K of a row does."""
    told = [getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}]
    told += [each for each in told[0].values() if isinstance(each, dict)]  # of each type of layer
    return any({each.get("rope_type"), each.get("type")} & {"dynamic", "longrope"} for each in told)


def decoder_config(config: PreTrainedConfig, holder: str = "VirtualCache") -> PreTrainedConfig:
    """The config of a model's text part.

    Args:
        holder: of the K and V, for what is said to the user.

    Raises:
        ConfigError: it is no config, or not one of a decoder.
    """
    if isinstance(config, (tuple, list)):
        raise ConfigError("tuples of K and V are not supported: give VirtualCache the model's config")
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(f"config must be a model's config, as model.config; got {type(config).__name__}")
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{name} is an encoder-decoder, {holder} takes decoder-only models: {_INSTEAD}")
    text = config.get_text_config(decoder=True)
    name = type(text).__name__
    for each in (config, text):
        # Some decoders say is_decoder=False too. Configs of models that may be either have add_cross_attention.
        may_be_either = hasattr(each, "add_cross_attention") or not _is_transformers(type(each))
        if may_be_either and getattr(each, "is_decoder", True) is False:
            raise ConfigError(f"{name} says is_decoder=False, and an encoder keeps no K and V: set is_decoder=True")
        if getattr(each, "is_causal", True) is False:
            raise ConfigError(f"{name} says is_causal=False, and K and V of tokens that see later ones cannot be kept")
        if getattr(each, "add_cross_attention", False):
            raise ConfigError(f"{name} says add_cross_attention=True, for K and V that do not grow: {_INSTEAD}")
    if getattr(text, "cross_attention_layers", None):
        raise ConfigError(f"{name} has layers that attend to images, whose K and V do not grow: {_INSTEAD}")
    _require_takes_cache(config, text)
    says_no = getattr(config, "use_cache", None) is False or getattr(text, "use_cache", None) is False
    if says_no and holder == "VirtualCache":  # whose passes are generate()'s
        warnings.warn(
            f"this {name} says use_cache=False, with which generate() feeds the whole text into a cache at every step: "
            "pass use_cache=True to generate()",
            stacklevel=3,
        )
    return text


def _require_takes_cache(config: PreTrainedConfig, text: PreTrainedConfig) -> None:
    """ConfigError where the models of this config take no cache of K and V. A user's own model is not checked."""
    models: list[Any] = []
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            models += found if isinstance(found, (tuple, list)) else [found]
    if not any(_is_transformers(kind) for kind in (type(config), *models)):
        return
    names = set().union(*(inspect.signature(model.forward).parameters for model in models))
    if not hasattr(text, "use_cache") and "use_cache" not in names:
        raise ConfigError(f"{type(text).__name__} is of models that take no cache of this kind: {_INSTEAD}, if any")
    for model in models:
        if _is_transformers(model) and {"cache", "past_key_values"}.isdisjoint(
            inspect.signature(model.forward).parameters
        ):
            raise ConfigError(f"{model.__name__} takes no cache of this kind: {_INSTEAD}, if any")


def _is_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def layers_of(config: PreTrainedConfig, holder: str = "VirtualCache") -> tuple[list[Any], dict[int, ConfiguredLayer]]:
    """What transformers would make for this config, and its attention layers."""
    try:
        templates = DynamicCache(config=config).layers
    except (KeyError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the layers of {type(config).__name__} are not known to transformers' caches: {error}"
        ) from error
    decoder_layers = getattr(config, "decoder_layers", None)  # Bart's num_hidden_layers are its encoder's
    templates = templates[:decoder_layers] if isinstance(decoder_layers, int) else templates
    layer_types = getattr(config, "layer_types", None)
    all_chunked = layer_types is None and getattr(config, "attention_chunk_size", None) is not None
    per_layer = getattr(config, "per_layer_config", None)
    configured: dict[int, ConfiguredLayer] = {}
    for index, template in enumerate(templates):
        if type(template) is DynamicLayer or type(template) is DynamicSlidingWindowLayer:
            configured[index] = ConfiguredLayer(
                *_head_shape(config if per_layer is None else per_layer[index]),
                window=getattr(template, "sliding_window", None),
                chunked=all_chunked or (layer_types is not None and layer_types[index] == "chunked_attention"),
            )
        elif type(template) is not LinearAttentionLayer and type(template).__name__ != "DummyLayer":
            raise ConfigError(
                f"{holder} cannot hold layer {index} of {type(config).__name__}, a {type(template).__name__}, "
                f"which keeps more than K and V: {_INSTEAD}"
            )
    # A recurrent model whose config gives no layer types looks like one of attention, but has no attention heads.
    heads_known = getattr(config, "num_attention_heads", None) or not _is_transformers(type(config))
    if not configured or not heads_known:
        raise ConfigError(f"{type(config).__name__} has no attention layers to cache")
    return list(templates), configured


def _head_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """(num_kv_heads, head_dim)."""
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "hidden_size", heads) // heads
    return int(kv_heads), int(head_dim)
