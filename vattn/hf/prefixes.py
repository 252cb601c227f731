"""Stored sequences of a ``VirtualCache``, found by their tokens."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

import numpy as np
import torch

from ..engine.prefix_index import PrefixIndex
from ..errors import ConfigError, OutOfPages, OutOfSlots
from ..kv_cache import KVCache
from .storage import Storage

__all__ = ["NUM_STORED", "Prefixes"]

# Slots of stored sequences; a batch of more rows has one for each. They cost addresses, and memory only while nobody
# else needs it.
NUM_STORED = 32


class Prefixes:
    """What the slots behind a batch have stored. The cache gives it up as it needs to, so it is looked at anew at each
    call."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._index = PrefixIndex()
        self._versions: dict[int, int] = {}  # by slot, the one used least recently first
        self._of = -1  # the storage's version that all this belongs to

    def tokens(self, method: str, ids: torch.Tensor) -> np.ndarray:
        """``ids`` for a method of the user's, ``[batch, tokens]``; ConfigError where they are no token ids."""
        if not self._storage.options.num_stored:
            raise ConfigError(f"{method}() takes a VirtualCache(..., prefix_caching=True)")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ConfigError(f"{method}() takes the token ids of a batch, [batch, tokens], got {got}")
        return ids.cpu().numpy().astype(np.int32)

    def begin(self, tokens: np.ndarray) -> int:
        """Give an empty batch the rows of its prompts, ``[batch, tokens]``, that are stored of each. Returns how many,
        less than all."""
        cache, storage = self._look(), self._storage
        if cache is None or len(tokens) != storage.batch_size or not tokens.shape[1]:
            return 0
        found = [next(iter(self._index.find(None, prompt[:-1])), (0, ())) for prompt in tokens]
        rows = min(length for length, _ in found)
        if not rows:
            return 0
        storage.order()
        try:
            for row, (_, slots) in enumerate(found):
                slot = next(iter(slots))
                version = self._versions[slot] = self._versions.pop(slot)  # the one used last
                cache.release(row)
                cache.fork(slot, rows, into=row, version=version)
        except BaseException as error:
            for row in range(len(tokens)):
                with suppress(OutOfSlots):
                    cache.acquire(row)
                cache.truncate(row, 0)
            if not isinstance(error, (OutOfPages, ConfigError)):
                raise
            return 0  # there is no page for the last of the rows, or making room for it took them
        storage.submitted()
        storage.rows = rows
        storage.lengths.update(dict.fromkeys(storage.lengths, rows))
        return rows

    def store(self, tokens: np.ndarray) -> None:
        """Keep the batch's rows, which were computed from the first of these tokens, ``[batch, tokens]``."""
        cache, storage = self._look(), self._storage
        rows = max(storage.lengths.values())
        if cache is None or not rows:
            return
        storage.require_whole()
        if storage.not_plain:
            raise ConfigError(f"this batch cannot be stored, since {storage.not_plain}; call reset() or begin()")
        if rows != min(storage.lengths.values()):
            raise ConfigError("this batch cannot be stored, since a pass ended half-way; call reset() or begin()")
        if len(tokens) != storage.batch_size or tokens.shape[1] < rows:
            raise ConfigError(
                f"store() takes the tokens of {storage.batch_size} sequences with {rows} rows each, got a shape of "
                f"{tokens.shape}"
            )
        storage.order()
        for row, sequence in enumerate(tokens[:, :rows]):
            found = self._index.find(None, sequence)
            if found and found[0][0] == rows:  # somebody has them
                slot = next(iter(found[0][1]))
                self._versions[slot] = self._versions.pop(slot)
                continue
            slot = self._place(cache, found)
            self._forget(slot)
            with suppress(OutOfPages):  # of the page that the rows end in
                cache.fork(row, rows, into=slot)
                self._versions[slot] = int(cache.versions([slot])[0])
                cache.store(slot)
                self._index.put(slot, None, sequence)
        storage.submitted()

    def _place(self, cache: KVCache, found: list[tuple[int, Collection[int]]]) -> int:
        """A slot to store a sequence in: that of one which it goes on with, a free one, or that used least recently."""
        for length, slots in found:
            for slot in slots:
                if self._index.length(slot) == length:
                    return slot
        first = self._storage.batch_size + 1
        free = (slot for slot in range(first, cache.max_slots) if slot not in self._versions)
        return next(free, next(iter(self._versions), first))

    def _look(self) -> KVCache | None:
        """The cache; forgets what it has given up."""
        storage = self._storage
        if self._of != storage.version:
            self._of, self._index, self._versions = storage.version, PrefixIndex(), {}
        if (cache := storage.kv_cache) is not None:
            versions, rows = cache.stored()
            for slot, version in tuple(self._versions.items()):
                if versions[slot] == version:
                    self._index.shorten(slot, int(rows[slot]))
                else:
                    self._forget(slot)
        return cache

    def _forget(self, slot: int) -> None:
        self._index.remove(slot)
        self._versions.pop(slot, None)
