"""Which rows of the cache a forward pass computes, by lengths that the host knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from ..errors import ConfigError
from ..memory.tensors import upload

__all__ = ["INT32_MAX", "AttentionBatch", "QueryGroup"]

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class QueryGroup:
    """The sequences of a batch that have equally many new tokens, for kernels that want a rectangle of queries.

    Attributes:
        query_len: new tokens of each.
        tokens: ``[num_sequences * query_len]`` int64, where their new tokens lie on the packed token axis.
        slots: ``[num_sequences]`` int32.
        ends: ``[num_sequences]`` int32, one past each sequence's last row in its slot.
        starts: ``[num_sequences]`` int32, or None where every sequence starts in row 0.
    """

    query_len: int
    tokens: torch.Tensor
    slots: torch.Tensor
    ends: torch.Tensor
    starts: torch.Tensor | None


@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens of which sequences one forward pass computes. Packed: no padding, prefill and decode alike.

    The lengths are host integers, because the cache is grown on the host before the work is launched; kernels take them
    from the tensors below, made on first use and kept, so that all layers of a pass share one upload.

    Attributes:
        slots: the cache slot of each sequence; no slot twice.
        query_lens: new tokens of each sequence in this pass, at least 1.
        seq_lens: K and V rows of each sequence *including* its new tokens, which are its last ``query_lens[i]`` rows.
        device: where the index tensors live.
        starts: the row of its slot that each sequence starts in, where padding lies before it; rows and lengths count
            from there. None: all in row 0.

    Raises:
        ConfigError: lengths that disagree, or a slot listed twice.
    """

    slots: tuple[int, ...]
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    device: torch.device
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.slots) == len(self.query_lens) == len(self.seq_lens) or not self.slots:
            raise ConfigError(
                f"expected one query length and one sequence length per slot and at least one slot, got "
                f"{len(self.slots)} slots, {len(self.query_lens)} query lengths, {len(self.seq_lens)} sequence lengths"
            )
        if self.starts is not None and (len(self.starts) != len(self.slots) or min(self.starts) < 0):
            raise ConfigError(f"expected one start of at least 0 per slot, got {self.starts} for {self.slots}")
        if len(set(self.slots)) != len(self.slots):
            raise ConfigError(f"expected every slot once, got {self.slots}")
        for slot, query_len, seq_len in zip(self.slots, self.query_lens, self.seq_lens, strict=True):
            if not 1 <= query_len <= seq_len:
                raise ConfigError(f"slot {slot}: expected 1 <= query_len <= seq_len, got {query_len} and {seq_len}")

    @classmethod
    def build(
        cls, slots: Sequence[int], query_lens: Sequence[int], seq_lens: Sequence[int], device: torch.device | str
    ) -> AttentionBatch:
        """The same from any sequences of integers."""
        return cls(tuple(slots), tuple(query_lens), tuple(seq_lens), torch.device(device))

    @property
    def batch_size(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences: the length of the packed token axis."""
        return self.query_starts[-1]

    @cached_property
    def max_query_len(self) -> int:
        return max(self.query_lens)

    @cached_property
    def max_seq_len(self) -> int:
        return max(self.seq_lens)

    @property
    def rows(self) -> tuple[slice, ...]:
        """The rows of its slot that each sequence has."""
        return tuple(slice(end - n, end) for end, n in zip(self.ends, self.seq_lens, strict=True))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """One past each sequence's last row in its slot: ``seq_lens``, plus ``starts`` where there are any."""
        if self.starts is None:
            return self.seq_lens
        return tuple(start + seq_len for start, seq_len in zip(self.starts, self.seq_lens, strict=True))

    @cached_property
    def query_starts(self) -> tuple[int, ...]:
        """``batch_size + 1`` offsets into the packed token axis: where each sequence begins, and the end."""
        return tuple(accumulate(self.query_lens, initial=0))

    @cached_property
    def slots_int32(self) -> torch.Tensor:
        """``[batch]`` int32."""
        return self._upload(self.slots, torch.int32)

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        """``[batch + 1]`` int32: ``query_starts`` on the device."""
        return self._upload(self.query_starts, torch.int32)

    @cached_property
    def seq_lens_int32(self) -> torch.Tensor:
        """``[batch]`` int32."""
        return self._upload(self.seq_lens, torch.int32)

    @cached_property
    def max_end(self) -> int:
        """One past the highest row of any sequence."""
        return max(self.ends)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all sequences have equally many new tokens."""
        return len(set(self.query_lens)) == 1

    @cached_property
    def ends_int32(self) -> torch.Tensor:
        """``[batch]`` int32."""
        return self.seq_lens_int32 if self.starts is None else self._upload(self.ends, torch.int32)

    @cached_property
    def starts_int32(self) -> torch.Tensor | None:
        """``[batch]`` int32, or None where every sequence starts in row 0."""
        return None if self.starts is None else self._upload(self.starts, torch.int32)

    @cached_property
    def token_slots(self) -> torch.Tensor:
        """``[num_tokens]`` int64: the slot of each packed token."""
        return self._upload(np.repeat(self.slots, self.query_lens), torch.int64)

    @cached_property
    def token_positions(self) -> torch.Tensor:
        """``[num_tokens]`` int64: the row of each packed token in its sequence."""
        rows = [np.arange(total - n, total) for n, total in zip(self.query_lens, self.seq_lens, strict=True)]
        return self._upload(np.concatenate(rows), torch.int64)

    @cached_property
    def last_tokens(self) -> torch.Tensor:
        """``[batch]`` int64: where each sequence's last new token lies on the packed token axis."""
        return self._upload([end - 1 for end in self.query_starts[1:]], torch.int64)

    @cached_property
    def groups_by_query_len(self) -> tuple[QueryGroup, ...]:
        """The batch's sequences by their number of new tokens, fewest first; each group in the batch's order."""
        members: dict[int, list[int]] = {}
        for i, query_len in enumerate(self.query_lens):
            members.setdefault(query_len, []).append(i)
        return tuple(
            QueryGroup(
                query_len,
                self._upload([self.query_starts[i] + j for i in group for j in range(query_len)], torch.int64),
                self._upload([self.slots[i] for i in group], torch.int32),
                self._upload([self.ends[i] for i in group], torch.int32),
                None if self.starts is None else self._upload([self.starts[i] for i in group], torch.int32),
            )
            for query_len, group in sorted(members.items())
        )

    def decode_rectangle(self, window: int | None) -> tuple[slice, slice] | None:
        """The slots and rows that a decode step reads, where they are a rectangle; else None.

        Args:
            window: sliding window in tokens, or None.
        """
        if self._uniform_slots is None:
            return None
        end = self.seq_lens[0]
        return self._uniform_slots, slice(0 if window is None else max(0, end - window), end)

    @cached_property
    def _uniform_slots(self) -> slice | None:
        """The slots, where they are neighbours in order with equally many rows each and one new token."""
        first, end = self.slots[0], self.slots[0] + len(self.slots)
        if self.max_query_len != 1 or self.starts is not None or len(set(self.seq_lens)) != 1:
            return None
        return slice(first, end) if self.slots == tuple(range(first, end)) else None

    def row_starts(self, rows_per_slot: int) -> torch.Tensor:
        """``[batch + 1]`` int32: each sequence's first row on a token axis with ``rows_per_slot`` rows to a slot.

        Not in rising order; the last entry is where the last sequence ends. Made once for each ``rows_per_slot``.

        Raises:
            ConfigError: a row beyond 32 bits.
        """
        if rows_per_slot not in self._row_starts:
            starts = [slot * rows_per_slot + rows.start for slot, rows in zip(self.slots, self.rows, strict=True)]
            end = max(start + seq_len for start, seq_len in zip(starts, self.seq_lens, strict=True))
            if end > INT32_MAX:
                raise ConfigError(f"row {end} of the cache is beyond 32 bits ({rows_per_slot} rows to a slot)")
            self._row_starts[rows_per_slot] = self._upload([*starts, starts[-1] + self.seq_lens[-1]], torch.int32)
        return self._row_starts[rows_per_slot]

    @cached_property
    def _row_starts(self) -> dict[int, torch.Tensor]:
        return {}

    def _upload(self, values: Sequence[int] | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return upload(values, self.device, dtype)
