"""Turns at a lock: who waits for it comes before who has just had it, and nobody waits for a GPU in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Protocol, TypeVar, cast

from ..errors import ConfigError
from ..interrupts import Uninterrupted, finish, finish_all, this_thread

__all__ = ["MustWait", "Turn", "Turns", "in_turn"]

_LET_IN_S, _POLL_S = 1e-3, 50e-6
_HANDLERS_S = 0.05  # how often who waits for the lock lets signal handlers run
_LEAVE_TIMES = 2

_Method = TypeVar("_Method", bound=Callable[..., Any])


class _Work(Protocol):
    def done(self) -> bool: ...
    def wait(self) -> None: ...


class MustWait(Exception):
    """Raised in a turn, with everything as it was: it can go on when ``work`` has ended.

    Attributes:
        progress: whether the turn has got something out of waiting before, and so does not wait in vain.
    """

    def __init__(self, work: _Work, progress: bool) -> None:
        super().__init__()
        self.work, self.progress = work, progress


class Turn:
    """A call, from its first turn at the lock to its last.

    Attributes:
        leaves_left: how often it may still leave the lock to wait for a GPU.
        before: the snapshot of when it first left; None if it has not.
        fence: behind what was on its stream when it began; what comes later is others'. None until it is asked for.
    """

    __slots__ = ("before", "fence", "leaves_left")

    def __init__(self, leaves_left: int) -> None:
        self.leaves_left = leaves_left
        self.before: Any = None
        self.fence: Any = None


class Turns:
    """A reentrant lock at which nobody starves; for ``in_turn``.

    A lock of Python's goes to whoever asks first once it is free, which is the thread that gave it up and goes on: one
    that does nothing but map pages kept a decode step waiting through a hundred operations, half a second. So those
    that wait say so, and a thread that finds others waiting lets them in before it asks. It does so for a millisecond,
    no longer: this is politeness, nothing is built on it.

    Attributes:
        lock: the lock itself.
        owner, turn: the thread that has it, and its call; None while it is free.
        waiting, hurrying: the threads that wait for it, and those of them that a GPU waits for.
        snapshot: tells how things are that may be others' when a call goes on.
    """

    __slots__ = ("hurrying", "lock", "owner", "snapshot", "turn", "waiting")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner: int | None = None
        self.turn: Turn | None = None
        self.waiting: set[int] = set()
        self.hurrying: set[int] = set()
        self.snapshot: Callable[[], Any] = lambda: None

    def wait_for(self, work: _Work, progress: bool = False) -> None:
        """Block until some work has ended; without the lock, if the turn can begin again.

        Raises:
            MustWait: it can, and the work goes on.
        """
        if self.turn is not None and self.turn.leaves_left > 0 and not work.done():
            if self.turn.before is None:
                self.turn.before = self.snapshot()
            raise MustWait(work, progress)
        work.wait()


def _let_in(others: set[int]) -> None:
    """Wait until nobody of them waits any more, or long enough."""
    end = time.perf_counter() + _LET_IN_S
    while others and time.perf_counter() < end:
        time.sleep(_POLL_S)


def in_turn(
    *, urgent: bool = False, leaves: bool = False, from_finaliser: bool = False
) -> Callable[[_Method], _Method]:
    """Run a method of an object that has ``_turns`` with the lock, uninterrupted.

    Args:
        urgent: before those who wait and are not urgent too; otherwise after all who wait.
        leaves: where the method has to wait for work on a GPU, leave the lock to others meanwhile and call it again. It
            has done nothing by then that matters. Others may give that GPU new work, so the third time it keeps it.
        from_finaliser: a finaliser that calls the method, which returns None, in the middle of this thread's own turn
            has its way after that. Any other method is refused there, by ConfigError.
    """

    def decorate(method: _Method) -> _Method:
        @wraps(method)
        def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
            turns: Turns = self._turns
            thread = threading.get_ident()
            if turns.owner == thread:
                if from_finaliser:
                    return finish(partial(locked, self, *args, **kwargs))
                raise ConfigError(
                    f"{method.__name__.lstrip('_')}() in the middle of another operation of this {type(self).__name__}:"
                    " a finaliser may release sequences and close, and nothing else"
                )
            turn = Turn(_LEAVE_TIMES if leaves else 0)
            others = turns.hurrying if urgent else turns.waiting
            guard = Uninterrupted()
            depth = this_thread.depth
            try:
                this_thread.depth = depth + 1
                while True:
                    if others:
                        _let_in(others)
                    try:
                        turns.waiting.add(thread)
                        if urgent:
                            turns.hurrying.add(thread)
                        # Handlers run while the thread waits for the lock and not while it has it: one may join a
                        # thread that waits for it.
                        guard.begin()
                        while not turns.lock.acquire(timeout=_HANDLERS_S):
                            guard.end()
                            guard.begin()
                        try:
                            turns.waiting.discard(thread)
                            turns.hurrying.discard(thread)
                            turns.owner, turns.turn = thread, turn
                            return method(self, *args, **kwargs)
                        finally:
                            turns.owner = turns.turn = None
                            turns.lock.release()
                    except MustWait as busy:
                        work = busy.work
                        turn.leaves_left -= not busy.progress
                    finally:
                        turns.waiting.discard(thread)  # a signal's handler may have raised before
                        turns.hurrying.discard(thread)
                        guard.end()
                    work.wait()
            finally:
                this_thread.depth = depth
                finish_all()

        return cast(_Method, locked)

    return decorate
