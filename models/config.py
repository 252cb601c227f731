"""The shape of a model of the Llama family. ``config_hf`` and ``config_gguf`` read it from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vattn.errors import ConfigError

__all__ = ["LARGEST", "LlamaConfig"]

# No model comes near. What a file says is checked against its tensors before anything is built; these bounds keep what
# is worked out before that (windows of each layer, divisors of each frequency) small.
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
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= largest:
                raise ConfigError(
                    f"model config: {name} must be a positive integer of at most {largest}, got {value!r}"
                )
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
            ConfigError: another architecture, a key that is missing or no value of its kind, or something that is not
                supported: a rotary scaling, an activation, experts, soft-capping, quantised weights, attention that is
                not causal, layers that differ from each other.
        """
        from .config_hf import read

        return read(config)

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

        What GGUF says through its tensors rather than its metadata comes as keyword arguments; ``rope_divisors`` are
        those of its ``rope_freqs``, to which the metadata may add a linear scaling.

        Raises:
            ConfigError: another architecture, a key that is missing or no value of its kind, or something that is not
                supported, as a rotary scaling or layers that differ from each other.
        """
        from .config_gguf import read

        return read(
            metadata,
            vocab_size=vocab_size,
            tie_word_embeddings=tie_word_embeddings,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            rope_divisors=rope_divisors,
        )
