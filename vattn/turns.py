"""Turns at a lock: a thread that waits for it comes before one that has just had it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

_LET_IN_S, _LET_IN_TIMES = 50e-6, 20

_Method = TypeVar("_Method", bound=Callable[..., Any])


class Turns:
    """A reentrant lock at which nobody starves; for ``in_turn``.

    A lock of Python's goes to whoever asks first once it is free, which is the thread that gave it up and goes on: one
    that does nothing but map pages kept a decode step waiting through a hundred operations, half a second. So those
    that wait say so, and a thread that finds others waiting lets them in before it asks. It does so for a millisecond
    or two, no longer: this is politeness, nothing is built on it.

    Attributes:
        lock: the lock itself.
        waiting: the threads that wait for it.
    """

    __slots__ = ("lock", "waiting")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waiting: set[int] = set()

    def let_others_in(self) -> None:
        """Wait until nobody waits any more, or long enough."""
        for _ in range(_LET_IN_TIMES):
            time.sleep(_LET_IN_S)
            if not self.waiting:
                return


def _in_turn(method: _Method, urgent: bool) -> _Method:
    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        turns: Turns = self._turns
        if turns.waiting and not urgent:
            turns.let_others_in()
        thread = threading.get_ident()
        try:
            turns.waiting.add(thread)
            with turns.lock:
                turns.waiting.discard(thread)
                return method(self, *args, **kwargs)
        finally:
            turns.waiting.discard(thread)  # a signal's handler may have raised before

    return cast(_Method, locked)


def in_turn(method: _Method) -> _Method:
    """Run a method of an object that has ``_turns`` with the lock, after those who wait for it.

    Not for use from within another: it would let others in who cannot come.
    """
    return _in_turn(method, urgent=False)


def in_turn_first(method: _Method) -> _Method:
    """The same for what a GPU waits for: as soon as the lock is free."""
    return _in_turn(method, urgent=True)
