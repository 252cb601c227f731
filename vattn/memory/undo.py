"""All or nothing: each step registers how to take it back, right beside the step."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any


class Undo:
    """Runs the registered steps backwards when its block ends with an exception, and forgets them when it does not.

    A step that fails on the way back does not stop the others; it is noted on the original exception, whose attribute
    ``undo_incomplete`` is then True: not everything is as it was, and trying again is not the same operation.

    Args:
        on_incomplete: called after a step failed on the way back, to look at what is left.
    """

    def __init__(self, on_incomplete: Callable[[], None] | None = None) -> None:
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._on_incomplete = on_incomplete

    def push(self, step: Callable[..., Any], *arguments: Any) -> None:
        self._steps.append((step, arguments))

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        incomplete = False
        if error is not None:
            while self._steps:
                step, arguments = self._steps.pop()
                try:
                    step(*arguments)
                except Exception as failure:
                    incomplete = True
                    error.add_note(f"undoing a step failed too: {failure}")
                    error.undo_incomplete = True  # type: ignore[attr-defined]
        self._steps.clear()
        if incomplete and self._on_incomplete is not None:
            self._on_incomplete()


def is_incomplete(error: BaseException) -> bool:
    """Whether taking an operation back failed, so that it must not be tried again: what it was planned with may be
    gone."""
    return getattr(error, "undo_incomplete", False)
