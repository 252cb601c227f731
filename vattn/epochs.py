"""Submission epochs: which work may still touch a slot's pages, submitted to some stream or only scheduled.

The invariant: a page is unmapped, mapped elsewhere, scrubbed or given another owner only behind its *epoch*, all work
that anyone could have launched on it by the time its sequence gave it up.

* Work that was *submitted*, by a step, a graph's replay or a plain launch, lies before a fence of its stream: one is
  set when a step is left, when a sequence ends, and behind the cache's own copies and scrubbing.
* Work that is *scheduled*, its launch still to come, has no place in a stream yet, so that not even a synchronisation
  with the whole device would wait for it. It is announced by entering a step: no epoch is taken while one is open.
* The host waits for an epoch only before unmapping; scrubbing and copying are put behind it on the device.

Work that comes later, or belongs to other slots, is no part of an epoch, and nobody waits for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .driver import Driver, Fence


@dataclass(frozen=True, slots=True)
class Epoch:
    """The work that may touch some pages, all of it submitted: everything before these fences."""

    fences: tuple[Fence, ...] = ()

    def done(self) -> bool:
        """Whether that work has ended; never waits."""
        return all(fence.done() for fence in self.fences)

    def wait(self) -> None:
        """Block the host until it has."""
        for fence in self.fences:
            fence.wait()


class WorkTracker:
    """Per slot, the open steps and the newest fence of each stream that worked on it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._open_steps: Counter[int] = Counter()
        self._fences: dict[int, dict[int, Fence]] = {}
        self._copies: dict[int, Fence] = {}  # copies between slots, which read pages of slots that they do not name

    @property
    def any_open(self) -> bool:
        return bool(self._open_steps)

    def is_open(self, slot: int) -> bool:
        """Whether a step of this slot has been entered and not left."""
        return slot in self._open_steps

    def enter(self, slots: Iterable[int]) -> None:
        """A step begins: its work goes to the current stream, behind what other streams did to these slots."""
        slots = tuple(slots)
        self.order_current_stream(slots)
        self._open_steps.update(slots)

    def leave(self, slots: Iterable[int]) -> None:
        """A step ends: everything it launched lies before this point of the current stream."""
        slots = tuple(slots)
        try:
            self.submitted(slots)
        finally:
            self._open_steps -= Counter(slots)

    def submitted(self, slots: Iterable[int]) -> None:
        """Work on these slots was submitted to the current stream."""
        if fence := self._driver.fence():
            for slot in slots:
                self._fences.setdefault(slot, {})[fence.stream] = fence

    def copied(self, slots: Iterable[int]) -> None:
        """Like ``submitted``, for work that also read pages shared with slots not named."""
        if fence := self._driver.fence():
            self._copies[fence.stream] = fence
            for slot in slots:
                self._fences.setdefault(slot, {})[fence.stream] = fence

    def order_current_stream(self, slots: Iterable[int]) -> None:
        """Make the current stream wait for the work on these slots."""
        fences = {id(fence): fence for slot in slots for fence in self._all(slot)}
        for fence in fences.values():
            self._driver.order_after(fence)

    def order_behind(self, epochs: Iterable[Epoch]) -> None:
        """Make the current stream wait for these epochs."""
        for fence in {id(fence): fence for epoch in epochs for fence in epoch.fences}.values():
            self._driver.order_after(fence)

    def epoch(self, slot: int) -> Epoch:
        """All the work that can touch the slot's pages as they are now. The slot has no open step."""
        assert not self.is_open(slot), "a step that is still open may launch more work"
        return Epoch(tuple(self._all(slot)))

    def done(self, slot: int) -> bool:
        """Whether no work can touch the slot's pages any more; never waits."""
        return not self.is_open(slot) and self.epoch(slot).done()

    def wait(self, slot: int) -> None:
        """Block the host until the submitted work on the slot has ended. The slot has no open step."""
        self.epoch(slot).wait()
        self._fences.pop(slot, None)

    def wait_for_current_stream(self) -> None:
        """Block the host until everything submitted to the current stream has ended."""
        if fence := self._driver.fence():
            fence.wait()

    def _all(self, slot: int) -> list[Fence]:
        return [*self._fences.get(slot, {}).values(), *self._copies.values()]
