"""The shape of a model of the Llama family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .config_files import LARGEST, read_gguf, read_hf

__all__ = ["LlamaConfig"]


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
        attention_output_bias: whether the projection after attention does; None: as ``attention_bias``.
        mlp_bias: whether the MLP's three projections do.
        qk_norm: normalise each Q and K head before its rotation.
        windows: for each layer, how many tokens a query sees, its own included, or None for all of them; None where no
            layer has a window.

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
        heads, kv_heads, dim, layers = self.num_heads, self.num_kv_heads, self.head_dim, self.num_layers
        num_divisors = None if self.rope_divisors is None else len(self.rope_divisors)
        windows = (None,) * layers if self.windows is None else self.windows
        bad = [each for each in windows if each is not None and (not isinstance(each, int) or each < 1)]
        for is_wrong, what in (
            (heads % kv_heads, f"num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}"),
            (dim % 2, f"rotary embeddings need an even head_dim, got {dim}"),
            (num_divisors not in (None, dim // 2), f"expected {dim // 2} rotary divisors, got {num_divisors}"),
            (len(windows) != layers, f"expected a window or None for each of {layers} layers, got {len(windows)}"),
            (bad, f"a window must be a positive integer or None, got {escaped(bad)}"),
        ):
            if is_wrong:
                raise ConfigError(f"model config: {what}")

    def window(self, layer: int) -> int | None:
        """How many tokens a query of that layer sees, None for all."""
        return None if self.windows is None else self.windows[layer]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From the dictionary in a Hugging Face ``config.json``, as transformers 4 and 5 write it.

        Raises:
            ConfigError: another architecture; a key that is missing or has a value of the wrong kind; anything that is
                not supported: a rotary scaling, an activation, experts, soft-capping, quantised weights, attention that
                is not causal, layers that differ from each other.
        """
        return cls(**read_hf(config))

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

        The keyword arguments are what a GGUF file says by its tensors and not by its metadata. ``rope_divisors`` are
        those of the tensor ``rope_freqs``; the metadata may add a linear scaling.

        Raises:
            ConfigError: another architecture; a key that is missing or has a value of the wrong kind; anything that is
                not supported, such as a rotary scaling or layers that differ from each other.
        """
        return cls(
            **read_gguf(metadata, rope_divisors),
            vocab_size=vocab_size,
            tie_word_embeddings=tie_word_embeddings,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
        )
