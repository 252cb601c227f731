"""Mapping off the critical path: a thread backs the rows that a decode loop will need a few steps from now."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

import numpy as np
import torch

from ..errors import ConfigError, VattnError
from ..interrupts import FinalisersWait
from ..kv_cache import KVCache

__all__ = ["MapAhead"]


class MapAhead:
    """Keeps slots backed ahead of their sequences.

    ``require`` says what the next step needs and is a comparison of two arrays as long as the thread keeps ahead; what
    it did not reach is mapped in the caller's thread. ``look_ahead`` says how far sequences are, after the step was
    launched.

    Args:
        cache: whose slots.
        ahead_tokens: rows to have backed past what a step needs; half of it used up, the next are mapped.
        threaded: map on a thread; otherwise in ``look_ahead``.

    Raises:
        ConfigError: ``ahead_tokens`` is negative.
    """

    def __init__(self, cache: KVCache, ahead_tokens: int, threaded: bool = True) -> None:
        if ahead_tokens < 0:
            raise ConfigError(f"ahead_tokens must be at least 0, got {ahead_tokens}")
        self.cache = cache
        self.ahead_tokens = ahead_tokens
        self._backed = np.zeros(cache.max_slots, np.int64)  # rows that are backed, per slot
        self._asked = np.zeros(cache.max_slots, np.int64)  # rows that the thread was asked for
        self._limit = np.zeros(cache.max_slots, np.int64)  # rows that the sequence can ever need
        self._versions = np.zeros(cache.max_slots, np.int64)  # the cache's, of the sequences meant
        self._generation = np.zeros(cache.max_slots, np.int64)  # tells the times apart that a slot was tracked
        self._changing = threading.Lock()  # a slot's sequence is being mapped, or ends
        self._jobs: queue.SimpleQueue[tuple[np.ndarray, np.ndarray, np.ndarray] | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._work, name="vattn-map-ahead", daemon=True)
            self._thread.start()

    # -- sequences -----------------------------------------------------------------------------------------------
    def track(self, slot: int, rows: int, limit: int, version: int | None = None) -> None:
        """Begin with a slot: ``rows`` are backed now, and it will never need more than ``limit``. Nothing is mapped for
        a sequence that is not of this version in the cache; None: that of now."""
        if version is None:
            (version,) = self.cache.versions([slot])
        with self._changing:
            self._versions[slot] = version
            self._generation[slot] += 1
            self._backed[slot] = self._asked[slot] = rows
            self._limit[slot] = limit

    def forget(self, slot: int) -> None:
        """Leave a slot alone from here on: nothing maps for it after this returns."""
        with self._changing:
            self._generation[slot] += 1
            self._limit[slot] = 0

    # -- steps ---------------------------------------------------------------------------------------------------
    def require(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Have rows ``[0, rows)`` of these slots backed.

        Raises:
            OutOfPages: there are no pages for them; nothing was changed, and asking again later is fine.
            ConfigError: a slot's sequence is another one by now, or has lost rows.
            DriverError: the driver failed, here or on the thread.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if (self._backed[slots] >= rows).all():
            return
        self._settle()
        short = self._backed[slots] < rows
        if short.any():
            self.cache.ensure_batch(slots[short], rows[short], versions=self._versions[slots[short]])
            self._backed[slots[short]] = rows[short]
            self._asked[slots[short]] = np.maximum(self._asked[slots[short]], rows[short])

    def look_ahead(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Sequences have reached ``rows``: see to the pages that they come to next."""
        asked = self._asked[slots]
        wanted = np.minimum(rows + self.ahead_tokens, self._limit[slots])
        soon = (wanted > asked) & (asked - rows < (self.ahead_tokens + 1) // 2)
        if not soon.any():
            return
        slots, wanted = slots[soon], wanted[soon]
        self._asked[slots] = wanted
        job = (slots, wanted, self._generation[slots])
        if self._thread is None:
            self._map(*job)
        else:
            self._jobs.put(job)

    def close(self) -> None:
        """End the thread. Idempotent."""
        if self._thread is not None:
            self._jobs.put(None)
            if threading.current_thread() is not self._thread:  # a collection there may end the loop
                self._thread.join()
            self._thread = None

    def __enter__(self) -> MapAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the thread ----------------------------------------------------------------------------------------------
    def _settle(self) -> None:
        """Wait until the thread has done what it was asked."""
        if self._thread is not None:
            done = threading.Event()
            self._jobs.put(done)
            while not done.wait(1.0) and self._thread.is_alive():
                pass

    def _work(self) -> None:
        stream = None
        if self.cache.device.type == "cuda":
            torch.cuda.set_device(self.cache.device)
            stream = torch.cuda.Stream(self.cache.device)  # zeroing recycled pages waits for no one else's work
        with torch.cuda.stream(stream):
            while (job := self._jobs.get()) is not None:
                if isinstance(job, threading.Event):
                    job.set()
                    continue
                try:
                    with FinalisersWait():  # one may end the very loop that this is for
                        self._map(*job)
                except BaseException as failure:  # raised by the next ``require``
                    self._failure = failure

    def _map(self, slots: np.ndarray, rows: np.ndarray, generations: np.ndarray) -> None:
        with self._changing:
            current = self._generation[slots] == generations
            slots, rows = slots[current], rows[current]
            if not slots.size:
                return
            try:
                # Waiting for the GPU in there would hold up whoever else needs pages, ``require`` for one.
                self.cache.ensure_batch(slots, rows, wait=False, versions=self._versions[slots])
            except VattnError as failure:
                if getattr(failure, "undo_incomplete", False):
                    self._failure = failure
                # Not needed yet: the next step's look-ahead tries again, and whoever comes to need it asks by
                # ``require``, between steps, and is told.
                self._asked[slots] = self._backed[slots]
                return
            self._backed[slots] = np.maximum(self._backed[slots], rows)
