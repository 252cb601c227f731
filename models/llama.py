"""The Llama family over a KV cache: packed tokens, no padding, prefill and decode through the same code.

Llama 2 and 3, Mistral (sliding windows), Qwen2 (biases, windows in some layers) and Qwen3 (normalised Q and K heads)
differ in what ``LlamaConfig`` says and in nothing else.

Shapes: T is the number of packed tokens of a pass, D the elements of a head. Parameters carry the names of Hugging Face
checkpoints without their leading ``model.``, so that weights load one to one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from vattn.attention import AttentionBackend, AttentionBatch
from vattn.errors import ConfigError
from vattn.layout import KVLayout, LayerGroup
from vattn.ops.host_linear import host_linear

from .config import LlamaConfig

if TYPE_CHECKING:
    from vattn.kv_cache import KVCache

    from .fused_llama import FusedLlama

__all__ = ["Llama"]


class Linear(nn.Linear):
    """``nn.Linear`` by the product that is fastest for packed tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return host_linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` with the statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class RotaryEmbedding:
    """Rotary position embeddings (Su et al. 2021) in the half-split convention of Hugging Face checkpoints."""

    def __init__(self, config: LlamaConfig) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        self.frequencies = 1.0 / config.rope_theta**exponents
        if config.rope_divisors is not None:
            self.frequencies /= torch.tensor(config.rope_divisors, dtype=torch.float32, device="cpu")

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions ``[T]`` -> cos and sin, each ``[T, 1, D]`` float32: bf16 holds no position above 256 exactly."""
        self.frequencies = self.frequencies.to(positions.device)  # moves once
        angles = positions[:, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair ``(x[i], x[i + D/2])`` of ``x [T, heads, D]`` by its angle, in float32 or wider."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention whose K and V live in the cache."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        cached_k, cached_v = cache.k(self.layer), cache.v(self.layer)
        rows = (batch.token_slots, batch.token_positions)
        cached_k.index_put_(rows, k.to(cached_k.dtype))
        cached_v.index_put_(rows, v.to(cached_v.dtype))
        out = attention(q, cached_k, cached_v, batch, scale=self.head_dim**-0.5, window=self.window)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, batch, cache, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A language model of the Llama family, for inference. ``Llama.random`` or ``vattn.models.load`` builds one.

    Constructed directly it has uninitialised parameters, on torch's current default device.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = RotaryEmbedding(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def random(
        cls,
        config: LlamaConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        std: float = 0.02,
    ) -> Llama:
        """A model of normally distributed weights, norms at one.

        Drawn on ``device``: the same seed gives other weights on another kind of device. Draw on the CPU and move the
        model with ``.to`` to compare devices.

        Args:
            std: standard deviation of every matrix.
        """
        with torch.device("meta"):
            model = cls(config)
        model.to(dtype).to_empty(device=device)
        generator = torch.Generator(device).manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=std, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
        return model

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embed_tokens.weight.device

    @property
    def output_weight(self) -> torch.Tensor:
        """``[vocab_size, hidden_size]``: the output projection, tied or not."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def streamed_weight_bytes(self) -> int:
        """Bytes of weights that every step reads whole: all but an embedding table that is only looked up in."""
        total = sum(p.numel() * p.element_size() for p in self.parameters())
        return total if self.config.tie_word_embeddings else total - self.embed_tokens.weight.nbytes

    def kv_layout(
        self, max_seq_len: int | None = None, dtype: torch.dtype | None = None, order: str = "token"
    ) -> KVLayout:
        """The cache layout for this model: a group of layers for each window.

        Args:
            max_seq_len: tokens a slot can ever hold; None for the model's context.
            dtype: of K and V; None for the model's own.
            order: ``"token"`` or ``"layer"``.
        """
        config = self.config
        by_window: dict[int | None, list[int]] = {}
        for layer in range(config.num_layers):
            by_window.setdefault(config.window(layer), []).append(layer)
        return KVLayout(
            groups=[
                LayerGroup(layers, config.num_kv_heads, config.head_dim, window=window)
                for window, layers in by_window.items()
            ],
            max_seq_len=config.max_position_embeddings if max_seq_len is None else max_seq_len,
            dtype=self.dtype if dtype is None else dtype,
            order=order,
        )

    def runtime(self, max_seq_len: int | None = None) -> FusedLlama:
        """This model as ``Engine`` and ``DecodeLoop`` run it. Merges projections in place; it goes on working.

        Args:
            max_seq_len: positions to compute at most; None for the model's context.
        """
        from .fused_llama import FusedLlama

        return FusedLlama(self, max_seq_len)

    def forward(
        self,
        tokens: torch.Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        attention: AttentionBackend,
        *,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Compute the new tokens of a batch and append their K and V to the cache.

        The rows ``[0, seq_len)`` of every sequence must be backed and writable (``cache.ensure``), all but the new ones
        already hold its past.

        Args:
            tokens: ``[T]`` int64, the new tokens of all sequences, packed in the batch's order.
            batch: slots and lengths.
            cache: holds K and V; written in place.
            attention: the backend that reads them.
            all_logits: logits of every new token and not only of each sequence's last.

        Returns:
            Logits in the weights' dtype, ``[batch, vocab_size]``; ``[T, vocab_size]`` with ``all_logits``.

        Raises:
            ConfigError: the batch has ``starts``: rows of padding.
        """
        if batch.starts is not None:
            raise ConfigError("this model takes packed tokens: a batch without starts, that is without padding")
        x = self.embed_tokens(tokens)
        cos, sin = self.rope(batch.token_positions)
        for layer in self.layers:
            x = layer(x, cos, sin, batch, cache, attention)
        if not all_logits:
            x = x[batch.last_tokens]
        return host_linear(self.norm(x), self.output_weight)
