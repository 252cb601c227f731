"""Which slot holds what, and how long it is; and what callers say of slots, checked against that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arguments import int_array, require_int
from ..driver import Driver
from ..errors import ConfigError
from .lock import FairLock

# Retired: ended while a step is open on it. Stored: ended, its rows kept for others; nobody's, as a free one.
FREE, LIVE, RETIRED, STORED = range(4)


class SlotStates:
    """The half of ``Slots`` that only looks.

    Attributes:
        lock: the cache's; it guards all of this.
        state: per slot, FREE, LIVE, RETIRED or STORED.
        seq_len: per slot, rows backed on request; of a stored sequence, those that are left.
        reach: per slot, rows that it can grow to without a driver call: mapped, private, and no one else's data.
        generation: per slot, how many sequences it has had.
        num_cut: per slot, how often rows were taken from a sequence.
    """

    def __init__(self, driver: Driver, max_slots: int, max_seq_len: int, lock: FairLock) -> None:
        self.driver = driver
        self.max_slots, self.max_seq_len = max_slots, max_seq_len
        self.lock = lock
        self.state = np.zeros(max_slots, np.int8)
        self.seq_len, self.reach, self.generation, self.num_cut = np.zeros((4, max_slots), np.int64)
        lock.snapshot = self.generation.copy

    def with_state(self, state: int) -> list[int]:
        return np.flatnonzero(self.state == state).tolist()

    def version_of(self, slots: np.ndarray) -> np.ndarray:
        """Per slot, a number that never comes again once its sequence has ended or lost rows; -1 where none is."""
        return np.where(self.state[slots] == LIVE, self.generation[slots] + self.num_cut[slots], -1)

    def _changed_hands(self, slots: int | np.ndarray) -> bool | np.ndarray:
        """Whether the slots have other sequences than when this call first left the lock to wait for the GPU."""
        before = None if self.lock.call is None else self.lock.call.before
        return False if before is None else before[slots] != self.generation[slots]

    def refuse_capture(self, what: str) -> None:
        """ConfigError while the current stream is captured into a graph."""
        if self.driver.is_capturing():
            raise ConfigError(
                f"{what} cannot be part of a graph: call ensure, fork, truncate and release before capture"
            )

    # -- arguments -----------------------------------------------------------------------------------------------
    def number(self, slot: int) -> int:
        """A slot's number as a plain int; ConfigError if there is no such slot."""
        return require_int("slot", slot, 0, self.max_slots - 1)

    def live(self, slot: int) -> int:
        """A slot with a sequence; ConfigError otherwise."""
        slot = self.number(slot)
        if self.state[slot] != LIVE or self._changed_hands(slot):
            raise ConfigError(f"slot {slot} holds no sequence: it was released, or never acquired")
        return slot

    def existing(self, named: Sequence[int] | np.ndarray) -> np.ndarray:
        """Slots that there are, as an int64 array; ConfigError otherwise."""
        index = int_array("slots", named)
        if index.size and (index.min() < 0 or index.max() >= self.max_slots):
            wrong = index[(index < 0) | (index >= self.max_slots)][0]
            raise ConfigError(f"slots must be at least 0 and at most {self.max_slots - 1}, got {wrong}")
        return index

    def all_live(
        self, named: Sequence[int] | np.ndarray, versions: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """Slots with sequences, each named once, as an int64 array.

        Raises:
            ConfigError: one is not so, or is of another version than ``versions`` says.
        """
        index = self.existing(named)
        if not index.size:
            return index
        live = (self.state[index] == LIVE) & ~np.asarray(self._changed_hands(index))
        if not live.all():
            raise ConfigError(f"slot {index[~live][0]} holds no sequence: it was released, or never acquired")
        twice = np.bincount(index)[index] > 1
        if twice.any():
            raise ConfigError(f"slot {index[twice][0]} is listed twice")
        if versions is not None:
            expected = int_array("versions", versions)
            if expected.shape != index.shape:
                raise ConfigError(f"slots and versions must be of one length, got {index.size} and {expected.size}")
            changed = self.version_of(index) != expected
            if changed.any():
                raise ConfigError(f"slot {index[changed][0]} has another sequence than it had, or has lost rows")
        return index

    def rows_of(self, slot: int, seq_len: int, operation: str) -> int:
        """Rows that a live slot has; ConfigError, in the operation's name, if it has fewer."""
        rows = require_int("seq_len", seq_len, 0)
        if rows > self.seq_len[slot]:
            raise ConfigError(f"{operation}: slot {slot} has {self.seq_len[slot]} rows, so {rows} is too many")
        return rows

    def lengths(self, slots: np.ndarray, seq_lens: Sequence[int] | np.ndarray) -> np.ndarray:
        """A length for each of some slots, as an int64 array; ConfigError if one is too long or too many are given."""
        rows = int_array("seq_lens", seq_lens)
        if slots.shape != rows.shape:
            raise ConfigError(f"slots and seq_lens must be of one length, got {slots.size} and {rows.size}")
        wrong = rows[(rows < 0) | (rows > self.max_seq_len)]
        if wrong.size:
            raise ConfigError(f"seq_lens must be at least 0 and at most {self.max_seq_len}, got {wrong[0]}")
        return rows
