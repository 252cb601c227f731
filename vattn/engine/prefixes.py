"""What a new sequence begins with: rows that a running or a stored one has, and when to wait for them.

A sequence that has ended is stored in its slot, and found by its tokens until the cache needs the slot or the pages.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, OutOfPages, OutOfSlots
from ..kv_cache import KVCache
from .prefix_index import PrefixIndex
from .scheduler import Phase, Sample
from .stats import Meters

__all__ = ["MIN_ROWS", "Prefixes"]

# Rows that are worth it: to fork for, to wait for, to leave a stored sequence its slot for. A fork takes the host about
# as long as a GPU takes for the rows of a page, 16 of an 8B model.
MIN_ROWS = 16


@dataclass(slots=True)
class _Found:
    """What there is for a sample.

    Attributes:
        rows, slot: the most rows that can be had now, and where; 0 and -1 for none.
        leader, leader_rows: a running sample that will have more of them, and how many.
        running_rows: the most that a running sample has or will have.
    """

    rows: int = 0
    slot: int = -1
    leader: Sample | None = None
    leader_rows: int = 0
    running_rows: int = 0


class Prefixes:
    """The index of one engine's prefixes, kept together with the cache. For the thread that steps.

    K and V of a model that the engine runs depend on nothing but the tokens up to theirs (``RuntimeModel``), so that
    rows of equal tokens are equal. Requests share only with those of their own ``cache_salt``.

    Args:
        cache: whose slots.
        meters: count.
        enabled: False: every sequence begins empty, and none is stored.
    """

    def __init__(self, cache: KVCache, meters: Meters, enabled: bool) -> None:
        self.enabled = enabled
        self._cache, self._meters, self._index = cache, meters, PrefixIndex()
        self._running: dict[int, Sample] = {}
        self._versions = np.full(cache.max_slots, -1, np.int64)  # of sequences that were stored here
        self._rows = np.zeros(cache.max_slots, np.int64)  # that the index has of them

    # -- beginning ------------------------------------------------------------------------------------------------
    def leader(self, sample: Sample) -> tuple[Sample, int] | None:
        """A running sample that computes rows which this one needs, and how many: to be waited for."""
        found = self._look_up(sample)
        if found.leader is None or found.leader_rows - found.rows < MIN_ROWS:
            return None
        return found.leader, found.leader_rows

    def running_rows(self, sample: Sample) -> int:
        """Rows of a sample without a slot that a running one has or will have."""
        return self._look_up(sample).running_rows

    def begin(self, sample: Sample, expect_len: int) -> tuple[int, int]:
        """(slot, rows) of a new sequence, which begins with the most rows that there are.

        Raises:
            OutOfPages, OutOfSlots, ConfigError, DriverError: as ``acquire`` and ``fork``.
        """
        slot, found = -1, self._look_up(sample)
        if found.rows:
            with suppress(ConfigError):  # another thread has taken it meanwhile
                slot = self._share(found)
        if slot < 0:
            slot, found.rows = self._cache.acquire(expect_len=expect_len), 0
        if self.enabled:
            self._meters.num_prefix_queries += sample.num_rows
            self._meters.num_prefix_hits += found.rows
        self.note(sample, slot)
        return slot, found.rows

    def note(self, sample: Sample, slot: int) -> None:
        """The sample's sequence has this slot now; those of its rows are there that were ``computed``."""
        if self.enabled:
            self._forget(slot)
            self._running[slot] = sample
            self._index.put(slot, sample.request.cache_salt, sample.token_array())

    def _share(self, found: _Found) -> int:
        slot, rows = found.slot, found.rows
        other = self._running.get(slot)
        if other is not None:
            return self._cache.fork(slot, rows, version=other.version)
        version = int(self._versions[slot])
        if self._rows[slot] - rows >= MIN_ROWS:
            with suppress(OutOfPages, OutOfSlots):
                return self._cache.fork(slot, rows, version=version)
        # What lies behind these rows is worth less than a slot, or than the pages that a fork takes.
        return self._cache.resume(slot, rows, version=version)

    def _look_up(self, sample: Sample) -> _Found:
        found = _Found()
        if not self.enabled:
            return found
        self._follow_cache()
        best = 0, False, 0
        for length, slots in self._index.find(sample.request.cache_salt, sample.token_array()):
            if length < MIN_ROWS or length <= found.rows:
                break
            for slot in slots:
                other = self._running.get(slot)
                rows = length if other is None else min(length, other.computed)
                if other is not None:
                    found.running_rows = max(found.running_rows, length)
                    if (
                        rows < length > found.leader_rows
                        and other.phase is Phase.PREFILLING
                        and other.goes_before(sample)
                    ):
                        found.leader, found.leader_rows = other, length
                # Of equal ones first those that live, whose pages are in use anyway, then that with the least behind.
                rank = rows, other is not None, -self._index.length(slot)
                if rows >= MIN_ROWS and rank > best:
                    best, found.rows, found.slot = rank, rows, slot
        return found

    def _follow_cache(self) -> None:
        """Forget what the cache has given up of stored sequences."""
        versions, rows = self._cache.stored()
        rows = np.where(versions == self._versions, rows, 0)
        for slot in np.flatnonzero(rows < self._rows).tolist():
            self._index.shorten(slot, int(rows[slot]))
            self._rows[slot] = rows[slot]
            if not rows[slot]:
                self._versions[slot] = -1

    # -- ending ---------------------------------------------------------------------------------------------------
    def store(self, sample: Sample, slot: int, version: int, rows: int) -> None:
        """The sample's sequence has ended, and the cache has stored its first rows."""
        self._forget(slot)
        self._index.put(slot, sample.request.cache_salt, sample.token_array()[:rows])
        self._versions[slot], self._rows[slot] = version, rows

    def forget(self, sample: Sample) -> None:
        """The sample's sequence is gone."""
        if self._running.get(sample.slot) is sample:
            self._forget(sample.slot)

    def _forget(self, slot: int) -> None:
        self._running.pop(slot, None)
        self._index.remove(slot)
        self._versions[slot], self._rows[slot] = -1, 0

    def close(self) -> None:
        """Give up what is stored."""
        for slot in np.flatnonzero(self._versions >= 0).tolist():
            with suppress(ConfigError):  # the cache is closed
                self._cache.drop(slot, version=int(self._versions[slot]))
            self._forget(slot)
