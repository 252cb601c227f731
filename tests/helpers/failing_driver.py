"""A driver that fails on request and is real in everything else, to see what a failed call leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vattn.driver.ruled import RuledDriver
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
        self._map_one = inner._map
        for call in CALLS:
            setattr(inner, f"_{call}", self._guarded(call, getattr(inner, f"_{call}")))
        if inner.why_not_native is None:  # else a batch is made of the calls above
            self._create_natively = partial(inner._create_natively, inner._batches)
            self._map_natively = partial(inner._map_natively, inner._batches)
            inner._create_batch, inner._map_batch = self._create_until, self._map_until

    def fail(self, call: str, at: int = 1, times: int = 1, out_of_memory: bool = False) -> None:
        """Let the ``at``-th call of that kind from now on fail, and the ``times - 1`` after it; it is not performed."""
        assert call in CALLS, f"call must be one of {CALLS}, got {call!r}"
        self._failures.setdefault(call, []).append(_Failure(at - 1, times, out_of_memory))

    def heal(self) -> None:
        """Forget the failures that did not happen yet."""
        self._failures.clear()

    def _guarded(self, call: str, perform: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if refusal := self._refusal(call):
                raise refusal
            return perform(*arguments, **options)

        return guarded

    def _refusal(self, call: str) -> DriverError | None:
        """Count a call; the error that it has to fail with, or None."""
        self.calls[call] += 1
        refused = [failure for failure in self._failures.get(call, ()) if self._is_due(failure)]
        if not refused:
            return None
        return DriverError(call, "INJECTED", out_of_memory=any(failure.out_of_memory for failure in refused))

    # A native batch is cut before the call that has to fail.
    def _create_until(self, size_bytes: int, count: int) -> tuple[list[int], BaseException | None]:
        for index in range(count):
            if refusal := self._refusal("create"):
                handles, error = self._create_natively(size_bytes, index)
                return handles, error or refusal
        return self._create_natively(size_bytes, count)

    def _map_until(
        self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int]
    ) -> tuple[int, BaseException | None]:
        for index, (address, handle) in enumerate(zip(addresses, handles, strict=True)):
            for call in ("map", "set_access"):
                if refusal := self._refusal(call):
                    num_calls, error = self._map_natively(size_bytes, addresses[:index], handles[:index])
                    if error is None and call == "set_access":
                        self._map_one(address, size_bytes, handle)
                        num_calls += 1
                    return num_calls, error or refusal
        return self._map_natively(size_bytes, addresses, handles)

    @staticmethod
    def _is_due(failure: _Failure) -> bool:
        if failure.after:
            failure.after -= 1
            return False
        failure.times -= 1
        return failure.times >= 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
