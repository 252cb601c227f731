"""The shape of a model of the Llama family, read from a Hugging Face ``config.json`` or from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vattn.errors import ConfigError

__all__ = ["LlamaConfig"]

_GGUF_SUPPORTED = "supported: llama"

# model_type in config.json -> what transformers takes for keys that are not there
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
_HF_SUPPORTED = f"supported: {', '.join(_HF_DEFAULTS)}"

# Keys that, where they say anything, say that the model computes something else than this code does.
_HF_REFUSED = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
    "quantization_config": "quantised weights",
}


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that decides the shape and the arithmetic of a model of the Llama family.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: sizes in elements.
        max_position_embeddings: the context in tokens.
        rms_norm_eps: added to the mean square before its root is taken.
        rope_theta: base of the rotary frequencies ``theta ** (-2 i / head_dim)``.
        rope_divisors: divides each of the ``head_dim / 2`` frequencies, or None. Linear and Llama 3 scaling both reduce
            to this.
        tie_word_embeddings: the output projection is the embedding table.
        attention_bias: whether the projections to Q, K and V carry a bias.
        attention_output_bias: whether the one behind attention does; None: as ``attention_bias``.
        mlp_bias: whether the MLP's three do.
        qk_norm: normalise each Q and K head before its rotation.
        windows: of each layer, the tokens that attention looks back, the query's own included, or None for all; None
            where no layer has a window.

    Raises:
        ConfigError: sizes that cannot be a model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "model config: num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model config: rotary embeddings need an even head_dim, got {self.head_dim}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ConfigError(
                f"model config: expected {self.head_dim // 2} rotary divisors, got {len(self.rope_divisors)}"
            )
        if self.windows is not None:
            if len(self.windows) != self.num_layers:
                raise ConfigError(
                    f"model config: expected a window or None for each of {self.num_layers} layers, "
                    f"got {len(self.windows)}"
                )
            for window in self.windows:
                if window is not None and (not isinstance(window, int) or window < 1):
                    raise ConfigError(f"model config: a window must be a positive integer or None, got {window!r}")

    def window(self, layer: int) -> int | None:
        """Tokens that attention of that layer looks back, None for all."""
        return None if self.windows is None else self.windows[layer]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From the dictionary in a Hugging Face ``config.json``, as transformers 4 and 5 write it.

        Raises:
            ConfigError: another architecture, a missing key, or something that is not supported: a rotary scaling, an
                activation, experts, soft-capping, quantised weights.
        """
        model_type = config.get("model_type")
        for key, what in _HF_REFUSED.items():
            if config.get(key):
                raise ConfigError(
                    f"{model_type!r} with {what} ({key} in config.json) is not supported; {_HF_SUPPORTED}"
                )
        if model_type not in _HF_DEFAULTS:
            named = config.get("architectures") or model_type
            raise ConfigError(f"unknown architecture {named!r} in config.json; {_HF_SUPPORTED}")
        config = {**_HF_DEFAULTS[model_type], **config}
        if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ConfigError(f"unsupported hidden_act {activation!r} in config.json; supported: silu")

        num_layers = int(_require(config, "num_hidden_layers", "config.json"))
        num_heads = int(_require(config, "num_attention_heads", "config.json"))
        hidden_size = int(_require(config, "hidden_size", "config.json"))
        head_dim = int(config.get("head_dim") or hidden_size // num_heads)
        max_positions = int(_require(config, "max_position_embeddings", "config.json"))
        rope = _hf_rope(config)
        # Qwen2 has no switches: Q, K and V carry a bias and nothing else does. Mistral has no biases at all.
        switched = model_type in ("llama", "qwen3") and bool(config.get("attention_bias", False))
        return cls(
            vocab_size=int(_require(config, "vocab_size", "config.json")),
            hidden_size=hidden_size,
            intermediate_size=int(_require(config, "intermediate_size", "config.json")),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=rope["rope_theta"],
            rope_divisors=_rope_divisors(rope, rope["rope_theta"], head_dim, max_positions),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=switched or model_type == "qwen2",
            attention_output_bias=switched,
            mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=model_type == "qwen3",
            windows=_hf_windows(config, num_layers),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        vocab_size: int,
        tie_word_embeddings: bool,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        rope_divisors: tuple[float, ...] | None = None,
    ) -> LlamaConfig:
        """From GGUF key-value metadata (``general.architecture``, ``llama.*``).

        What GGUF says through its tensors rather than its metadata comes as keyword arguments.

        Raises:
            ConfigError: another architecture, a missing key, a rotary scaling that is not supported.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise ConfigError(f"unknown architecture {architecture!r} in the GGUF file; {_GGUF_SUPPORTED}")
        if metadata.get("llama.expert_count"):
            raise ConfigError(
                f"unknown architecture: a mixture of experts in the GGUF file; {_GGUF_SUPPORTED}, dense only"
            )

        def key(name: str) -> Any:
            return _require(metadata, f"llama.{name}", "the GGUF metadata")

        num_heads, hidden_size = int(key("attention.head_count")), int(key("embedding_length"))
        head_dim = int(metadata.get("llama.attention.key_length") or hidden_size // num_heads)
        value_dim = int(metadata.get("llama.attention.value_length") or head_dim)
        rope_dim = int(metadata.get("llama.rope.dimension_count") or head_dim)
        if not head_dim == value_dim == rope_dim:
            raise ConfigError(
                f"unsupported GGUF shapes: key length {head_dim}, value length {value_dim} and rotary dimensions "
                f"{rope_dim} must be equal"
            )
        max_positions = int(key("context_length"))
        theta = float(metadata.get("llama.rope.freq_base") or 10000.0)
        if rope_divisors is None:
            kind = metadata.get("llama.rope.scaling.type") or "default"
            scaling = {
                "rope_type": "default" if kind == "none" else kind,
                "factor": metadata.get("llama.rope.scaling.factor") or metadata.get("llama.rope.scale_linear"),
            }
            rope_divisors = _rope_divisors(scaling, theta, head_dim, max_positions)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=int(key("feed_forward_length")),
            num_layers=int(key("block_count")),
            num_heads=num_heads,
            num_kv_heads=int(metadata.get("llama.attention.head_count_kv") or num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=float(key("attention.layer_norm_rms_epsilon")),
            rope_theta=theta,
            rope_divisors=rope_divisors,
            tie_word_embeddings=tie_word_embeddings,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
        )


def _require(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    value = mapping.get(key)
    if value is None:
        raise ConfigError(f"{where} lacks {key!r}")
    return value


def _hf_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters, ``rope_theta`` among them. transformers 4 kept it beside ``rope_scaling``."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"unsupported rotary parameters in config.json: different ones for {', '.join(nested)}")
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if float(partial) != 1.0:
        raise ConfigError(f"unsupported partial_rotary_factor {partial!r} in config.json; supported: 1")
    return {**rope, "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)}


def _hf_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...] | None:
    """Each layer's window: all of Mistral's or none; Qwen's by layer, and only if it says that it uses them."""
    window, model_type = config.get("sliding_window"), config["model_type"]
    if window is None or model_type == "llama":
        return None
    if model_type == "mistral":
        return (int(window),) * num_layers
    if not config.get("use_sliding_window", False):
        return None
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", 28))
        kinds = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first)
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"config.json: expected layer_types to name full_attention or sliding_attention for each of {num_layers} "
            f"layers, got {kinds!r}"
        )
    windows = tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else None


def _rope_divisors(
    rope: Mapping[str, Any], theta: float, head_dim: int, max_positions: int
) -> tuple[float, ...] | None:
    """Per-frequency divisors of a Hugging Face rotary scaling, None where there is none."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return (float(_require(rope, "factor", "the rotary scaling")),) * (head_dim // 2)
    if kind != "llama3":
        raise ConfigError(f"unsupported rotary scaling {kind!r}; supported: default, linear, llama3")

    # Llama 3.1: wavelengths that fit the original context often keep their frequency, those that hardly do are
    # divided by `factor`, those between are interpolated.
    factor = float(_require(rope, "factor", "the rotary scaling"))
    low = float(_require(rope, "low_freq_factor", "the rotary scaling"))
    high = float(_require(rope, "high_freq_factor", "the rotary scaling"))
    original = float(rope.get("original_max_position_embeddings") or max_positions)
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1.0 / (smooth + (1.0 - smooth) / factor))
    return tuple(divisors)
