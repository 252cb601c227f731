"""A batch whose lengths live on the device, for decode steps inside a captured graph."""

from __future__ import annotations

import torch

from .base import AttentionBatch

__all__ = ["DecodeBatch"]


class DecodeBatch(AttentionBatch):
    """One new token of each sequence; stands in for ``AttentionBatch`` where nothing may be read on the host.

    The tensors keep their addresses and change their content between replays. A slot may be listed several times:
    padding rows share one.

    Args:
        slots: ``[batch]`` int32.
        rows: ``[batch]`` int32, the row that each new token goes to.
        ends: ``[batch]`` int32, ``rows + 1``.
        max_end: no end is ever larger.

    Attributes:
        slots_int32, rows_int32, ends_int32, seq_lens_int32: those tensors.
        cu_seqlens_q: ``[batch + 1]`` int32, 0 to batch.
    """

    rows_int32: torch.Tensor

    def __init__(self, slots: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, max_end: int) -> None:
        batch_size = slots.shape[0]
        # Frozen, like what it stands in for; most of these are made there on first use.
        vars(self).update(
            device=slots.device,
            slots_int32=slots,
            rows_int32=rows,
            ends_int32=ends,
            seq_lens_int32=ends,
            starts=None,
            starts_int32=None,
            max_end=max_end,
            max_seq_len=max_end,
            max_query_len=1,
            is_uniform=True,
            query_lens=(1,) * batch_size,
            query_starts=tuple(range(batch_size + 1)),
            cu_seqlens_q=torch.arange(batch_size + 1, dtype=torch.int32, device=slots.device),
        )

    @property
    def batch_size(self) -> int:
        return self.slots_int32.shape[0]

    def row_starts(self, rows_per_slot: int) -> torch.Tensor:
        """``[batch + 1]`` int32 as ``AttentionBatch.row_starts``; the last entry is read by nothing."""
        starts = self.slots_int32 * rows_per_slot
        return torch.cat([starts, starts[-1:]])

    def decode_rectangle(self, window: int | None) -> None:
        """None: a captured step serves sequences of any length."""
        return

    # What backends ask that loop over sequences on the host: outside a graph only, and they wait for the device.
    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(self.slots_int32.tolist())

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(self.ends_int32.tolist())

    @property
    def ends(self) -> tuple[int, ...]:
        return self.seq_lens

    @property
    def rows(self) -> tuple[slice, ...]:
        return tuple(slice(0, end) for end in self.seq_lens)
