"""Ctrl-C waits for the end of an operation: between a driver call and its entry in the books there is no safe place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGINT = int(signal.SIGINT)
_Handler = Callable[[int, FrameType | None], Any]


class Uninterrupted:
    """Puts SIGINT off until the block ends. Only the main thread runs signal handlers; elsewhere it does nothing."""

    __slots__ = ("_frame", "_handler", "_noted")

    def __init__(self) -> None:
        self._handler: _Handler | None = None
        self._noted = False
        self._frame: FrameType | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted, self._frame = True, frame

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(_SIGINT)
            if callable(handler) and not isinstance(getattr(handler, "__self__", None), Uninterrupted):
                self._handler = handler
                signal.signal(_SIGINT, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is not None:
            signal.signal(_SIGINT, self._handler)
            if self._noted:
                self._handler(_SIGINT, self._frame)
