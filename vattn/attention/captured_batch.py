"""Which rows of the cache a captured step or pass computes: lengths on the device, at addresses that stay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from ..memory.tensors import upload
from .batch import AttentionBatch

__all__ = ["DecodeBatch", "PromptBatch"]


class DecodeBatch(AttentionBatch):
    """One new token of each sequence; stands in for ``AttentionBatch`` where nothing may be read on the host.

    The tensors keep their addresses and change their content between replays. A slot may be listed several times:
    padding rows share one.

    Args:
        slots: ``[batch]`` int32.
        rows: ``[batch]`` int32, the row that each new token goes to.
        ends: ``[batch]`` int32, ``rows + 1``.
        max_end: no end is ever larger.
        tokens: ``[batch]`` int32, the new tokens' ids; None where the model gets their embeddings alone.

    Attributes:
        slots_int32, rows_int32, ends_int32, seq_lens_int32, tokens_int32: those tensors.
        cu_seqlens_q: ``[batch + 1]`` int32, 0 to batch.
    """

    rows_int32: torch.Tensor
    tokens_int32: torch.Tensor | None

    def __init__(
        self,
        slots: torch.Tensor,
        rows: torch.Tensor,
        ends: torch.Tensor,
        max_end: int,
        tokens: torch.Tensor | None = None,
    ) -> None:
        batch_size = slots.shape[0]
        # Frozen, like what it stands in for; most of these are made there on first use.
        vars(self).update(
            device=slots.device,
            slots_int32=slots,
            rows_int32=rows,
            tokens_int32=tokens,
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


class PromptBatch(AttentionBatch):
    """Parts of prompts, packed, up to a fixed number of tokens and of sequences; stands in for ``AttentionBatch`` in
    passes that are captured, where nothing may be read on the host.

    One tensor holds all that differs from pass to pass, so that a pass needs one upload. Its content changes between
    replays; the addresses stay.

    The tokens that only fill up the batch are one more sequence, the last, with the one row of a slot that nobody uses.
    Aligned to the right, all of them but one see no row at all, of which kernels make zeros.

    Args:
        num_tokens: of a pass, those that fill it up included.
        max_sequences: of a pass.
        max_end: no end is ever larger.
        device: where the tensors live.

    Attributes:
        tokens, token_slots, token_positions: ``[num_tokens]`` int32.
        slots_int32, ends_int32, seq_lens_int32: ``[max_sequences + 1]`` int32.
        cu_seqlens_q: ``[max_sequences + 2]`` int32.
    """

    tokens: torch.Tensor

    def __init__(self, num_tokens: int, max_sequences: int, max_end: int, device: torch.device) -> None:
        sizes = (num_tokens,) * 3 + (max_sequences + 1,) * 2 + (max_sequences + 2,)
        content = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        tokens, token_slots, token_positions, slots, ends, query_starts = content.split(sizes)
        # Frozen, like what it stands in for; most of these are made there on first use.
        vars(self).update(
            content=content,
            device=device,
            tokens=tokens,
            token_slots=token_slots,
            token_positions=token_positions,
            slots_int32=slots,
            ends_int32=ends,
            seq_lens_int32=ends,
            cu_seqlens_q=query_starts,
            starts=None,
            starts_int32=None,
            max_end=max_end,
            max_seq_len=max_end,
            max_query_len=num_tokens,
            is_uniform=False,
        )

    def fill(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], ends: Sequence[int], spare_slot: int) -> None:
        """What the next pass computes, on the current stream.

        Args:
            slots: of the sequences.
            tokens: the new ones of each, which go to its last rows.
            ends: rows of each, the new ones included.
            spare_slot: whose row 0 takes what only fills up the pass.
        """
        num_tokens, num_sequences = len(self.tokens), len(self.slots_int32)
        lens = [len(each) for each in tokens]
        total = sum(lens)
        content = np.zeros(len(self.content), np.int32)  # type: ignore[attr-defined]
        ids, token_slots, rows = content[: 3 * num_tokens].reshape(3, num_tokens)
        of_slots, of_ends, starts = np.split(content[3 * num_tokens :], [num_sequences, 2 * num_sequences])
        token_slots[:], of_slots[:], of_ends[:], starts[:] = spare_slot, spare_slot, 1, total
        ids[:total] = [token for each in tokens for token in each]
        token_slots[:total] = np.repeat(slots, lens)
        if total:
            rows[:total] = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, lens, strict=True)])
        of_slots[: len(slots)], of_ends[: len(slots)] = slots, ends
        starts[: len(slots) + 1] = [0, *accumulate(lens)]
        starts[-1] = num_tokens
        self.content.copy_(upload(content, self.device))  # type: ignore[attr-defined]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def row_starts(self, rows_per_slot: int) -> torch.Tensor:
        """As ``AttentionBatch.row_starts``; the last entry is read by nothing."""
        starts = self.slots_int32 * rows_per_slot
        return torch.cat([starts, starts[-1:]])

    def decode_rectangle(self, window: int | None) -> None:
        """None: a captured pass serves sequences of any length."""
        return

    # What backends ask that loop over sequences on the host: outside a graph only, and they wait for the device. Of
    # the sequences that a pass was filled with, and nothing of what fills it up.
    @property
    def query_lens(self) -> tuple[int, ...]:
        return tuple(n for n in self.cu_seqlens_q.diff().tolist()[:-1] if n)

    @property
    def query_starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.query_lens, initial=0))

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(self.slots_int32.tolist()[: len(self.query_lens)])

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(self.ends_int32.tolist()[: len(self.query_lens)])

    @property
    def ends(self) -> tuple[int, ...]:
        return self.seq_lens

    @property
    def rows(self) -> tuple[slice, ...]:
        return tuple(slice(0, end) for end in self.seq_lens)
