"""Nothing comes between a driver call and its entry in the books: no signal's handler, no finaliser.

What is promised of an operation of a cache or a decode loop:

* In the main thread, the handlers of ``SIGNALS`` that are written in Python run before it or after it. One that raises
  then raises out of the call: the operation is done, or was not begun. Its result is lost; a slot that it took is given
  back.
* An object that ends in the middle of one, because the garbage collector runs there, does what it has to do after it.
  So no finaliser waits for a lock that its own thread holds.

An exception that is raised in another way in the middle of an operation (by a handler of another signal, or from
another thread) may leave a cache that ``check_integrity`` finds fault with; ``close`` frees what it has all the same.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

from .errors import ConfigError

# Those that ask a program to end or to give up what it is at, so whose handlers raise.
SIGNALS = tuple(
    map(int, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2))
)

_Handler = Callable[[int, FrameType | None], Any]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def for_one_thread(method: _Method) -> _Method:
    """Refuse a method while another thread is in a method of the same object, whose ``_one_thread`` is None at first.

    A safeguard against misuse, not a lock: two threads that enter within a few instructions both get in.

    Raises:
        ConfigError: one is.
    """

    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine = threading.get_ident()
        before = self._one_thread
        if before not in (None, mine):
            raise ConfigError(
                f"another thread is using this {type(self).__name__}: use it from one thread at a time, or hold a lock "
                "of your own around its calls"
            )
        try:  # not a lock: a signal between taking one and this line would leave it taken for ever
            self._one_thread = mine
            return method(self, *args, **kwargs)
        finally:
            self._one_thread = before

    return cast(_Method, guarded)


# -- signals -----------------------------------------------------------------------------------------------------------
class _Deferred:
    """In the place of handlers while an operation is under way: notes what came. After it, should putting the handlers
    back have been interrupted, it does that and what they do."""

    def __init__(self) -> None:
        self.handlers: dict[int, _Handler] = {}
        self.came: dict[int, FrameType | None] = {}
        self.active = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.active:
            self.came[number] = frame
        else:
            handler = self.handlers[number]
            signal.signal(number, handler)
            handler(number, frame)

    def begin(self) -> None:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if isinstance(handler, _Deferred):
                handler = handler.handlers[number]
            if callable(handler):
                self.handlers[number] = handler
                signal.signal(number, self)

    def end(self) -> None:
        self.active = False
        for number, handler in self.handlers.items():
            if signal.getsignal(number) is self:  # else somebody has set another one in the operation
                signal.signal(number, handler)

    def hand_over(self) -> None:
        """Call the handlers of what came; all of them, though the first one raises."""
        if self.came:
            number, frame = self.came.popitem()
            try:
                self.handlers[number](number, frame)
            finally:
                self.hand_over()


_deferred: _Deferred | None = None  # of the main thread, the only one that runs handlers


class Uninterrupted:
    """Puts the handlers of ``SIGNALS`` off until the outermost such block ends."""

    __slots__ = ("_deferred",)

    def __init__(self) -> None:
        self._deferred: _Deferred | None = None

    def begin(self) -> None:
        global _deferred
        if threading.current_thread() is threading.main_thread() and (_deferred is None or not _deferred.active):
            deferred = _Deferred()
            try:
                deferred.begin()
            except BaseException:  # of a handler that was not replaced yet
                deferred.end()
                deferred.hand_over()
                raise
            _deferred = self._deferred = deferred

    def end(self) -> None:
        """Without effect where ``begin`` had none."""
        if self._deferred is not None:
            deferred, self._deferred = self._deferred, None
            try:
                deferred.end()
            finally:
                deferred.hand_over()

    def __enter__(self) -> None:
        self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


# -- finalisers --------------------------------------------------------------------------------------------------------
class _Thread(threading.local):
    depth = 0


this_thread = _Thread()  # depth: of the operations that it is in
_later: deque[Callable[[], object]] = deque()


def finish(work: Callable[[], object]) -> None:
    """For a finaliser: do ``work`` now, or once this thread has left the operation that the collector ran in."""
    _later.append(work)
    finish_all()


def finish_all() -> None:
    """Do what finalisers left, unless this thread is in an operation."""
    if not _later or this_thread.depth:
        return
    with Uninterrupted():
        while _later:
            try:
                work = _later.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                work()
            except Exception:  # as in any finaliser: nobody is there to be told
                traceback.print_exc()


class FinalisersWait:
    """Puts ``finish`` off until the outermost such block of this thread ends."""

    __slots__ = ()

    def __enter__(self) -> None:
        this_thread.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        this_thread.depth -= 1
        finish_all()


def _begin_in_a_child() -> None:
    """After a fork: what other threads were in the middle of is nobody's here, nor what the parent has left to do."""
    if _deferred is not None and _deferred.active:
        _deferred.end()
    _later.clear()
    this_thread.depth = 0


os.register_at_fork(after_in_child=_begin_in_a_child)
