"""Which work may still touch a slot's pages: steps that are open, and fences behind what was submitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .driver import Driver, Fence


class WorkTracker:
    """Per slot, the open steps and the newest fence of each stream that worked on it.

    A page is unmapped or given another owner only when no step of its slot is open and all of its fences are done: a
    step covers work that is scheduled but not yet submitted, which no synchronisation with the device would see.
    """

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

    def done(self, slot: int) -> bool:
        """Whether no work can touch the slot's pages any more; never waits."""
        return not self.is_open(slot) and all(fence.done() for fence in self._all(slot))

    def wait(self, slot: int) -> None:
        """Block the host until the submitted work on the slot has ended. The slot has no open step."""
        assert not self.is_open(slot), "waiting for a step that is still open would never end"
        for fence in self._all(slot):
            fence.wait()
        self._fences.pop(slot, None)

    def wait_for_current_stream(self) -> None:
        """Block the host until everything submitted to the current stream has ended."""
        if fence := self._driver.fence():
            fence.wait()

    def _all(self, slot: int) -> list[Fence]:
        return [*self._fences.get(slot, {}).values(), *self._copies.values()]
