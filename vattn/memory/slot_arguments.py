"""What callers say of slots, checked against what the slots are; each function returns it in the form that is used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arguments import int_array, require_int
from ..errors import ConfigError, OutOfSlots
from .slots import LIVE, Slots

__all__ = ["existing_slots", "found_slot", "free_slot", "live_slot", "live_slots", "rows_of"]


def found_slot(slots: Slots, slot: int | None) -> int:
    """A slot that was looked for.

    Raises:
        OutOfSlots: there was none.
    """
    if slot is None:
        raise OutOfSlots(f"all {slots.max_slots} slots belong to sequences; release one, or raise max_slots")
    return slot


def free_slot(slots: Slots, slot: int) -> int:
    """A slot without a sequence.

    Raises:
        OutOfSlots: it has one.
        ConfigError: there is no such slot.
    """
    slot = require_int("slot", slot, 0, slots.max_slots - 1)
    if not slots.is_free(slot):
        raise OutOfSlots(f"slot {slot} belongs to a sequence; release it first, or take another")
    return slot


def live_slot(slots: Slots, slot: int) -> int:
    """A slot with a sequence; ConfigError otherwise."""
    slot = require_int("slot", slot, 0, slots.max_slots - 1)
    if slots.state[slot] != LIVE or slots.changed_hands(slot):
        raise ConfigError(f"slot {slot} holds no sequence: it was released, or never acquired")
    return slot


def existing_slots(slots: Slots, named: Sequence[int] | np.ndarray) -> np.ndarray:
    """Slots that there are, as an int64 array; ConfigError otherwise."""
    index = int_array("slots", named)
    if index.size and (index.min() < 0 or index.max() >= slots.max_slots):
        wrong = index[(index < 0) | (index >= slots.max_slots)][0]
        raise ConfigError(f"slots must be at least 0 and at most {slots.max_slots - 1}, got {wrong}")
    return index


def live_slots(
    slots: Slots, named: Sequence[int] | np.ndarray, versions: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Slots with sequences, each once, as an int64 array; ConfigError otherwise, also where its version is not that of
    ``versions``."""
    index = existing_slots(slots, named)
    if not index.size:
        return index
    live = (slots.state[index] == LIVE) & ~np.asarray(slots.changed_hands(index))
    if not live.all():
        raise ConfigError(f"slot {index[~live][0]} holds no sequence: it was released, or never acquired")
    order = np.arange(index.size)
    slots.marks[index] = order
    twice = slots.marks[index] != order
    if twice.any():
        raise ConfigError(f"slot {index[twice][0]} is listed twice")
    if versions is not None:
        expected = int_array("versions", versions)
        if expected.shape != index.shape:
            raise ConfigError(f"slots and versions must be of one length, got {index.size} and {expected.size}")
        changed = slots.version_of(index) != expected
        if changed.any():
            raise ConfigError(f"slot {index[changed][0]} has another sequence than it had, or has lost rows")
    return index


def rows_of(slots: Slots, slot: int, seq_len: int, operation: str) -> int:
    """Rows that a live slot has; ConfigError, in the operation's name, if it has fewer."""
    rows = require_int("seq_len", seq_len, 0)
    if rows > slots.seq_len[slot]:
        raise ConfigError(f"{operation}: slot {slot} has {slots.seq_len[slot]} rows, so {rows} is too many")
    return rows
