"""Which sequences decode, how far they are, and what their caller was not told yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..interrupts import Uninterrupted
from ..kv_cache import KVCache
from .map_ahead import MapAhead
from .state import DecodedToken
from .step import LaunchedStep

__all__ = ["Live", "Progress"]


@dataclass(eq=False)
class Live:
    """A sequence that is decoding: once the launched steps have run, it has ``rows`` rows of at most ``limit``.

    ``version`` is that of its slot: another one there means that the sequence is not what the loop takes it for.
    """

    slot: int
    rows: int
    limit: int
    version: int


class Progress:
    """The books of a decode loop. Its caller puts signals off where a sequence is moved from one list to another.

    Args:
        cache: holds the sequences.
        mapper: maps rows ahead of them.
        stream: of the steps; None on the CPU.

    Attributes:
        live: by slot.
        unreported: tokens that were read and not reported.
    """

    def __init__(self, cache: KVCache, mapper: MapAhead, stream: torch.cuda.Stream | None) -> None:
        self._cache, self._mapper, self._stream = cache, mapper, stream
        self.live: dict[int, Live] = {}
        self.unreported: list[DecodedToken] = []
        self.under_way: deque[tuple[tuple[Live, ...], LaunchedStep]] = deque()
        self._ended: dict[int, Live] = {}  # the last sequence of each slot, which has exactly its rows

    def begin(self, slot: int, rows: int, limit: int, version: int) -> None:
        """A sequence decodes from now on; row ``rows`` is mapped already."""
        self._mapper.track(slot, rows + 1, limit, version)
        self.live[slot] = Live(slot, rows, limit, version)
        self._ended.pop(slot, None)

    def due(self, slots: Collection[int] | None) -> tuple[Live, ...]:
        """Those (of these slots, or of all) that have rows to come."""
        if slots is None:
            return tuple(each for each in self.live.values() if each.rows < each.limit)
        found = [self.live.get(slot) for slot in dict.fromkeys(slots)]
        return tuple(each for each in found if each is not None and each.rows < each.limit)

    def launched(self, sequences: tuple[Live, ...], step: LaunchedStep) -> None:
        """A step of these is under way."""
        self.under_way.append((sequences, step))
        for sequence in sequences:
            sequence.rows += 1

    def drain(self, keep: int, read: Callable[[LaunchedStep], Sequence[DecodedToken]]) -> None:
        """Read what steps sampled, up to the newest ``keep`` of them."""
        while len(self.under_way) > keep:
            sequences, launched = self.under_way[0]
            sampled = read(launched)
            with Uninterrupted():
                self.under_way.popleft()
                for sequence, token in zip(sequences, sampled, strict=True):
                    if self.live.get(sequence.slot) is not sequence:  # ended, or cancelled
                        continue
                    self.unreported.append(token)
                    if token.finish_reason is not None:
                        self._hand_back(sequence)

    def report(self) -> list[DecodedToken]:
        """What was not reported yet; from now on it was."""
        tokens, self.unreported = self.unreported, []
        return tokens

    def cancel(self, slot: int) -> None:
        """The slot's sequence ends with the tokens that were reported."""
        num_dropped = sum(token.slot == slot for token in self.unreported)
        self.unreported = [token for token in self.unreported if token.slot != slot]
        live = self.live.get(slot)
        if live is not None:
            self._hand_back(live, num_dropped)
        elif num_dropped and (ended := self._ended.get(slot)):  # which its caller was not told yet
            ended.rows -= num_dropped
            self._cut(ended)

    def forget(self, slots: list[int]) -> None:
        """These sequences are gone; their slots are left to whoever has them."""
        for slot in slots:
            del self.live[slot]
            self._mapper.forget(slot)
        self.unreported = [token for token in self.unreported if token.slot not in slots]

    def _hand_back(self, sequence: Live, num_dropped: int = 0) -> None:
        """A sequence has ended: leave its slot with its rows, but for those of tokens that are dropped."""
        del self.live[sequence.slot]
        self._mapper.forget(sequence.slot)
        num_under_way = sum(sequence in sequences for sequences, _ in self.under_way)
        sequence.rows -= num_under_way + num_dropped
        self._ended[sequence.slot] = sequence
        self._cut(sequence)

    def _cut(self, sequence: Live) -> None:
        """What was mapped past its rows goes when the GPU is past it."""
        # ConfigError: the slot was released or truncated, or the cache closed, behind the loop's back.
        with (
            suppress(ConfigError),
            torch.cuda.stream(self._stream),
            self._cache.step([sequence.slot], versions=[sequence.version]),
        ):
            self._cache.truncate(sequence.slot, sequence.rows)
            sequence.version = int(self._cache.versions([sequence.slot])[0])
