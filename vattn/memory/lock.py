"""A fair lock: who waits for it comes before who has just had it, and nobody waits for a GPU while holding it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Protocol, TypeVar, cast, overload

from ..errors import ConfigError
from ..interrupts import Uninterrupted, finish, finish_all, this_thread

__all__ = ["FairLock", "MustWait", "locked"]

_LET_IN_S, _POLL_S = 1e-3, 50e-6
_HANDLERS_S = 0.05  # how often a thread that waits for the lock lets signal handlers run
_NUM_LEAVES = 2  # how often a call leaves the lock to wait for a GPU

_Method = TypeVar("_Method", bound=Callable[..., Any])


class _Work(Protocol):
    def done(self) -> bool: ...
    def wait(self) -> None: ...


class MustWait(Exception):
    """Raised by a call that has changed nothing yet: it can begin again when ``work`` has ended.

    Attributes:
        progress: whether the call has got something out of waiting before, and so does not wait in vain.
    """

    def __init__(self, work: _Work, progress: bool) -> None:
        super().__init__()
        self.work, self.progress = work, progress


class Call:
    """A call of a locked method, from the first time it takes the lock to the last.

    Attributes:
        leaves_left: how often it may still leave the lock to wait for a GPU.
        before: the lock's snapshot of when it first left; None if it has not.
        fence: behind what was on its stream when it began; what comes later is others'. None until it is asked for.
    """

    __slots__ = ("before", "fence", "leaves_left")

    def __init__(self, leaves_left: int) -> None:
        self.leaves_left = leaves_left
        self.before: Any = None
        self.fence: Any = None


class FairLock:
    """A lock at which nobody starves; for ``locked``.

    Python's own goes to whoever asks first once it is free, which is the thread that gave it up and goes on: one that
    does nothing but map pages kept a decode step waiting through a hundred operations, half a second. So threads that
    wait say so, and a thread that finds others waiting lets them in before it asks. It does so for a millisecond, no
    longer: this is politeness, nothing is built on it.

    Attributes:
        lock: the lock itself.
        owner, call: the thread that has it, and its call; None while it is free.
        waiting, hurrying: the threads that wait for it, and those of them that a GPU waits for.
        snapshot: says how things are now that others may change while a call has left the lock.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner: int | None = None
        self.call: Call | None = None
        self.waiting: set[int] = set()
        self.hurrying: set[int] = set()
        self.snapshot: Callable[[], Any] = lambda: None
        _LOCKS.add(self)

    def wait_for(self, work: _Work, progress: bool = False) -> None:
        """Block until some work has ended; without the lock, if the call can begin again.

        Raises:
            MustWait: it can, and the work goes on.
        """
        if self.call is not None and self.call.leaves_left > 0 and not work.done():
            if self.call.before is None:
                self.call.before = self.snapshot()
            raise MustWait(work, progress)
        work.wait()

    def run(self, call: Call, urgent: bool, method: Callable[[], Any], results: list[Any]) -> _Work | None:
        """Take the lock and append what ``method`` returns to ``results``. Signal handlers run before or after.

        Returns:
            None; or the work that has to end before ``method`` can be called again.
        """
        signals = Uninterrupted()
        try:
            self._acquire(urgent, signals)
            try:
                self.owner, self.call = threading.get_ident(), call
                results.append(method())
            finally:
                self.owner = self.call = None
                self.lock.release()
        except MustWait as busy:
            call.leaves_left -= not busy.progress
            return busy.work
        finally:
            signals.end()
        return None

    def _acquire(self, urgent: bool, signals: Uninterrupted) -> None:
        """Take the lock and put signals off. Handlers run while the thread waits, since one of them may join a thread
        that waits for the lock itself."""
        others = self.hurrying if urgent else self.waiting
        if others:
            _let_in(others)
        signals.begin()
        if self.lock.acquire(blocking=False):
            return
        thread = threading.get_ident()
        try:
            self.waiting.add(thread)
            if urgent:
                self.hurrying.add(thread)
            while not self.lock.acquire(timeout=_HANDLERS_S):
                signals.end()
                signals.begin()
        finally:  # also where a handler has raised
            self.waiting.discard(thread)
            self.hurrying.discard(thread)


def _let_in(others: set[int]) -> None:
    """Wait until none of them waits any more, or long enough."""
    end = time.perf_counter() + _LET_IN_S
    while others and time.perf_counter() < end:
        time.sleep(_POLL_S)


@overload
def locked(method: _Method) -> _Method: ...
@overload
def locked(
    *, urgent: bool = ..., waits_outside: bool = ..., from_finaliser: bool = ..., give_back: Any = ...
) -> Callable[[_Method], _Method]: ...
def locked(
    method: Any = None,
    *,
    urgent: bool = False,
    waits_outside: bool = False,
    from_finaliser: bool = False,
    give_back: Callable[[Any, Any], None] | None = None,
) -> Any:
    """Run a method of an object that has a ``FairLock`` as ``_lock`` with that lock, uninterrupted by signals.

    Args:
        urgent: before those who wait and are not urgent too; otherwise after all who wait.
        waits_outside: where the method has to wait for work on a GPU, leave the lock to others meanwhile and call it
            again. It has done nothing by then that matters. Others may give that GPU new work, so the third time it
            keeps the lock.
        from_finaliser: a finaliser that calls the method, which returns None, while this thread has the lock has its
            way after that. Any other method is refused there, by ConfigError.
        give_back: called with the object and what the method returned, where a signal's handler raises before the
            caller gets to see it.
    """

    def decorate(method: _Method) -> _Method:
        @wraps(method)
        def with_lock(self: Any, *args: Any, **kwargs: Any) -> Any:
            lock: FairLock = self._lock
            if lock.owner == threading.get_ident():
                if from_finaliser:
                    return finish(partial(with_lock, self, *args, **kwargs))
                raise ConfigError(
                    f"{method.__name__.lstrip('_')}() in the middle of another operation of this {type(self).__name__}:"
                    " a finaliser may release sequences and close, and nothing else"
                )
            call = Call(_NUM_LEAVES if waits_outside else 0)
            results: list[Any] = []
            depth = this_thread.depth
            try:
                try:
                    this_thread.depth = depth + 1
                    bound = partial(method, self, *args, **kwargs)
                    while (work := lock.run(call, urgent, bound, results)) is not None:
                        work.wait()
                finally:
                    this_thread.depth = depth
                    finish_all()
            except BaseException:
                if results and give_back is not None:
                    give_back(self, results[0])
                raise
            return results[0]

        return cast(_Method, with_lock)

    return decorate if method is None else decorate(method)


_LOCKS: weakref.WeakSet[FairLock] = weakref.WeakSet()


def _begin_in_a_child() -> None:
    """After a fork: a thread that is not here may hold a lock. What it guards is refused to a child anyway."""
    for fair in tuple(_LOCKS):
        fair.lock, fair.owner, fair.call = threading.RLock(), None, None
        fair.waiting, fair.hurrying = set(), set()


os.register_at_fork(after_in_child=_begin_in_a_child)
