"""Nothing comes between a driver call and its entry in the books: no signal's handler, no finaliser.

What is promised of an operation of a cache or a decode loop:

* In the main thread, Python handlers of ``SIGNALS`` run before the operation or after it. One that raises then raises
  out of the call: the operation is done, or was not begun. Its result is lost; a slot that it took is given back.
* An object that the garbage collector ends in the middle of an operation does its own work after the operation. So no
  finaliser waits for a lock that its own thread holds.

An exception that another signal's handler, or another thread, raises in the middle may leave a cache that
``check_integrity`` finds fault with; ``close`` frees what it has all the same.
"""

from __future__ import annotations

import gc
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

# Those that ask a program to end or to give up what it is at, so whose handlers raise, or look at what it is doing.
SIGNALS = tuple(
    map(int, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2))
)

_Handler = Callable[[int, FrameType | None], Any]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def for_one_thread(method: _Method) -> _Method:
    """Refuse a method while another thread is in a method of the same object, whose ``_one_thread`` is None at first.

    A safeguard against misuse, not a lock: two threads that enter within a few instructions both get in.

    Raises:
        ConfigError: another thread is in one.
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
# State of the main thread, the only one that runs handlers.
_main_thread = threading.main_thread().ident
_active = False  # whether a block is open there
_handlers: dict[int, _Handler] = {}  # the handlers that ``_note`` stands in for
_came: deque[tuple[_Handler, int, FrameType | None]] = deque()


def _note(number: int, frame: FrameType | None) -> None:
    """In a handler's place while a block is open."""
    if _active:
        _came.append((_handlers[number], number, frame))
    else:  # putting it back was interrupted, by a handler that raised
        signal.signal(number, _handlers[number])
        _handlers[number](number, frame)


def _take_over() -> None:
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler is _note:  # left by a block whose end was interrupted
            continue
        if callable(handler):
            _handlers[number] = handler
            signal.signal(number, _note)
        else:
            _handlers.pop(number, None)


def _put_back() -> None:
    for number, handler in tuple(_handlers.items()):  # one that is back may run at once, and begin a block of its own
        if (found := signal.signal(number, handler)) is not _note:  # somebody has set another one in the block
            signal.signal(number, found)


def _hand_over() -> None:
    """Call the handlers of what came; all of them, though the first one raises."""
    if _came:
        handler, number, frame = _came.popleft()
        try:
            handler(number, frame)
        finally:
            _hand_over()


def _end() -> None:
    try:
        _put_back()
    finally:
        _hand_over()


class Uninterrupted:
    """Puts the handlers of ``SIGNALS`` off until the outermost such block ends."""

    __slots__ = ("_outermost",)

    def __init__(self) -> None:
        self._outermost = False

    def begin(self) -> None:
        global _active
        if threading.get_ident() == _main_thread and not _active:
            try:
                self._outermost = _active = True
                _take_over()
            except BaseException:  # of a handler that was not replaced yet
                self._outermost = _active = False  # before any call: where one begins, another handler may raise
                _end()
                raise

    def end(self) -> None:
        """Without effect where ``begin`` had none."""
        global _active
        if self._outermost:
            self._outermost = _active = False
            _end()

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
        this_thread.depth = max(0, this_thread.depth - 1)  # 0 where its process was forked inside
        finish_all()


# -- the garbage collector ---------------------------------------------------------------------------------------------
_gc_lock = threading.Lock()
_gc_waits = 0  # open blocks, of all threads
_gc_was_enabled = False  # before the first of them


class GarbageWaits:
    """The garbage collector frees nothing by itself inside, in any thread.

    For captures: a CUDA graph that is freed by the thread that captures another ends that capture. Inside a block of
    ``Uninterrupted``, as no handler may come between the collector and the count of blocks. A collector that was on
    before the first block is on after the last one, also where somebody turned it off meanwhile.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        global _gc_waits, _gc_was_enabled
        with _gc_lock:
            if _gc_waits == 0:
                _gc_was_enabled = gc.isenabled()
                gc.disable()
            _gc_waits += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _gc_lock:
            _end_blocks(1)


def _end_blocks(count: int) -> None:
    """With the lock held; without effect for a block that was open when its process was forked."""
    global _gc_waits
    if _gc_waits:
        _gc_waits -= count
        if _gc_waits == 0 and _gc_was_enabled:
            gc.enable()


def _begin_in_a_child() -> None:
    """After a fork: what other threads were in the middle of is nobody's here, nor what the parent has left to do."""
    global _main_thread, _active, _gc_lock
    _gc_lock = threading.Lock()  # the old one is taken, by the fork
    _end_blocks(_gc_waits)
    _main_thread = threading.get_ident()
    if _active:
        _active = False
        _put_back()
    _came.clear()
    _later.clear()
    this_thread.depth = 0


os.register_at_fork(
    before=lambda: _gc_lock.acquire(), after_in_parent=lambda: _gc_lock.release(), after_in_child=_begin_in_a_child
)
