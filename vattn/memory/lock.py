"""Two locks: operations take turns at a fair one, and the books that a step needs have a quick one of their own.

* Who waits for a turn comes before who has just had one, and nobody waits for a GPU while having it.
* The books say which steps are open, what was submitted, and which slots an operation has to itself (``work``). Their
  lock is never held across a call that creates, maps or unmaps, nor across waiting. So entering and leaving a step
  waits for no operation but one on its own slots.
* Who needs both takes the turn first.
"""

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
    """A lock at which nobody starves, and the books' beside it; for ``locked``.

    Python's own goes to whoever asks first once it is free, which is the thread that gave it up and goes on: one that
    does nothing but map pages kept a decode step waiting through a hundred operations, half a second. So threads that
    wait say so, and a thread that finds others waiting lets them in before it asks. It does so for a millisecond, no
    longer: this is politeness, nothing is built on it.

    Attributes:
        lock: the lock itself.
        owner: the thread that has it; None while it is free.
        books: the quick one.
        waiting, hurrying: the threads that wait for a turn, and those of them that a GPU waits for.
        snapshot: says how things are now that others may change while a call has left the lock.
        at_end: called at the end of every turn, before the lock is free.
        left_over: what has to be done in a turn, at the end of the one that goes on or in one of its own; or None.
    """

    def __init__(self) -> None:
        self.snapshot: Callable[[], Any] = lambda: None
        self.at_end: Callable[[], object] = lambda: None
        self.begin()
        _LOCKS.add(self)

    def begin(self) -> None:
        """Nobody has it, or waits."""
        self.lock, self.books = threading.RLock(), threading.RLock()
        self.owner: int | None = None
        self._bookkeepers: set[int] = set()  # threads that have the books outside of a turn, or wait for them
        self._call: Call | None = None
        self.waiting: set[int] = set()
        self.hurrying: set[int] = set()
        self.left_over: Callable[[], object] | None = None

    @property
    def call(self) -> Call | None:
        """The call that this thread has a turn for."""
        return self._call if self.owner == threading.get_ident() else None

    @property
    def is_mine(self) -> bool:
        """Whether this thread is in an operation."""
        thread = threading.get_ident()
        return thread == self.owner or thread in self._bookkeepers

    def wait_for(self, work: _Work, progress: bool = False) -> None:
        """Block until some work has ended; without the lock, if the call can begin again.

        Raises:
            MustWait: it can, and the work goes on.
        """
        call = self.call
        if call is not None and call.leaves_left > 0 and not work.done():
            if call.before is None:
                call.before = self.snapshot()
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
                self.owner, self._call = threading.get_ident(), call
                results.append(method())
            finally:
                self._release()
                self._catch_up()
        except MustWait as busy:
            call.leaves_left -= not busy.progress
            return busy.work
        finally:
            signals.end()
        return None

    def run_quickly(self, method: Callable[[], Any], results: list[Any]) -> None:
        """``run`` with the books alone: beside the turns of others."""
        thread = threading.get_ident()
        with Uninterrupted():
            try:
                self._bookkeepers.add(thread)  # first: a finaliser that took a turn with the books could wait for ever
                with self.books:  # nobody has them for long, so handlers can wait as well
                    results.append(method())
            finally:
                self._bookkeepers.discard(thread)
            self._catch_up()

    def _release(self) -> None:
        self.owner = self._call = None
        self.at_end()
        self.lock.release()

    def _catch_up(self) -> None:
        """Do what was left over, unless somebody has a turn: he looks here when it is over, so it is not forgotten."""
        while self.left_over is not None and self.lock.acquire(blocking=False):
            try:
                self.owner = threading.get_ident()
                work, self.left_over = self.left_over, None
                if work is not None:
                    work()
            finally:
                self._release()

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
    *,
    quick: bool = ...,
    urgent: bool = ...,
    waits_outside: bool = ...,
    from_finaliser: bool = ...,
    give_back: Any = ...,
) -> Callable[[_Method], _Method]: ...
def locked(
    method: Any = None,
    *,
    quick: bool = False,
    urgent: bool = False,
    waits_outside: bool = False,
    from_finaliser: bool = False,
    give_back: Callable[[Any, Any], None] | None = None,
) -> Any:
    """Run a method of an object that has a ``FairLock`` as ``_lock`` with that lock, uninterrupted by signals.

    Args:
        quick: with the books alone. The method neither maps nor waits.
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
            if lock.is_mine:
                if from_finaliser:
                    return finish(partial(with_lock, self, *args, **kwargs))
                raise ConfigError(
                    f"{method.__name__.lstrip('_')}() in the middle of another operation of the same cache: "
                    "a finaliser may release sequences and close, and nothing else"
                )
            call = Call(_NUM_LEAVES if waits_outside else 0)
            results: list[Any] = []
            depth = this_thread.depth
            try:
                try:
                    this_thread.depth = depth + 1
                    bound = partial(method, self, *args, **kwargs)
                    if quick:
                        lock.run_quickly(bound, results)
                    else:
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
        fair.begin()


os.register_at_fork(after_in_child=_begin_in_a_child)
