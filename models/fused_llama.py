"""A Llama as the runtime computes it: decode steps and prefill passes of fused operations over merged weights.

The weights are ``Llama``'s: Q, K and V projections are merged into one matrix, gate and up into another, and the
model's own parameters become views of them. ``Llama.forward`` computes the same without any of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from vattn.attention import AttentionBackend, AttentionBatch, DecodeBatch
from vattn.attention.rope_decode import rope_attention, rope_decode
from vattn.errors import ConfigError
from vattn.ops.merge import adopt, merge
from vattn.ops.ops_table import Ops
from vattn.ops.rope_append import rope_table
from vattn.tuning import default_ops

from .config import LlamaConfig
from .llama import DecoderLayer, Llama
from .ways import Compute, ways_of

if TYPE_CHECKING:
    from vattn.kv_cache import KVCache
    from vattn.layout import KVLayout

__all__ = ["FusedLlama", "products"]

_LARGE = 2048  # tokens of prompts: copying what attention makes of them takes longer than a product for the other rows


@dataclass(frozen=True)
class _Layer:
    norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    window: int | None


class FusedLlama:
    """What ``Engine`` and ``DecodeLoop`` run.

    Args:
        model: its projections are merged in place; it goes on working.
        max_seq_len: positions that rotary embeddings are tabled for; None: the model's context.
        ops: the operations; None: fused on a GPU, else their references.

    Raises:
        ConfigError: the model is another class's.
    """

    def __init__(self, model: Llama, max_seq_len: int | None = None, ops: Ops | None = None) -> None:
        if not isinstance(model, Llama):
            raise ConfigError(
                f"FusedLlama takes vattn's own Llama, as vattn.models.load(folder)[0] is, not a {type(model).__name__}"
            )
        self.model = model
        self.config = model.config
        self.ops = default_ops(model.device, model.dtype) if ops is None else ops
        self.max_seq_len = model.config.max_position_embeddings if max_seq_len is None else max_seq_len
        self.table = rope_table(model.rope.frequencies.to(model.device), self.max_seq_len)
        self.layers = [
            _Layer(
                norm=layer.input_layernorm.weight,
                qkv=_merge(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                qkv_bias=_merge_bias(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                q_norm=None if layer.self_attn.q_norm is None else layer.self_attn.q_norm.weight,
                k_norm=None if layer.self_attn.k_norm is None else layer.self_attn.k_norm.weight,
                o=layer.self_attn.o_proj.weight,
                o_bias=layer.self_attn.o_proj.bias,
                mlp_norm=layer.post_attention_layernorm.weight,
                gate_up=_merge(layer.mlp.gate_proj, layer.mlp.up_proj),
                gate_up_bias=_merge_bias(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=layer.mlp.down_proj.weight,
                down_bias=layer.mlp.down_proj.bias,
                window=layer.self_attn.window,
            )
            for layer in (cast(DecoderLayer, each) for each in model.layers)
        ]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.config.num_heads

    def require_fit(self, cache: KVCache) -> None:
        """Refuse a cache of another shape, and weights that have moved since they were merged.

        Raises:
            ConfigError: says what differs.
        """
        config, layout = self.config, cache.layout
        groups = {(group.num_kv_heads, group.head_dim, group.v_head_dim or group.head_dim) for group in layout.groups}
        wanted = (config.num_kv_heads, config.head_dim, config.head_dim)
        if list(layout.layers) != list(range(config.num_layers)) or groups != {wanted}:
            raise ConfigError(
                f"the cache has {len(layout.layers)} layers of (KV heads, K and V head sizes) {sorted(groups)}, the "
                f"model {config.num_layers} of {wanted}; open the cache with model.kv_layout()"
            )
        merged, now = self.layers[0].qkv, self.model.layers[0].self_attn.q_proj.weight  # type: ignore[union-attr]
        if merged.data_ptr() != now.data_ptr():  # type: ignore[operator]
            raise ConfigError("the model was moved or converted since FusedLlama merged its weights; make a new one")
        if merged.device != cache.device:
            raise ConfigError(f"the model is on {merged.device}, the cache on {cache.device}")

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.dtype

    def kv_layout(
        self, max_seq_len: int | None = None, dtype: torch.dtype | None = None, order: str = "token"
    ) -> KVLayout:
        """``Llama.kv_layout``; ``max_seq_len`` None: the positions that this computes."""
        return self.model.kv_layout(self.max_seq_len if max_seq_len is None else max_seq_len, dtype, order)

    @property
    def embedding(self) -> torch.Tensor:
        """``[vocab_size, hidden_size]``, what tokens are looked up in."""
        return self.model.embed_tokens.weight

    def decode(
        self, residual: torch.Tensor, batch: DecodeBatch, cache: KVCache, attention: AttentionBackend
    ) -> torch.Tensor:
        """Logits of one new token of each sequence; appends its K and V.

        Args:
            residual: ``[batch, hidden_size]``, the tokens' embeddings; used up.
            batch: slots and rows, on the device.
            cache: has rows ``[0, row]`` of every slot backed and writable.
            attention: reads them.

        Returns:
            ``[batch, vocab_size]`` in the weights' dtype.
        """
        x = self._layers(residual, batch.slots_int32, batch.rows_int32, cache, [(batch, attention)])
        return self.ops.linear(x, self.model.output_weight, whole=True)

    def ways(self, batch: int, cache: KVCache) -> dict[str, Compute]:
        """``decode`` over a cache: without programmatic dependent launch, with it where the operations have it, and as
        one persistent kernel where there is one; see ``vattn.decode.OffersWays``."""
        return ways_of(self, batch, cache)

    def prefill(self, tokens: torch.Tensor, batch: AttentionBatch, cache: KVCache, attention: AttentionBackend) -> None:
        """Compute the new tokens of a batch and append their K and V. Nothing else: the last layer stops there.

        Args:
            tokens: ``[T]`` int64, the new tokens of all sequences, packed in the batch's order.
            batch: slots and lengths.
            cache: has rows ``[0, seq_len)`` of every sequence backed and writable, all but the new ones computed.
            attention: reads them.

        Raises:
            ConfigError: another number of tokens than the batch has, rows of padding, or a row beyond ``max_seq_len``.
        """
        self._check_prefill(tokens, batch)
        residual, slots, rows = F.embedding(tokens, self.embedding), batch.token_slots, batch.token_positions
        self._layers(residual, slots, rows, cache, [(batch, attention)], num_prefill=batch.num_tokens)

    def prefill_and_decode(
        self,
        tokens: torch.Tensor,
        prefill: AttentionBatch,
        prefill_attention: AttentionBackend,
        residual: torch.Tensor,
        decode: DecodeBatch,
        decode_attention: AttentionBackend,
        cache: KVCache,
    ) -> torch.Tensor:
        """``prefill`` and ``decode`` in one pass, which reads the weights once.

        Args:
            tokens, prefill, prefill_attention: as for ``prefill``.
            residual, decode, decode_attention: as for ``decode``; of other slots.
            cache: as for both.

        Returns:
            ``[batch, vocab_size]``, the logits of ``decode``.

        Raises:
            ConfigError: as for ``prefill``.
        """
        self._check_prefill(tokens, prefill)
        residual = torch.cat((F.embedding(tokens, self.embedding), residual))
        slots = torch.cat((prefill.token_slots, decode.slots_int32))
        rows = torch.cat((prefill.token_positions, decode.rows_int32))
        parts = [(prefill, prefill_attention), (decode, decode_attention)]
        x = self._layers(residual, slots, rows, cache, parts, num_prefill=len(tokens))
        return self.ops.linear(x, self.model.output_weight, whole=True)

    def _layers(
        self,
        residual: torch.Tensor,
        slots: torch.Tensor,
        rows: torch.Tensor,
        cache: KVCache,
        parts: list[tuple[AttentionBatch, AttentionBackend]],
        num_prefill: int = 0,
    ) -> torch.Tensor:
        """All layers; appends K and V of every token.

        Args:
            residual: ``[tokens, hidden_size]``, embeddings; used up.
            slots, rows: ``[tokens]`` int, of each token.
            parts: (batch, attention), of all tokens in order.
            num_prefill: the first tokens, a part by themselves, of which nobody asks more than K and V.

        Returns:
            ``[tokens - num_prefill, hidden_size]``, what the output projection takes.
        """
        ops, eps, head_dim = self.ops, self.config.rms_norm_eps, self.config.head_dim
        # Every write to older rows, lengths and slots has ended before the first norm lets a product begin.
        one_kernel = rope_attention(parts, early=True) if ops.rope_in_attention and not num_prefill else None
        early = len(residual) == 1
        x = ops.add_rms_norm(None, residual, self.layers[0].norm, eps)
        for index, layer in enumerate(self.layers):
            k, v = cache.k(index), cache.v(index)
            last = index + 1 == len(self.layers)
            qkv, qkv_bias = layer.qkv, layer.qkv_bias
            if last and num_prefill == len(x):  # nobody asks for queries either
                num_q = self.num_heads * head_dim
                qkv, qkv_bias = qkv[num_q:], None if qkv_bias is None else qkv_bias[num_q:]
            product = ops.linear(x, qkv, qkv_bias)
            norms = layer.q_norm, layer.k_norm, eps
            options: dict[str, Any] = {"scale": head_dim**-0.5, "window": layer.window}
            if one_kernel is not None:
                batch = parts[0][0]
                out = [rope_decode(one_kernel, product, self.table, k, v, *norms, batch, **options, early=early)]
            else:
                q = ops.rope_append(product, self.table, slots, rows, k, v, *norms)
                if last and num_prefill:
                    q, residual, parts = q[num_prefill:], residual[num_prefill:], parts[1:]
                    if not parts:
                        return residual
                out = [
                    attention(of_part, k, v, batch, **options)
                    for of_part, (batch, attention) in zip(
                        q.split([b.num_tokens for b, _ in parts]), parts, strict=True
                    )
                ]
            if len(out) > 1 and num_prefill < _LARGE:
                out = [torch.cat(out)]
            following = self.model.norm.weight if last else self.layers[index + 1].norm
            attended = [of_part.flatten(-2) for of_part in out]
            x = self._add(attended, layer.o, layer.o_bias, residual, layer.mlp_norm, num_prefill > 0)
            x = ops.linear_swiglu(x, layer.gate_up, layer.gate_up_bias)
            x = self._add([x], layer.down, layer.down_bias, residual, following, num_prefill > 0)
        return x

    def _add(
        self,
        parts: list[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        norm: torch.Tensor,
        many: bool,
    ) -> torch.Tensor:
        """Add a product of all tokens' parts to the residual stream; returns the norm of that. ``many``: there are many
        tokens."""
        product = None
        if many:
            for part, stream in zip(parts, residual.split([len(part) for part in parts]), strict=True):
                self.ops.linear_add(part, weight, stream, bias)
        else:
            (x,) = parts
            product = self.ops.linear(x, weight, bias)
        return self.ops.add_rms_norm(product, residual, norm, self.config.rms_norm_eps)

    def _check_prefill(self, tokens: torch.Tensor, batch: AttentionBatch) -> None:
        if batch.starts is not None:
            raise ConfigError("this model takes packed tokens: a batch without starts, that is without padding")
        if tokens.shape != (batch.num_tokens,):
            raise ConfigError(f"the batch has {batch.num_tokens} new tokens, got a tensor of shape {[*tokens.shape]}")
        if batch.max_end > self.max_seq_len:
            raise ConfigError(f"row {batch.max_end - 1} is beyond the model's context of {self.max_seq_len} tokens")


def products(config: LlamaConfig) -> list[tuple[int, int, str]]:
    """(outputs, inputs, kind) of every matrix product in a step; the kinds are those of ``measure_linear``."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    return [
        (heads + 2 * config.num_kv_heads * config.head_dim, hidden, "plain"),
        (hidden, heads, "plain"),
        (2 * config.intermediate_size, hidden, "swiglu"),
        (hidden, config.intermediate_size, "plain"),
        (config.vocab_size, hidden, "whole"),
    ]


def _merge(*projections: nn.Linear) -> torch.Tensor:
    """One matrix of several projections' outputs; their own weights become views of it."""
    return _merge_parameters([projection.weight for projection in projections])


def _merge_bias(*projections: nn.Linear) -> torch.Tensor | None:
    if projections[0].bias is None:
        return None
    return _merge_parameters([projection.bias for projection in projections])


def _merge_parameters(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    merged = merge(parameters)
    adopt(parameters, merged)
    return merged
