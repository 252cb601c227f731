"""What ``config.json`` and GGUF metadata say of a model, as keyword arguments of ``LlamaConfig``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .files import Fields

__all__ = ["LARGEST", "OtherArithmetic", "read_gguf", "read_hf"]

# No model comes near these. They bound what is computed before a file's sizes are compared with its tensors: the
# windows of each layer, the divisors of each frequency.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_layers": 2**14,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31 - 1,
}
# Our names of sizes that every file has -> theirs.
_HF_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
}
_GGUF_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
# model_type in config.json -> what transformers takes for keys that are not there
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
_ELSEWHERE = "other models run as transformers loads them: vattn.Engine(model), or vattn.hf.VirtualCache as their cache"
_HF_SUPPORTED = f"supported: {', '.join(_DEFAULTS)}; {_ELSEWHERE}"

# Keys of config.json that, if set, mean arithmetic that this code does not do.
_HF_REFUSED = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), "a mixture of experts"),
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
    **dict.fromkeys(("quantization_config", "compression_config"), "quantised weights"),
    **dict.fromkeys(("per_layer_config", "pruned_heads"), "layers that differ from each other"),
    "is_encoder_decoder": "an encoder",
    "add_cross_attention": "attention to an encoder",
}
# Keys of GGUF that mean the same, unless they have one of these values.
_GGUF_REFUSED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("expert_count", "attention.sliding_window", "attention.clamp_kqv"), (0,)),
    **dict.fromkeys(("attention.max_alibi_bias", "attention.scale"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), (0, 1)),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1,),
}


class OtherArithmetic(ConfigError):
    """A config in order, of a model that this code does not compute; transformers may."""


def _sizes(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: fields.integer(theirs, maximum=LARGEST[ours]) for ours, theirs in names.items()}


# -- config.json -----------------------------------------------------------------------------------------------------
def read_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """See ``LlamaConfig.from_hf``."""
    fields = Fields(config, "config.json")
    model_type = config.get("model_type")
    named = escaped(repr(model_type))
    for key, what in _HF_REFUSED.items():
        if config.get(key):
            raise OtherArithmetic(f"{named} with {what} ({key} in config.json) is not supported; {_HF_SUPPORTED}")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        named += f" ({escaped(repr(config.get('architectures')))})"
        raise OtherArithmetic(f"unknown architecture {named} in config.json; {_HF_SUPPORTED}")
    if config.get("is_causal", True) is not True:  # transformers takes null for false here
        raise fields.refused("is_causal", config["is_causal"], "true: each token attends to those before it")
    fields = Fields({**_DEFAULTS[model_type], **config}, "config.json")
    if (activation := fields.raw("hidden_act", "silu")) not in ("silu", "swish"):
        raise OtherArithmetic(f"unsupported hidden_act {escaped(repr(activation))} in config.json; supported: silu")

    sizes = _sizes(fields, _HF_SIZES)
    head_dim = fields.integer("head_dim", None, maximum=LARGEST["head_dim"])
    head_dim = head_dim or sizes["hidden_size"] // sizes["num_heads"]
    rope = _hf_rope(fields)
    theta = rope.number("rope_theta", 10000.0)
    # Qwen2 has no switches: Q, K and V carry a bias and nothing else does. Mistral has no biases at all.
    switched = model_type in ("llama", "qwen3") and fields.flag("attention_bias")
    return {
        **sizes,
        "num_kv_heads": fields.integer("num_key_value_heads", sizes["num_heads"]),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6, zero=True),
        "rope_theta": theta,
        "rope_divisors": _hf_divisors(rope, theta, head_dim, sizes["max_position_embeddings"]),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "attention_bias": switched or model_type == "qwen2",
        "attention_output_bias": switched,
        "mlp_bias": model_type == "llama" and fields.flag("mlp_bias"),
        "qk_norm": model_type == "qwen3",
        "windows": _hf_windows(fields, model_type, sizes["num_layers"]),
    }


def _hf_rope(fields: Fields) -> Fields:
    """The rotary parameters, with ``rope_theta``, which transformers 4 kept beside them."""
    names = ("rope_scaling", "rope_parameters")
    found = [
        fields.checked(name, None, "an object or null", lambda value: isinstance(value, Mapping)) for name in names
    ]
    given = [value for value in found if value]
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
    # Of this key the one outside wins, as in transformers.
    if (outside := fields.raw("original_max_position_embeddings", None)) is not None:
        rope["original_max_position_embeddings"] = outside
    if (partial := rope["partial_rotary_factor"]) is not None and (isinstance(partial, bool) or partial != 1):
        raise OtherArithmetic(
            f"unsupported partial_rotary_factor {escaped(repr(partial))} in config.json; supported: 1"
        )
    return Fields(rope, "config.json, rotary parameters")


def _hf_windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...] | None:
    """Each layer's window. Mistral has one for all layers; Qwen has windows by layer, if ``use_sliding_window``."""
    if model_type == "llama":
        return None
    window = fields.integer("sliding_window", None)
    if model_type == "mistral":
        return None if window is None else (window,) * num_layers
    if not fields.flag("use_sliding_window"):
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


def _hf_divisors(rope: Fields, theta: float, head_dim: int, max_positions: int) -> tuple[float, ...] | None:
    """Per-frequency divisors of a rotary scaling, None where there is none."""
    kind = rope.raw("rope_type", None) or rope.raw("type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return (rope.number("factor"),) * (head_dim // 2)
    if kind != "llama3":
        raise OtherArithmetic(
            f"unsupported rotary scaling {escaped(repr(kind))}; supported: default, linear, llama3; {_ELSEWHERE}"
        )
    # Llama 3.1: a wavelength that fits often into the original context keeps its frequency, one that hardly fits is
    # divided by `factor`, and those between are interpolated.
    factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise ConfigError(f"config.json: low_freq_factor must be below high_freq_factor, got {low} and {high}")
    original = rope.number("original_max_position_embeddings", float(max_positions))
    wavelengths = (2 * math.pi * theta ** (i / head_dim) for i in range(0, head_dim, 2))
    smooth = [min(1.0, max(0.0, (original / wavelength - low) / (high - low))) for wavelength in wavelengths]
    return tuple(1.0 / (share + (1.0 - share) / factor) for share in smooth)


# -- GGUF ------------------------------------------------------------------------------------------------------------
def read_gguf(metadata: Mapping[str, Any], rope_divisors: tuple[float, ...] | None) -> dict[str, Any]:
    """See ``LlamaConfig.from_gguf``."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"unknown architecture {escaped(repr(architecture))} in the GGUF file; supported: llama; {_ELSEWHERE}"
        )
    fields = Fields({key: _of_all_layers(key, value) for key, value in metadata.items()}, "the GGUF metadata", "llama.")
    for key, plain in _GGUF_REFUSED.items():
        if (value := fields.raw(key, None)) is not None and value not in plain:
            raise ConfigError(
                f"a llama with {key} {escaped(repr(value))} in the GGUF file (a mixture of experts, or other "
                f"arithmetic) is not supported; {_ELSEWHERE}"
            )
    sizes = _sizes(fields, _GGUF_SIZES)
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    head_dim = fields.integer("attention.key_length", head_dim, maximum=LARGEST["head_dim"])
    value_dim = fields.integer("attention.value_length", head_dim)
    rope_dim = fields.integer("rope.dimension_count", head_dim)
    if not head_dim == value_dim == rope_dim:
        raise ConfigError(
            f"unsupported GGUF shapes: key length {head_dim}, value length {value_dim} and rotary dimensions "
            f"{rope_dim} must be equal"
        )
    return {
        **sizes,
        "num_kv_heads": fields.integer("attention.head_count_kv", sizes["num_heads"]),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", zero=True),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_divisors": _gguf_divisors(fields, rope_divisors, head_dim),
    }


def _gguf_divisors(fields: Fields, divisors: tuple[float, ...] | None, head_dim: int) -> tuple[float, ...] | None:
    """The divisors of ``rope_freqs``, times a linear scaling, as llama.cpp computes them.

    llama.cpp takes a scaling for linear unless it is named otherwise, knows two keys for its factor, and takes a factor
    of 0 for none.
    """
    kind = fields.raw("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ConfigError(
            f"unsupported rotary scaling {escaped(repr(kind))} in the GGUF file; supported: none, linear, and the "
            f"tensor rope_freqs; {_ELSEWHERE}"
        )
    if divisors is not None and not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
        raise ConfigError("the GGUF file's rope_freqs must be finite and above 0")
    key = "rope.scale_linear" if fields.raw("rope.scaling.factor", None) is None else "rope.scaling.factor"
    factor = fields.number(key, 1.0, zero=True) or 1.0
    if kind == "none" or factor == 1.0:
        return divisors
    return tuple(divisor * factor for divisor in divisors or (1.0,) * (head_dim // 2))


def _of_all_layers(key: str, value: Any) -> Any:
    """The one value of an array that repeats it for each layer."""
    if not isinstance(value, list) or not key.startswith("llama."):
        return value
    if not value or any(each != value[0] for each in value):
        raise ConfigError(f"the GGUF metadata: {key} differs between layers, which is not supported: {escaped(value)}")
    return value[0]
