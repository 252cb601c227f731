"""FlashAttention-2 as it comes with torch: its variable-length forward, reading the cache as one long token axis."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .base import HALF, LEFT_PADDING, SINKS, Backend, apply_sinks, require_equal_head_dims
from .batch import INT32_MAX, AttentionBatch

__all__ = ["TorchVarlenAttention"]


class TorchVarlenAttention(Backend):
    """One call for a whole batch, prefill and decode mixed.

    ``[slot, row]`` flattens to one token axis because a slot's stride is a whole number of rows. Given ``seqused_k``,
    the kernel takes from ``cum_seq_k`` only where each sequence starts, so the starts may come in any order and with
    gaps. A decode step of equally long sequences goes to the forward for plain batches (``flash_decode``).

    Each load is predicated on the sequence's length: measured on an H100 (torch 2.11), by either forward unmapped pages
    right after the last row were not touched, and NaNs there reached no output.
    """

    name = "torch-varlen"
    captures_prompts = True
    features = frozenset({LEFT_PADDING, SINKS})
    mixed_head_dims = False
    dtypes = HALF
    min_capability = (8, 0)
    head_dim_multiple, max_head_dim = 8, 256

    def unavailable(self) -> str | None:
        return None if torch.backends.cuda.is_flash_attention_available() else "this torch has no FlashAttention"

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`vattn.attention.AttentionBackend`.

        Raises:
            ConfigError: more rows, over all slots, than the kernel's 32-bit indices reach; K and V heads that differ.
        """
        assert softcap is None, "declared in features"
        require_equal_head_dims(self, k, v)
        if sinks is None and (part := batch.decode_rectangle(window)) is not None:
            return flash_decode(q.unsqueeze(2), k[part].transpose(1, 2), v[part].transpose(1, 2), scale).squeeze(2)
        k_tokens, rows_per_slot = flatten(k)
        v_tokens, v_rows_per_slot = flatten(v)
        if rows_per_slot != v_rows_per_slot:
            raise ConfigError(f"{self.name}: K and V must have equal slot strides in rows")
        # Only keywords that torch 2.11 knows: 2.13 added block_table and num_splits.
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k_tokens,
            v_tokens,
            batch.cu_seqlens_q,
            batch.row_starts(rows_per_slot),
            batch.max_query_len,
            batch.max_seq_len,
            0.0,  # dropout
            True,  # causal, right-aligned
            False,  # no debug mask
            scale=scale,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=-1 if window is None else 0,
            seqused_k=batch.seq_lens_int32,
        )
        return out if sinks is None else apply_sinks(out, lse.transpose(0, 1), sinks)


def flash_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Equally long sequences: q ``[batch, heads, 1, head_dim]``, k and v ``[batch, kv_heads, rows, head_dim]`` of any
    strides.

    By name, because ``scaled_dot_product_attention`` may take cuDNN's kernel instead, which is prepared anew for each
    number of rows. The name is private; torch 2.11 to 2.13 have it."""
    return torch._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


def flatten(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A view of ``[slots, rows, heads, dim]`` as ``[tokens, heads, dim]``, and the tokens from one slot to the next.

    Raises:
        ConfigError: the slot stride is no multiple of the row stride, or the last token's index exceeds 32 bits.
    """
    num_slots, num_rows, num_heads, head_dim = tensor.shape
    slot_stride, row_stride, head_stride, element_stride = tensor.stride()
    rows_per_slot, rest = divmod(slot_stride, row_stride)
    if rest:
        raise ConfigError(
            f"torch-varlen: the slot stride must be a multiple of the row stride, got {slot_stride} and {row_stride}"
        )
    num_tokens = (num_slots - 1) * rows_per_slot + num_rows
    if num_tokens > INT32_MAX:
        raise ConfigError(
            f"torch-varlen counts rows in 32 bits: {num_slots} slots of {rows_per_slot} rows exceed {INT32_MAX}; use "
            f"fewer slots, a smaller max_seq_len or another attention backend"
        )
    strides = (row_stride, head_stride, element_stride)
    return tensor.as_strided((num_tokens, num_heads, head_dim), strides), rows_per_slot
