"""How a step is entered beside the operations of other threads, and left whatever happens in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from ..interrupts import finish
from .lock import FairLock, locked
from .opened import Opened
from .work import OpenStep


class Steps:
    """The steps of a cache.

    Args:
        opened: the cache's slots.
        lock: the cache's.
    """

    def __init__(self, opened: Opened, lock: FairLock) -> None:
        self._opened, self._lock = opened, lock

    @contextmanager
    def step(
        self, slots: Sequence[int] | np.ndarray, versions: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[None]:
        """As ``KVCache.step``."""
        step, dropped = OpenStep(), False
        try:
            if not self._enter_step(slots, versions, step):
                self._enter_step_in_turn(slots, versions, step)
            yield
        except GeneratorExit:
            dropped = True
            raise
        finally:
            try:
                self._leave(step, dropped)
            except BaseException:  # a signal's handler may have raised on the way
                self._leave(step, dropped)
                raise

    @locked(quick=True)
    def _enter_step(
        self, slots: Sequence[int] | np.ndarray, versions: Sequence[int] | np.ndarray | None, step: OpenStep
    ) -> bool:
        """False: it takes a turn, to wait for an operation on one of the slots or to wipe rows past their end."""
        if self._opened.closing:
            return False
        state = self._opened.slots
        state.refuse_capture("step() itself")
        wanted = state.all_live(slots, versions).copy()  # the caller may change his while the step is open
        return state.is_clean(wanted) and state.work.enter(step, wanted)

    @locked(urgent=True, waits_outside=True)
    def _enter_step_in_turn(
        self, slots: Sequence[int] | np.ndarray, versions: Sequence[int] | np.ndarray | None, step: OpenStep
    ) -> None:
        state = self._opened.slots
        state.refuse_capture("step() itself")
        wanted = state.all_live(slots, versions).copy()
        state.clean_over_read(wanted)
        state.work.enter(step, wanted)

    def _leave(self, step: OpenStep, dropped: bool) -> None:
        if dropped:
            finish(partial(self._leave_forgotten, step))
        else:
            self._leave_now(step)

    def _leave_forgotten(self, step: OpenStep) -> None:
        """Leave a step that was not left, but forgotten: its stream is not known any more."""
        state = self._opened.here
        if state is not None and step in state.work.open_steps:
            state.driver.synchronize()
        self._leave_now(step)

    @locked(quick=True, from_finaliser=True)
    def _leave_now(self, step: OpenStep) -> None:
        state = self._opened.here
        if state is not None:
            self._lock.left_over = self._finish_deferred
            state.work.leave(step)

    def _finish_deferred(self) -> None:
        """What had to wait until steps were left."""
        state = self._opened.or_none
        if state is not None and not self._opened.closing:
            state.finish_deferred(wait=False)
