"""A ``LlamaConfig`` from the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .config import LARGEST, LlamaConfig
from .config_hf import ELSEWHERE
from .fields import Fields

__all__ = ["read"]

_SUPPORTED = f"supported: llama; {ELSEWHERE}"

# Keys that, where they say anything but this, say that the model computes something else than this code does.
_REFUSED: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1,),
}


def read(
    metadata: Mapping[str, Any],
    *,
    vocab_size: int,
    tie_word_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
    rope_divisors: tuple[float, ...] | None,
) -> LlamaConfig:
    """See ``LlamaConfig.from_gguf``."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"unknown architecture {escaped(repr(architecture))} in the GGUF file; {_SUPPORTED}")
    fields = Fields({key: _of_all_layers(key, value) for key, value in metadata.items()}, "the GGUF metadata", "llama.")
    for key, plain in _REFUSED.items():
        value = fields.raw(key, None)
        if value is not None and value not in plain:
            raise ConfigError(
                f"a llama with {key} {escaped(repr(value))} in the GGUF file (a mixture of experts, or other "
                f"arithmetic) is not supported; {ELSEWHERE}"
            )

    num_heads = fields.integer("attention.head_count", maximum=LARGEST["num_heads"])
    hidden_size = fields.integer("embedding_length", maximum=LARGEST["hidden_size"])
    head_dim = fields.integer("attention.key_length", hidden_size // num_heads, maximum=LARGEST["head_dim"])
    value_dim = fields.integer("attention.value_length", head_dim)
    rope_dim = fields.integer("rope.dimension_count", head_dim)
    if not head_dim == value_dim == rope_dim:
        raise ConfigError(
            f"unsupported GGUF shapes: key length {head_dim}, value length {value_dim} and rotary dimensions "
            f"{rope_dim} must be equal"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=fields.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("context_length"),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", zero=True),
        rope_theta=fields.number("rope.freq_base", 10000.0),
        rope_divisors=_rope_divisors(fields, rope_divisors, head_dim),
        tie_word_embeddings=tie_word_embeddings,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def _rope_divisors(fields: Fields, divisors: tuple[float, ...] | None, head_dim: int) -> tuple[float, ...] | None:
    """What ``rope_freqs`` divides each frequency by, and a linear scaling on top, as llama.cpp computes it.

    There a scaling is linear unless it says otherwise, its factor may have the older key's name, and 0 stands for none.
    """
    kind = fields.raw("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ConfigError(
            f"unsupported rotary scaling {escaped(repr(kind))} in the GGUF file; supported: none, linear, and the "
            f"tensor rope_freqs; {ELSEWHERE}"
        )
    if divisors is not None and not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
        raise ConfigError("the GGUF file's rope_freqs must be finite and above 0")
    key = "rope.scale_linear" if fields.raw("rope.scaling.factor", None) is None else "rope.scaling.factor"
    factor = fields.number(key, 1.0, zero=True) or 1.0
    if kind == "none" or factor == 1.0:
        return divisors
    return tuple(divisor * factor for divisor in divisors or (1.0,) * (head_dim // 2))


def _of_all_layers(key: str, value: Any) -> Any:
    """The one value of an array that has it once for each layer."""
    if not isinstance(value, list) or not key.startswith("llama."):
        return value
    if not value or any(each != value[0] for each in value):
        raise ConfigError(f"the GGUF metadata: {key} differs between layers, which is not supported: {escaped(value)}")
    return value[0]
