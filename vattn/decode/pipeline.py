"""Steps one behind the other: the next ones are launched before the tokens of those before them are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

import numpy as np
import torch

from ..errors import ConfigError, OutOfPages
from ..interrupts import Uninterrupted
from ..kv_cache import KVCache
from .map_ahead import MapAhead
from .progress import Progress
from .state import Compute
from .step import MAX_STEPS_AHEAD, DecodeStep

__all__ = ["Pipeline"]


class Pipeline:
    """Launches the steps of a decode loop, and reads what they sampled.

    Args:
        cache: holds the sequences.
        step: what is launched.
        progress: says for which sequences, and hears of their tokens.
        mapper: maps rows ahead of them.
        stream: of the steps; None on the CPU.
        steps_ahead: steps that are left under way.
        several: whether a launch may take several steps.
    """

    def __init__(
        self,
        cache: KVCache,
        step: DecodeStep,
        progress: Progress,
        mapper: MapAhead,
        stream: torch.cuda.Stream | None,
        steps_ahead: int,
        several: bool,
    ) -> None:
        self._cache, self._step, self._progress, self._mapper, self._stream = cache, step, progress, mapper, stream
        self._steps_ahead, self._several = steps_ahead, several

    def advance(self, slots: Collection[int] | None, compute: Compute | None, beside: Mapping[int, int] | None) -> None:
        """Launch steps and read some before them, as ``DecodeLoop.step`` says."""
        self.drain(MAX_STEPS_AHEAD)  # there are more only where something was raised after a launch
        try:
            launched = self._launch_more(slots, compute, beside)
        except OutOfPages:
            if not self._progress.under_way:
                raise
            self.drain(0)  # sequences that have ended give their pages back
            launched = self._launch(slots, compute, beside)
        self.drain(self._steps_ahead if launched else 0)

    def drain(self, keep: int) -> None:
        """Read what all steps but the newest ``keep`` sampled; waits for them."""
        self._progress.drain(keep, self._step.read)

    def _launch_more(
        self, slots: Collection[int] | None, compute: Compute | None, beside: Mapping[int, int] | None
    ) -> bool:
        """As ``_launch``, several steps where one launch may take them and there are pages for all."""
        if self._several and slots is None and compute is None and not beside:
            with suppress(OutOfPages):
                return self._launch(slots, compute, beside, several=True)
        return self._launch(slots, compute, beside)

    def _launch(
        self,
        slots: Collection[int] | None,
        compute: Compute | None,
        beside: Mapping[int, int] | None,
        several: bool = False,
    ) -> bool:
        """Launch a step for every sequence (of these slots) that has rows to come; False if none has.

        Args:
            several: as many steps as one launch can take. A sequence may end among them; it then computes the row
                behind its last until they are over, so that it must not end with the context.

        Raises:
            ConfigError: some are not in the cache as they were; they are dropped.
        """
        sequences = self._progress.due(slots)
        if not sequences:
            return False
        taken = [sequence.slot for sequence in sequences]
        index = np.array(taken, np.int64)
        now = np.array([sequence.rows for sequence in sequences], np.int64)
        rows, count = now + 1, self._step.several(taken) if several else 1
        if count > 1:
            behind_last = np.array([sequence.limit for sequence in sequences], np.int64) + 1
            rows = np.minimum(now + count, behind_last)
            if rows.max() > self._progress.max_seq_len:
                rows, count = now + 1, 1
        versions = np.array([sequence.version for sequence in sequences], np.int64)
        touched, known = index, versions
        if beside and (others := [slot for slot in beside if slot not in taken]):
            touched = np.concatenate((index, np.array(others, np.int64)))
            known = np.concatenate((versions, np.array([beside[slot] for slot in others], np.int64)))
        try:
            self._mapper.require(index, rows)
            # Handlers run before the launch or after its entry in the books, also out of the end of ``cache.step``.
            with (
                Uninterrupted(),
                torch.inference_mode(),
                torch.cuda.stream(self._stream),
                self._cache.step(touched, versions=known),
            ):
                self._progress.launched(sequences, self._step.launch(taken, compute, count))
        except ConfigError as error:
            self._drop(index, versions, error)
            raise
        self._mapper.look_ahead(index, rows)
        return True

    def _drop(self, index: np.ndarray, versions: np.ndarray, error: ConfigError) -> None:
        """Decode no more what is somebody else's slot by now, or of another length."""
        gone = index[self._cache.versions(index) != versions].tolist()
        if gone:
            with Uninterrupted():
                self._progress.forget(gone)
            raise ConfigError(
                f"slots {gone} were released or truncated in the cache while this loop decoded them, and are dropped: "
                "cancel a sequence, or let it end, before its slot is changed"
            ) from error
