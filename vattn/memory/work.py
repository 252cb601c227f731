"""Which work may still touch a slot's pages, submitted to some stream or only scheduled.

The invariant: a page is unmapped, mapped elsewhere, scrubbed or given another owner only behind its *fences*: behind
all work on it that was launched inside a step, and whatever else was on the current stream when its sequence gave it
up.

* Work that was *submitted*, by a step, a graph's replay or a plain launch, lies before a fence of its stream: one is
  set when a step is left, when a sequence ends, and behind the cache's own copies and scrubbing.
* Work that is *scheduled*, its launch still to come, has no place in a stream yet, so that not even a synchronisation
  with the whole device would wait for it. It is announced by entering a step: no fences are taken while one is open.
* The host waits for fences only before unmapping; scrubbing and copying are put behind them on the device.

Work that comes later, or belongs to other slots, does not lie before these fences, and nobody waits for it.

Steps are entered and left beside the operations of other threads, with the lock of the books alone. The invariant holds
because an operation has to ask before it takes a page from under a slot's rows: ``is_open``, and ``fences``, which says
that it did. Asking and entering both have the books, so one of them is first.

* If entering was first, the step is open: the operation is refused, or left for later.
* If asking was first, the operation *holds* the slot from there to the end of its turn. A step of the slot waits for
  that end, and finds what the operation has made of the slot.

An operation that does not ask leaves every row that a slot has where it is, and does no more to slots than it might
while a step of theirs is open. So a step that is entered in its middle is one that was entered before it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..driver import Driver, Fence
from ..errors import ConfigError
from .lock import FairLock


@dataclass(frozen=True, slots=True)
class Fences:
    """The work that may touch some pages, all of it submitted: everything before any of these fences."""

    fences: tuple[Fence, ...] = ()

    def done(self) -> bool:
        """Whether that work has ended; never waits."""
        return all(fence.done() for fence in self.fences)

    def wait(self) -> None:
        """Block the host until it has."""
        for fence in self.fences:
            fence.wait()

    @staticmethod
    def of(several: Iterable[Fences]) -> Fences:
        """All of them, each fence once."""
        return Fences(tuple({id(fence): fence for each in several for fence in each.fences}.values()))


class _Stream:
    """What was submitted to one stream: fences by number, later ones with larger numbers, and each slot's newest."""

    def __init__(self, max_slots: int) -> None:
        self.newest = np.zeros(max_slots, np.int64)  # 0: none
        self._fences: dict[int, Fence] = {}
        self._last = 0

    def add(self, fence: Fence) -> int:
        """The fence's number."""
        if len(self._fences) > 2 * len(self.newest) + 8:  # most of them are nobody's newest any more
            used = set(self.newest.tolist())
            self._fences = {number: each for number, each in self._fences.items() if number in used}
        self._last += 1
        self._fences[self._last] = fence
        return self._last

    def idle(self) -> bool:
        """Whether nothing that was submitted here for any slot goes on."""
        fence = self.behind(slice(None))
        return fence is None or fence.done()

    def behind(self, slots: Sequence[int] | np.ndarray | slice) -> Fence | None:
        """The fence behind all that was submitted here for these slots: it implies those before it."""
        number = int(self.newest[slots].max(initial=0))
        return self._fences[number] if number else None


class OpenStep:
    """A step, from before it is entered.

    Attributes:
        thread: that began it.
    """

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class WorkTracker:
    """The open steps, and per slot the newest fence of each stream that worked on it.

    Every step of every slot comes by here, so slots are arrays and a call costs the same for one and for a thousand.

    Its methods are for any thread, with or without a turn.

    Attributes:
        open_steps: with the slots of each.
        held: slots of which no step begins before the turn that goes on is over.
    """

    def __init__(self, driver: Driver, max_slots: int, lock: FairLock) -> None:
        self._driver = driver
        self._max_slots = max_slots
        self._lock = lock
        self._streams: dict[int, _Stream] = {}
        self.open_steps: dict[OpenStep, np.ndarray] = {}
        self.held: set[int] = set()
        lock.at_end = self.held.clear

    def is_open(self, slot: int) -> bool:
        """Whether a step of this slot has been entered and not left. If not, the operation that asks holds the slot."""
        with self._lock.books:
            if any((slots == slot).any() for slots in self.open_steps.values()):
                return True
            self.held.add(slot)
            return False

    def hold(self, slots: Iterable[int]) -> None:
        """Let no step of these slots begin before the turn that goes on is over."""
        with self._lock.books:
            self.held.update(slots)

    def enter(self, step: OpenStep, slots: np.ndarray) -> bool:
        """A step begins: its work goes to the current stream, behind what other streams did to these slots.

        Returns:
            False: another thread's operation holds one of them, and nothing was done.
        """
        with self._lock.books:
            if self._lock.owner != threading.get_ident() and not self.held.isdisjoint(slots.tolist()):
                return False
            self.order_current_stream(slots)
            self.open_steps[step] = slots
            return True

    def leave(self, step: OpenStep) -> None:
        """A step ends: everything it launched lies before this point of the current stream. Without effect on one that
        is not open, so that who was interrupted here can do it again."""
        with self._lock.books:
            if (slots := self.open_steps.get(step)) is not None:
                try:
                    self.submitted(slots)
                finally:
                    self.open_steps.pop(step, None)

    def forget_steps(self) -> None:
        """Before the end. ConfigError if a step is open, but for this thread's while an exception is on its way.

        A signal's handler that raises at the very end of a step's block has it left only when the exception dies.
        """
        if not self.open_steps:
            return
        others = any(step.thread != threading.get_ident() for step in self.open_steps)
        if others or sys.exception() is None:
            raise ConfigError("close() inside step(): leave the step first")
        self.open_steps.clear()

    def submitted(self, slots: Sequence[int] | np.ndarray) -> None:
        """Work on these slots was submitted to the current stream; a copy is work on every slot that has the page."""
        with self._lock.books:  # the later of two fences of a stream gets the larger number
            if fence := self._driver.fence():
                stream = self._stream(fence)
                stream.newest[slots] = stream.add(fence)

    def order_current_stream(self, slots: Sequence[int] | np.ndarray) -> None:
        """Make the current stream wait for the work on these slots."""
        for fence in self._behind(slots):
            self._driver.order_after(fence)

    def order_behind(self, several: Iterable[Fences]) -> None:
        """Make the current stream wait for all of these."""
        for fence in Fences.of(several).fences:
            self._driver.order_after(fence)

    def fences(self, slot: int) -> Fences:
        """Behind all the work that can touch the slot's pages as they are now. The slot has no open step, and the
        operation holds it."""
        assert not self.is_open(slot), "a step that is still open may launch more work"
        return Fences(tuple(self._behind([slot])))

    def done(self, slot: int) -> bool:
        """Whether no work can touch the slot's pages any more; never waits. If so, the operation holds the slot."""
        with self._lock.books:
            was_held = slot in self.held
            done = not self.is_open(slot) and self.fences(slot).done()
            if not (done or was_held):
                self.held.discard(slot)
            return done

    def wait(self, slots: Sequence[int], current_stream: bool) -> None:
        """Block the host until the submitted work on some slots has ended. They have no open step.

        Args:
            current_stream: and all that was on the current stream when the operation began.

        Raises:
            MustWait: it has not, and the operation can begin again without the lock.
        """
        fences = [fence for slot in slots for fence in self.fences(slot).fences]
        if current_stream:
            call = self._lock.call
            assert call is not None
            call.fence = call.fence or self._driver.fence()
            if call.fence:
                fences.append(call.fence)
        self._lock.wait_for(Fences(tuple(fences)))
        with self._lock.books:  # no step of these slots has come and gone: they are held
            for stream in self._streams.values():
                stream.newest[slots] = 0

    def _stream(self, fence: Fence) -> _Stream:
        stream = self._streams.get(fence.stream)
        if stream is None:
            # A program may make a stream for every request: forget those whose work has ended.
            self._streams = {number: each for number, each in self._streams.items() if not each.idle()}
            stream = self._streams[fence.stream] = _Stream(self._max_slots)
        return stream

    def _behind(self, slots: Sequence[int] | np.ndarray) -> list[Fence]:
        with self._lock.books:
            fences = [stream.behind(slots) for stream in self._streams.values()]
        return [fence for fence in fences if fence is not None]
