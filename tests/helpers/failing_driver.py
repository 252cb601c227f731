"""A driver that fails on request and is real in everything else, to see what a failed call leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vattn.driver.base import RuledDriver
from vattn.errors import DriverError

CALLS = ("reserve", "free_range", "create", "release", "map", "set_access", "unmap", "zero", "copy")


@dataclass
class _Failure:
    after: int  # calls of the kind that still succeed
    times: int  # then this many fail
    out_of_memory: bool


class FailingDriver:
    """Delegates to ``inner``, whose calls of the system, one by one or in a batch, fail as ``fail`` says.

    Attributes:
        inner: the real driver.
        calls: how often the system was called so far, failed calls included, by kind.
    """

    def __init__(self, inner: RuledDriver) -> None:
        self.inner = inner
        self.calls: Counter[str] = Counter()
        self._failures: dict[str, list[_Failure]] = {}
        for call in CALLS:
            setattr(inner, f"_{call}", self._guarded(call, getattr(inner, f"_{call}")))

    def fail(self, call: str, at: int = 1, times: int = 1, out_of_memory: bool = False) -> None:
        """Let the ``at``-th call of that kind from now on fail, and the ``times - 1`` after it; it is not performed."""
        assert call in CALLS, f"call must be one of {CALLS}, got {call!r}"
        self._failures.setdefault(call, []).append(_Failure(at - 1, times, out_of_memory))

    def heal(self) -> None:
        """Forget the failures that did not happen yet."""
        self._failures.clear()

    def _guarded(self, call: str, perform: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            self.calls[call] += 1
            refused = [failure for failure in self._failures.get(call, ()) if self._is_due(failure)]
            if refused:
                raise DriverError(call, "INJECTED", out_of_memory=any(failure.out_of_memory for failure in refused))
            return perform(*arguments, **options)

        return guarded

    @staticmethod
    def _is_due(failure: _Failure) -> bool:
        if failure.after:
            failure.after -= 1
            return False
        failure.times -= 1
        return failure.times >= 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
