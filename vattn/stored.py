"""What ``KVCache`` can do with sequences that have ended and stay in their slots."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from .errors import ConfigError
from .memory.lock import FairLock, locked
from .memory.slots import Slots

__all__ = ["StoredSequences", "give_back"]


def give_back(cache: Any, slot: int) -> None:
    """Release a slot whose taker was interrupted; its caller never gets to see it."""
    with suppress(ConfigError):  # somebody has closed the cache meanwhile
        cache.release(slot)


class StoredSequences:
    """The part of ``KVCache`` that an index of prefixes is made with.

    A *stored* sequence has ended, and its rows stay where they are until its slot or its pages are needed. To everybody
    else its slot is free. Its version, which the sequence had when it lived, tells it from those after it.
    """

    _lock: FairLock

    @property
    def _slots(self) -> Slots:
        raise NotImplementedError

    @locked(from_finaliser=True)
    def store(self, slot: int, seq_len: int | None = None) -> None:
        """End a sequence as ``release`` does, and store its first ``seq_len`` rows (None: all; 0: none).

        While a step is open on the slot, it is stored when that step is left. No driver call, and no waiting.

        The rows have to be what they are going to be, or work that computes them submitted: by a step of this slot, or
        to the current stream. The cache gives them up before it raises ``OutOfPages``, after parked pages: from the
        end of the sequence on that was stored, forked from or resumed least recently. It gives the whole sequence up
        for ``acquire`` and ``fork`` where no other slot is free.

        Raises:
            ConfigError: the slot is not live, or has fewer rows.
        """
        slots = self._slots
        slot = slots.live(slot)
        slots.end(slot, slots.rows_of(slot, slots.seq_len[slot] if seq_len is None else seq_len, "store"))

    @locked
    def stored(self) -> tuple[np.ndarray, np.ndarray]:
        """(versions, rows) by slot, int64: of a stored sequence the version that it had before it ended, and how many
        of its rows are left; -1 and 0 of any other slot."""
        return self._slots.stored_versions(), self._slots.stored_rows()

    @locked(give_back=give_back)
    def resume(self, slot: int, seq_len: int, *, version: int) -> int:
        """Go on with the first ``seq_len`` rows of a stored sequence in its own slot, which is returned, live.

        No driver call, and no waiting. Rows of pages that a fork shares are read-only, as after ``fork``. Rows behind
        the first ones have whatever the sequence left there, as after ``truncate``.

        Raises:
            ConfigError: it is not stored any more, or has fewer rows left, or ``seq_len`` is 0.
        """
        slots = self._slots
        slots.refuse_capture("resume")
        slot = slots.require_stored(slot, version, seq_len)
        slots.resume(slot, seq_len)
        return slot

    @locked
    def drop(self, slot: int, *, version: int) -> None:
        """Give a stored sequence up. Without effect on one that is not stored any more."""
        slots = self._slots
        if slots.is_stored(slot := slots.number(slot), version):
            slots.drop(slot)
