"""The shape of a Llama model, read from a Hugging Face ``config.json`` or from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vattn.errors import ConfigError

__all__ = ["LlamaConfig"]

SUPPORTED = "supported: llama (LlamaForCausalLM)"


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that decides the shape and the arithmetic of a Llama model.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: sizes in elements.
        max_position_embeddings: the context in tokens.
        rms_norm_eps: added to the mean square before its root is taken.
        rope_theta: base of the rotary frequencies ``theta ** (-2 i / head_dim)``.
        rope_divisors: divides each of the ``head_dim / 2`` frequencies, or None. Linear and Llama 3 scaling both reduce
            to this.
        tie_word_embeddings: the output projection is the embedding table.
        attention_bias, mlp_bias: whether those projections carry a bias.

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
    mlp_bias: bool = False

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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From the dictionary in a Hugging Face ``config.json``, as transformers 4 and 5 write it.

        Raises:
            ConfigError: another architecture, a missing key, a rotary scaling or activation that is not supported.
        """
        model_type = config.get("model_type")
        if model_type != "llama":
            named = config.get("architectures") or model_type
            raise ConfigError(f"unknown architecture {named!r} in config.json; {SUPPORTED}")
        if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ConfigError(f"unsupported hidden_act {activation!r} in config.json; supported: silu")

        num_heads = int(_require(config, "num_attention_heads", "config.json"))
        hidden_size = int(_require(config, "hidden_size", "config.json"))
        head_dim = int(config.get("head_dim") or hidden_size // num_heads)
        max_positions = int(config.get("max_position_embeddings", 2048))
        # transformers 5 writes rope_parameters; 4 wrote rope_theta beside rope_scaling.
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        return cls(
            vocab_size=int(_require(config, "vocab_size", "config.json")),
            hidden_size=hidden_size,
            intermediate_size=int(_require(config, "intermediate_size", "config.json")),
            num_layers=int(_require(config, "num_hidden_layers", "config.json")),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_divisors=_rope_divisors(rope, theta, head_dim, max_positions),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
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
            raise ConfigError(f"unknown architecture {architecture!r} in the GGUF file; {SUPPORTED}")
        if metadata.get("llama.expert_count"):
            raise ConfigError(f"unknown architecture: a mixture of experts in the GGUF file; {SUPPORTED}, dense only")

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
