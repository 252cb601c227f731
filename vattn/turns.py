"""Turns at a lock: who waits for it comes before who has just had it, and nobody waits for a GPU in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

__all__ = ["MustWait", "Turns", "in_turn"]

_LET_IN_S, _LET_IN_TIMES = 50e-6, 20
_LEAVE_TIMES = 2

_Method = TypeVar("_Method", bound=Callable[..., Any])


class _Work(Protocol):
    def done(self) -> bool: ...
    def wait(self) -> None: ...


class MustWait(Exception):
    """Raised in a turn, before anything was done: it can go on when ``work`` has ended."""

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self.work = work


class Turns:
    """A reentrant lock at which nobody starves; for ``in_turn``.

    A lock of Python's goes to whoever asks first once it is free, which is the thread that gave it up and goes on: one
    that does nothing but map pages kept a decode step waiting through a hundred operations, half a second. So those
    that wait say so, and a thread that finds others waiting lets them in before it asks. It does so for a millisecond
    or two, no longer: this is politeness, nothing is built on it.

    Attributes:
        lock: the lock itself.
        waiting: the threads that wait for it.
        may_leave: whether the turn that is on can be left to wait, by ``wait_for``, and taken again.
    """

    __slots__ = ("lock", "may_leave", "waiting")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waiting: set[int] = set()
        self.may_leave = False

    def let_others_in(self) -> None:
        """Wait until nobody waits any more, or long enough."""
        for _ in range(_LET_IN_TIMES):
            time.sleep(_LET_IN_S)
            if not self.waiting:
                return

    def wait_for(self, work: _Work) -> None:
        """Block until some work has ended; without the lock, if the turn can begin again.

        Raises:
            MustWait: it can, and the work goes on.
        """
        if self.may_leave and not work.done():
            raise MustWait(work)
        work.wait()


def in_turn(*, urgent: bool = False, leaves: bool = False) -> Callable[[_Method], _Method]:
    """Run a method of an object that has ``_turns`` with the lock. Not for use from within another such method.

    Args:
        urgent: as soon as the lock is free; otherwise after those who wait for it.
        leaves: where the method has to wait for work on a GPU, leave the lock to others meanwhile and call it again. It
            has done nothing by then that matters. Others may give that GPU new work, so the third time it keeps it.
    """

    def decorate(method: _Method) -> _Method:
        @wraps(method)
        def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
            turns: Turns = self._turns
            thread = threading.get_ident()
            leaves_left = _LEAVE_TIMES if leaves else 0
            while True:
                if turns.waiting and not urgent:
                    turns.let_others_in()
                try:
                    turns.waiting.add(thread)
                    with turns.lock:
                        turns.waiting.discard(thread)
                        turns.may_leave = leaves_left > 0
                        return method(self, *args, **kwargs)
                except MustWait as busy:
                    work = busy.work
                finally:
                    turns.waiting.discard(thread)  # a signal's handler may have raised before
                leaves_left -= 1
                work.wait()

        return cast(_Method, locked)

    return decorate
