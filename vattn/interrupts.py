"""Nothing comes between a driver call and its entry in the books: no signal's handler, no finaliser.

What is promised of an operation of a cache or a decode loop:

* In the main thread, Python handlers of ``SIGNALS`` run before the operation or after it. One that raises then raises
  out of the call: the operation is done, or was not begun. The caller does not get its result; a slot that it took is
  given back, unless a second handler raises within the same microseconds.
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
import weakref
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
# Python runs a handler where a function begins, after the call of a function in C, and where a loop goes back. One that
# raises at any of these places does no harm here. Where two raise within microseconds, ``_note`` may stay in place of a
# handler, and a signal may wait, until the next block.
#
# State of the main thread, the only one that runs handlers.
_main_thread = threading.main_thread().ident
_block: weakref.ref[Uninterrupted] | None = None  # the outermost open one; it is over, too, when it is gone
_handlers: dict[int, _Handler] = {}  # the newest handler that ``_note`` stood in for, by number
_replaced: set[int] = set()  # the numbers for which it stands in now
_came: dict[int, tuple[_Handler, FrameType | None]] = {}  # by number; of one that came several times, the last


def _note(number: int, frame: FrameType | None) -> None:
    """In a handler's place while a block is open."""
    handler = _handlers[number]
    if _block is not None and _block() is not None:
        _came[number] = handler, frame
    else:  # left by a block whose end was interrupted
        signal.signal(number, handler)
        _replaced.discard(number)
        handler(number, frame)


def _take_over() -> None:
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler is _note:
            _replaced.add(number)
        elif callable(handler):
            _handlers[number] = handler
            _replaced.add(number)
            found = signal.signal(number, _note)
            if found is handler:
                continue
            # The handler ran after ``getsignal``, and has set another.
            if callable(found):
                _handlers[number] = found
            else:
                signal.signal(number, found)
                _replaced.discard(number)


def _end() -> None:
    """Put the handlers back, and call those of what came: all of them, although one raises."""
    try:
        for number in tuple(_replaced):
            if signal.getsignal(number) is _note and (found := signal.signal(number, _handlers[number])) is not _note:
                signal.signal(number, found)  # set by a handler that ran in between
            _replaced.discard(number)
        for number in tuple(_came):
            if number in _came:
                handler, frame = _came[number]
                del _came[number]
                handler(number, frame)
    finally:
        if _replaced or _came:
            _end()


class Uninterrupted:
    """Puts the handlers of ``SIGNALS`` off until the outermost such block ends.

    A signal that comes several times meanwhile is handled once, as the system does with one that is blocked.
    """

    __slots__ = ("__weakref__", "_outermost")

    def __init__(self) -> None:
        self._outermost = False

    def begin(self) -> None:
        global _block
        if threading.get_ident() == _main_thread and (_block is None or _block() in (None, self)):
            try:
                self._outermost = True
                _block = weakref.ref(self)
                _take_over()
            except BaseException:  # raised by a handler that was not replaced yet
                self._outermost, _block = False, None  # before any call, as another handler may run where it begins
                try:
                    _end()
                finally:
                    if _replaced or _came:  # one did there, and raised
                        _end()
                raise

    def end(self) -> None:
        """Without effect where ``begin`` had none."""
        global _block
        if self._outermost:
            self._outermost, _block = False, None
            try:
                _end()
            finally:
                if _replaced or _came:  # a handler ran where that function began, and raised
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
_gc_was_enabled = False  # before the first of those that are open


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
                _gc_was_enabled = gc.isenabled()  # before it is off: a fork may come after any line
                gc.disable()
            _gc_waits += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _gc_waits
        with _gc_lock:
            if _gc_waits:  # else it was open when this process was forked
                _gc_waits -= 1
                if _gc_waits == 0:
                    _enable_again()


def _enable_again() -> None:
    global _gc_was_enabled
    if _gc_was_enabled:
        gc.enable()
        _gc_was_enabled = False


def _begin_in_a_child() -> None:
    """After a fork: what other threads were in the middle of is nobody's here, nor what the parent has left to do."""
    global _main_thread, _block, _gc_lock, _gc_waits
    _gc_lock = threading.Lock()  # another thread may have held the old one
    _gc_waits = 0
    _enable_again()
    _main_thread = threading.get_ident()
    _block = None
    _came.clear()
    _end()
    _later.clear()
    this_thread.depth = 0


os.register_at_fork(after_in_child=_begin_in_a_child)
