"""Beam search: rows of a batch take each other's place by sharing pages, where a default cache copies K and V.

A row that continues another shares its whole pages. Pages that the two share already stay as they are, so that from the
second step on little more than the newest page changes. The page that both will write to is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from ..errors import ConfigError, OutOfSlots
from ..kv_cache import KVCache

__all__ = ["Places", "moves"]


def moves(sources: Sequence[int]) -> list[tuple[int, int]]:
    """Single (target, source) moves that together put old row ``sources[i]`` in place ``i``, for every ``i`` at once.

    No move overwrites a row that a later one reads. A cycle goes through a spare place, ``len(sources)``. Compilers do
    the same with registers (Rideau, Serpette and Leroy 2008, "Tilting at windmills with Coq").
    """
    spare = len(sources)
    pending = {target: source for target, source in enumerate(sources) if source != target}
    done: list[tuple[int, int]] = []
    while pending:
        needed = set(pending.values())
        free = [target for target in pending if target not in needed]
        done += [(target, pending.pop(target)) for target in free]
        if not free:  # nothing but cycles
            first = next(iter(pending))
            done.append((spare, first))
            pending = {target: spare if source == first else source for target, source in pending.items()}
    return done


class Places:
    """The slots of a cache while its rows change places.

    Args:
        cache: slot ``i`` holds row ``i`` of a batch; one more slot is free.
        batch_size: rows of the batch.
    """

    def __init__(self, cache: KVCache, batch_size: int) -> None:
        self.cache = cache
        self.batch_size = batch_size
        self._holds = {slot: slot for slot in range(batch_size)}  # slot -> which of the old rows

    def change(self, sources: Sequence[int], rows: int) -> None:
        """Put old row ``sources[i]`` into slot ``i``, its first ``rows`` tokens.

        Raises:
            OutOfPages: a copy of a page does not fit; ``where`` tells which slot holds which row.
        """
        for target, source in moves(sources):
            if self._holds.pop(target, None) is not None:
                self.cache.release(target)  # its pages stay mapped: most of them are the source's too
            self.cache.fork(source, rows, into=target)
            self._holds[target] = self._holds[source]
        if self._holds.pop(self.batch_size, None) is not None:
            self.cache.release(self.batch_size)

    def where(self, sources: Sequence[int]) -> list[int]:
        """For each of these old rows a slot that holds it, wherever ``change`` stopped."""
        slots = {row: slot for slot, row in self._holds.items()}
        return [slots[row] for row in sources]

    def restore(self) -> None:
        """Make all slots of the batch live and the spare one free; their content is lost."""
        for slot in range(self.batch_size):
            with suppress(OutOfSlots):
                self.cache.acquire(slot)
        with suppress(ConfigError):
            self.cache.release(self.batch_size)
