"""A ``LlamaConfig`` from a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .config import LARGEST, LlamaConfig
from .fields import Fields

__all__ = ["ELSEWHERE", "read"]

# model_type in config.json -> what transformers takes for keys that are not there
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
ELSEWHERE = "other models run through transformers, with vattn.hf.VirtualCache as their cache"
_SUPPORTED = f"supported: {', '.join(_DEFAULTS)}; {ELSEWHERE}"

# Keys that, where they say anything, say that the model computes something else than this code does.
_REFUSED = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
    "quantization_config": "quantised weights",
    "compression_config": "quantised weights",
    "per_layer_config": "layers that differ from each other",
    "pruned_heads": "layers that differ from each other",
    "is_encoder_decoder": "an encoder",
    "add_cross_attention": "attention to an encoder",
}


def read(config: Mapping[str, Any]) -> LlamaConfig:
    """See ``LlamaConfig.from_hf``."""
    fields = Fields(config, "config.json")
    model_type = config.get("model_type")
    for key, what in _REFUSED.items():
        if config.get(key):
            named = escaped(repr(model_type))
            raise ConfigError(f"{named} with {what} ({key} in config.json) is not supported; {_SUPPORTED}")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        named = f"{escaped(repr(model_type))} ({escaped(repr(config.get('architectures')))})"
        raise ConfigError(f"unknown architecture {named} in config.json; {_SUPPORTED}")
    if config.get("is_causal", True) is not True:  # transformers takes null for false here
        raise fields.refused("is_causal", config["is_causal"], "true: each token attends to those before it")
    fields = Fields({**_DEFAULTS[model_type], **config}, "config.json")
    if (activation := fields.raw("hidden_act", "silu")) not in ("silu", "swish"):
        raise ConfigError(f"unsupported hidden_act {escaped(repr(activation))} in config.json; supported: silu")

    num_layers = fields.integer("num_hidden_layers", maximum=LARGEST["num_layers"])
    num_heads = fields.integer("num_attention_heads", maximum=LARGEST["num_heads"])
    hidden_size = fields.integer("hidden_size", maximum=LARGEST["hidden_size"])
    head_dim = fields.integer("head_dim", None, maximum=LARGEST["head_dim"]) or hidden_size // num_heads
    max_positions = fields.integer("max_position_embeddings")
    rope = _rope(fields)
    theta = rope.number("rope_theta", 10000.0)
    # Qwen2 has no switches: Q, K and V carry a bias and nothing else does. Mistral has no biases at all.
    switched = model_type in ("llama", "qwen3") and fields.flag("attention_bias", False)
    return LlamaConfig(
        vocab_size=fields.integer("vocab_size", maximum=LARGEST["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", maximum=LARGEST["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, zero=True),
        rope_theta=theta,
        rope_divisors=_rope_divisors(rope, theta, head_dim, max_positions),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=switched or model_type == "qwen2",
        attention_output_bias=switched,
        mlp_bias=model_type == "llama" and fields.flag("mlp_bias", False),
        qk_norm=model_type == "qwen3",
        windows=_windows(fields, model_type, num_layers),
    )


def _rope(fields: Fields) -> Fields:
    """The rotary parameters with those that stand beside them: transformers 4 kept ``rope_theta`` there."""
    found = [(name, fields.raw(name, None)) for name in ("rope_scaling", "rope_parameters")]
    for name, value in found:
        if value is not None and not isinstance(value, Mapping):
            raise fields.refused(name, value, "an object or null")
    given = [value for _, value in found if value]
    if len(given) == 2 and given[0] != given[1]:
        raise ConfigError("config.json has a rope_scaling and a rope_parameters that differ; keep the one that holds")
    rope = dict(given[0]) if given else {}
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"unsupported rotary parameters in config.json: different ones for {escaped(', '.join(nested))}"
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is None:
            rope[key] = fields.raw(key, None)
    # Here the one outside wins, as in transformers.
    outside = fields.raw("original_max_position_embeddings", None)
    if outside is not None:
        rope["original_max_position_embeddings"] = outside
    if (partial := rope["partial_rotary_factor"]) is not None and (isinstance(partial, bool) or partial != 1):
        raise ConfigError(f"unsupported partial_rotary_factor {escaped(repr(partial))} in config.json; supported: 1")
    return Fields(rope, "config.json, rotary parameters")


def _windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...] | None:
    """Each layer's window: all of Mistral's or none; Qwen's by layer, and only if it says that it uses them."""
    if model_type == "llama":
        return None
    window = fields.integer("sliding_window", None)
    if model_type == "mistral":
        return None if window is None else (window,) * num_layers
    if not fields.flag("use_sliding_window", False):
        window = None
    kinds = fields.raw("layer_types", None)
    if kinds is None:
        first = fields.integer("max_window_layers", 28, minimum=0) if window is not None else num_layers
        kinds = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first)
    allowed = ["full_attention"] + (["sliding_attention"] if window is not None else [])
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in allowed for kind in kinds):
        raise ConfigError(
            f"config.json: expected layer_types to name {' or '.join(allowed)} for each of {num_layers} layers "
            f"(use_sliding_window is {'false' if window is None else 'true'}), got {escaped(repr(kinds))}"
        )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else None


def _rope_divisors(rope: Fields, theta: float, head_dim: int, max_positions: int) -> tuple[float, ...] | None:
    """Per-frequency divisors of a Hugging Face rotary scaling, None where there is none."""
    kind = rope.raw("rope_type", None) or rope.raw("type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return (rope.number("factor"),) * (head_dim // 2)
    if kind != "llama3":
        raise ConfigError(
            f"unsupported rotary scaling {escaped(repr(kind))}; supported: default, linear, llama3; {ELSEWHERE}"
        )

    # Llama 3.1: wavelengths that fit the original context often keep their frequency, those that hardly do are
    # divided by `factor`, those between are interpolated.
    factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise ConfigError(f"config.json: low_freq_factor must be below high_freq_factor, got {low} and {high}")
    original = rope.number("original_max_position_embeddings", float(max_positions))
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1.0 / (smooth + (1.0 - smooth) / factor))
    return tuple(divisors)
