"""Who gets a slot when: as many as the next pass of prompts has room for, and the others while that pass runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .prefixes import Prefixes
from .samples import Samples
from .scheduler import Phase, Sample, Scheduler

__all__ = ["Admission"]


class Admission:
    """Places samples in the order of the scheduler: in a slot, or behind one that computes what they begin with.

    A slot that begins with rows of another sequence takes its time, 2 to 3 ms for 4,096 tokens of an 8B model. So not
    everybody who could run is placed before the first pass.

    Args:
        samples: give slots.
        scheduler: says who is next.
        prefixes: what sequences can begin with.
        enough: samples that are to be placed yet -> rows of prompts that fill the next pass.
        is_starved: (rows of prompts that have slots, seconds) -> whether a device has waited too long for them.

    Attributes:
        held_back: samples that wait for the next call only.
    """

    def __init__(
        self,
        samples: Samples,
        scheduler: Scheduler,
        prefixes: Prefixes,
        enough: Callable[[int], int],
        is_starved: Callable[[int, float], bool],
    ) -> None:
        self._samples, self._scheduler, self._prefixes = samples, scheduler, prefixes
        self._enough, self._is_starved = enough, is_starved
        self._woken: dict[Sample, None] = {}  # whose first rows others have computed; without a slot yet
        self.held_back = 0

    def admit(self, at_most: int | None = None) -> list[Sample]:
        """Place those whose turn it is: so many, or as many as fill the next pass; none where memory is short.

        Returns:
            Those that it looked at. Some may have to wait again.

        Raises:
            ConfigError: the cache is closed.
        """
        samples, scheduler = self._samples, self._scheduler
        self.held_back = 0
        admitted: list[Sample] = []
        if not (scheduler.num_waiting or self._woken) or samples.shortage is not None:
            return admitted
        begin, rows, enough = time.monotonic(), scheduler.num_prefilling_rows, self._enough(self._num_to_place)
        for sample in self._next():
            admitted.append(sample)
            if sample.phase is Phase.PREFILLING or sample in self._woken:  # else it follows another
                self._place(sample)
                self._woken.pop(sample, None)
            if sample.phase is Phase.PREFILLING:
                rows += sample.num_rows - sample.computed
            if samples.shortage is not None:
                break
            if rows >= enough or len(admitted) == at_most or self._is_starved(rows, time.monotonic() - begin):
                self.held_back = scheduler.num_fitting + len(self._woken)
                break
        return admitted

    def wake(self, leaders: list[Sample]) -> list[Sample]:
        """Those that follow these, where the rows are computed that they wait for: samples of the same request are
        placed now, before it decodes, others by ``admit``.

        Returns:
            Those that can decode at once.
        """
        waiting = [(each, leader) for leader in leaders for each in self._scheduler.followers(leader)]
        woken = [(each, leader) for each, leader in waiting if each.shared_rows <= leader.computed]
        for sample, leader in woken:
            if sample.request_id != leader.request_id:
                self._woken[sample] = None
            elif sample.phase is Phase.FOLLOWING:  # no other one's failure has ended it
                self._place(sample)
        return [s for s, _ in woken if s.phase is Phase.PREFILLING and s.slot >= 0 and s.computed == s.num_rows]

    @property
    def _num_to_place(self) -> int:
        return self._scheduler.num_admissible + len(self._woken)

    def _next(self) -> Iterator[Sample]:
        """Those that were woken, then those that wait."""
        while self._woken:
            sample = next(iter(self._woken))
            if sample.phase is Phase.FOLLOWING:  # it has not ended meanwhile, nor waits again with whom it followed
                yield sample
            self._woken.pop(sample, None)
        yield from self._scheduler.admit(self._samples.free_bytes, self._samples.backed_rows)

    def _place(self, sample: Sample) -> None:
        """Give a sample that was admitted a slot, or let it follow one that computes what it needs."""
        source, leader = self._scheduler.source_of(sample), sample.leader
        if leader is not None and leader.request_id == sample.request_id:
            source = leader
        if source is None and (found := self._prefixes.leader(sample)) is not None:
            self._scheduler.follow(sample, *found)
        else:
            self._samples.take_slot(sample, source)
