"""Which sequences decode, how far they are, and what their caller was not told yet."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import require_int
from ..errors import ConfigError
from ..interrupts import Uninterrupted
from ..kv_cache import KVCache
from .map_ahead import MapAhead
from .state import CheckedStart, DecodedToken
from .step import LaunchedStep

__all__ = ["Live", "Progress"]


# The books of the open loops over each cache: a slot decodes in one of them at most.
_OF_CACHE: weakref.WeakKeyDictionary[KVCache, weakref.WeakSet[Progress]] = weakref.WeakKeyDictionary()


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
        own_slot: the loop's own, in which no sequence decodes.
        max_batch: sequences that decode together.
        max_seq_len: rows of a sequence.

    Attributes:
        live: by slot.
        unreported: tokens that were read and not reported.
        max_seq_len: rows of a sequence.
    """

    def __init__(
        self,
        cache: KVCache,
        mapper: MapAhead,
        stream: torch.cuda.Stream | None,
        own_slot: int,
        max_batch: int,
        max_seq_len: int,
    ) -> None:
        self._cache, self._mapper, self._stream = cache, mapper, stream
        self._own_slot, self._max_batch, self.max_seq_len = own_slot, max_batch, max_seq_len
        self.live: dict[int, Live] = {}
        self.unreported: list[DecodedToken] = []
        self.under_way: deque[tuple[tuple[Live, ...], LaunchedStep]] = deque()
        self._ended: dict[int, Live] = {}  # the last sequence of each slot, which has exactly its rows
        self._of_cache = _OF_CACHE.setdefault(cache, weakref.WeakSet())
        self._of_cache.add(self)

    def begin(
        self,
        starts: Sequence[CheckedStart],
        versions: Sequence[int] | None,
        write: Callable[[Sequence[CheckedStart], Sequence[int]], None],
    ) -> None:
        """Sequences decode from now on, all or none of them; the next row of each gets its page here.

        Args:
            versions: of their slots; None for those of now.
            write: called with ``starts`` and the rows that each has in the cache, on the stream of the steps, to tell
                the device.

        Raises:
            ConfigError, OutOfPages: as ``DecodeLoop.start``.
        """
        rows = [self._require_room(start.slot, start.max_new_tokens) for start in starts]
        slots = [start.slot for start in starts]
        if len(set(slots)) < len(slots):
            raise ConfigError(f"expected every slot once, got {slots}")
        num_live = len(self.live) + len(slots)
        if num_live > self._max_batch:
            raise ConfigError(f"{num_live} sequences exceed max_batch, {self._max_batch}")
        known = self._cache.versions(slots) if versions is None else np.array(versions, np.int64)
        # What a page shared with another sequence takes to become private, it takes here, before any step is open.
        self._cache.ensure_batch(slots, [n + 1 for n in rows], versions=known)
        try:
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self._cache.device))
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                write(starts, rows)
        except BaseException:
            for slot, n in zip(slots, rows, strict=True):
                self._cache.truncate(slot, n)
            raise
        for n, start, version in zip(rows, starts, known.tolist(), strict=True):
            limit = n + start.max_new_tokens
            self._mapper.track(start.slot, n + 1, limit, version)
            self.live[start.slot] = Live(start.slot, n, limit, version)
            self._ended.pop(start.slot, None)

    def due(self, slots: Collection[int] | None) -> tuple[Live, ...]:
        """Those (of these slots, or of all) that have rows to come."""
        if slots is None:
            return tuple(each for each in self.live.values() if each.rows < each.limit)
        found = [self.live.get(slot) for slot in dict.fromkeys(slots)]
        return tuple(each for each in found if each is not None and each.rows < each.limit)

    def launched(self, sequences: tuple[Live, ...], steps: Sequence[LaunchedStep]) -> None:
        """Steps of these are under way."""
        self.under_way.extend((sequences, step) for step in steps)
        for sequence in sequences:
            sequence.rows += len(steps)

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

    def release(self, slot: int, store: int) -> int:
        """As ``DecodeLoop.release``."""
        if slot == self._own_slot:
            raise ConfigError(f"slot {slot} is the loop’s own: close the loop to have it back")
        live = self.live.get(slot)
        with Uninterrupted():
            self.cancel(slot)
        versions = None if live is None else [live.version]  # the one that it has now
        caller = None if self._stream is None else torch.cuda.current_stream(self._cache.device)
        with (
            torch.cuda.stream(self._stream),
            self._cache.step([slot], versions=versions),
            torch.cuda.stream(caller),
        ):
            version = int(self._cache.versions([slot])[0])
            self._cache.store(slot, min(store, self._cache.seq_len(slot)))  # of either stream's work so far
        return version

    def close(self) -> None:
        """No slot is the loop's any more."""
        self.under_way.clear()
        self._of_cache.discard(self)

    def _require_room(self, slot: int, max_new_tokens: int) -> int:
        """Rows of a slot that no loop decodes in; ConfigError where one does, or it cannot take so many more."""
        slot = require_int("slot", slot, 0, self._cache.max_slots - 1)
        if slot in self.live or slot == self._own_slot:
            raise ConfigError(f"slot {slot} is {'decoding already' if slot in self.live else 'the loop’s own'}")
        if any(token.slot == slot for token in self.unreported):
            raise ConfigError(f"slot {slot} has tokens that were not reported yet: call step or drain first")
        for other in self._of_cache - {self}:
            if slot in other.live or slot == other._own_slot:
                raise ConfigError(f"slot {slot} belongs to another DecodeLoop: cancel it there first")
        rows = self._cache.seq_len(slot)
        if rows + max_new_tokens > self.max_seq_len:
            raise ConfigError(
                f"slot {slot} has {rows} rows; {max_new_tokens} new ones exceed the context of {self.max_seq_len}"
            )
        return rows

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
