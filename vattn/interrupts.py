"""Nothing comes between a driver call and its entry in the books: neither Ctrl-C nor the garbage collector."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what signal wraps, less 9 of 16 µs for conversions to enums
import gc
import os
import signal
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

from .errors import ConfigError

_Handler = Callable[[int, FrameType | None], Any]
_SIGINT = int(signal.SIGINT)
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


class _CollectorPause:
    """Keeps the garbage collector off while any thread needs it to be.

    A finaliser that it runs may call the very cache that is in the middle of an operation, on the thread that holds its
    lock. What an operation allocates is here to stay besides: collections while 10,000 pages were mapped doubled the
    time.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may come in between
        self._depth = 0
        self._was_enabled = False

    def enter(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._depth += 1

    def leave(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._was_enabled:
                gc.enable()

    def begin_in_a_child(self) -> None:
        """After a fork, which no thread survives but the one that asked for it, and not in here."""
        self._lock = threading.RLock()
        if self._depth and self._was_enabled:
            gc.enable()
        self._depth = 0


_pause = _CollectorPause()


class Uninterrupted:
    """Puts SIGINT and garbage collection off until the block ends.

    Other signals are not put off: a handler of theirs should note what came, not raise, as it would in the middle of
    any operation. Only the main thread runs signal handlers; in others there is no SIGINT to put off.

    Args:
        collector: put the garbage collector off too. Not while waiting for a lock: where many threads wait it might
            never run then.

    Attributes:
        undo: set inside the block; called when a SIGINT came and the block would hand out something that its caller
            then never gets to see.
    """

    __slots__ = ("_collector", "_frame", "_handler", "_noted", "undo")

    def __init__(self, *, collector: bool = True) -> None:
        self._collector = collector
        self._handler: _Handler | None = None
        self._noted = False
        self._frame: FrameType | None = None
        self.undo: Callable[[], None] | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted, self._frame = True, frame

    def __enter__(self) -> Uninterrupted:
        # The handler first: once it is there, nothing comes between the rest.
        if threading.current_thread() is threading.main_thread():
            handler = _signal.getsignal(_SIGINT)
            if callable(handler) and not isinstance(getattr(handler, "__self__", None), Uninterrupted):
                self._handler = handler
                _signal.signal(_SIGINT, self._note)
        if self._collector:
            _pause.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        undo, late = self.undo if error is None else None, None
        try:
            if self._noted and undo is not None:
                undo()
                undo = None
        finally:
            if self._collector:
                _pause.leave()
            if self._handler is not None:
                try:
                    _signal.signal(_SIGINT, self._handler)
                except BaseException as raised:  # of the handler, which has just run
                    late = raised
        if late is not None or (self._noted and self._handler is not None):
            if undo is not None:  # it came after the first look
                with Uninterrupted():
                    undo()
            if late is not None:
                raise late
            assert self._handler is not None
            self._handler(_SIGINT, self._frame)


def _begin_in_a_child() -> None:
    """After a fork: what other threads were in the middle of is nobody's here."""
    handler = _signal.getsignal(_SIGINT)
    guard = getattr(handler, "__self__", None)
    if isinstance(guard, Uninterrupted):
        _signal.signal(_SIGINT, guard._handler)
    _pause.begin_in_a_child()


os.register_at_fork(after_in_child=_begin_in_a_child)
