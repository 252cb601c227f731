"""What threads leave for the one that steps an engine, what that one keeps for them, and which one that may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import ConfigError
from ..interrupts import Uninterrupted
from ..requests import Request, StepToken

__all__ = ["Mail", "Turns", "nobody"]


class Mail:
    """New requests, cancellations, and tokens that nobody has collected yet.

    Attributes:
        lock: held for a moment by every method; reentrant, for callers that do several things under it.
        arrived: set when something was left.
        num_arrived: samples of new requests.
        ended: ids that were cancelled, for an ``AsyncEngine`` to end their streams; None while there is none.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.arrived = threading.Event()
        self.num_arrived = 0
        self.ended: list[int] | None = None
        self._num_posted = 0
        self._requests: dict[int, tuple[Request, float]] = {}
        self._cancelled: set[int] = set()  # to be taken
        # Cancelling walks over no tokens: those of other requests would cost each cancellation anew.
        self._kept: list[StepToken] = []  # for the next step; those of cancelled requests stay in it
        self._kept_ids: set[int] = set()  # of requests with tokens in it that are wanted
        self._late: set[int] = set()  # cancelled since tokens were last handed out, which may come back

    def post(self, request: Request) -> int:
        """A checked request arrives now, and gets its id."""
        with self.lock:
            request_id = self._num_posted
            self._requests[request_id] = request, time.monotonic()
            self.num_arrived += request.n
            self._num_posted += 1
        self.arrived.set()
        return request_id

    def cancel(self, request_id: int) -> None:
        """Nothing of it is handed out after this."""
        with self.lock:
            if request_id not in range(self._num_posted):  # it may be one of a request to come
                return
            self._cancelled.add(request_id)
            self._late.add(request_id)
            self._kept_ids.discard(request_id)
            if not self._kept_ids:
                self._kept = []
            if self.ended is not None:
                self.ended.append(request_id)
        self.arrived.set()

    @property
    def has_cancelled(self) -> bool:
        """Whether there are cancellations to take."""
        return bool(self._cancelled)

    def take_ended(self) -> list[int]:
        """What ``ended`` has, which is empty then."""
        if not self.ended:
            return []
        with self.lock:
            ended, self.ended = self.ended, []
        return ended

    def take(self) -> tuple[list[tuple[int, Request, float]], list[int]]:
        """(request_id, request, when) of those that arrived, and which to cancel."""
        with self.lock:
            arrived = [(request_id, *each) for request_id, each in self._requests.items()]
            cancelled = list(self._cancelled)
            self._requests.clear()
            self._cancelled.clear()
            self.num_arrived = 0
        return arrived, cancelled

    @property
    def has_kept(self) -> bool:
        """Whether there are tokens for the next ``step``."""
        return bool(self._kept_ids)

    def keep(self, tokens: list[StepToken]) -> None:
        """For the next ``step``, in front of what comes then."""
        with self.lock:
            wanted = self._wanted(tokens)
            self._kept += wanted
            self._kept_ids.update(token.request_id for token in wanted)

    def reportable(self, tokens: list[StepToken], with_kept: bool = True) -> list[StepToken]:
        """What was kept, on request, and these, less what is cancelled."""
        with self.lock:
            found = self._wanted(tokens)
            self._late.clear()
            if with_kept and self._kept:
                found = [token for token in self._kept if token.request_id in self._kept_ids] + found
                self._kept = []
                self._kept_ids.clear()
        return found

    def _wanted(self, tokens: list[StepToken]) -> list[StepToken]:
        if not self._late:
            return tokens
        return [token for token in tokens if token.request_id not in self._late]


class Turns:
    """Who may step an engine: one thread at a time; while an ``AsyncEngine`` has claimed it, that one alone.

    Attributes:
        books: held by whoever changes what waits and runs: a step, or a cancellation for a moment.
        owner: gives the open ``AsyncEngine``, or None.
    """

    def __init__(self) -> None:
        self.books = threading.Lock()
        self.owner: Callable[[], object | None] = nobody
        self._lock = threading.RLock()  # of what follows
        self._stepper: int | None = None  # the thread in step, generate or close

    @contextmanager
    def alone(self, by: object | None = None) -> Iterator[None]:
        """Only one thread at a time, no call out of another's, and nobody but the owner.

        Raises:
            ConfigError: it is not this caller's turn.
        """
        mine = threading.get_ident()
        is_mine = False
        try:
            with Uninterrupted(), self._lock:
                if self._stepper == mine:
                    raise ConfigError("step, generate and close cannot be called from within a step of the same engine")
                if self.owner() not in (None, by):
                    raise ConfigError(
                        "an AsyncEngine steps this engine; send requests through its stream(), or await its close() "
                        "before you call step, generate or close or make another AsyncEngine"
                    )
                if self._stepper is not None:
                    raise ConfigError(
                        "another thread is in step or generate of this engine: call them from one thread at a time"
                    )
                self._stepper, is_mine = mine, True
            with self.books:
                yield
        finally:
            if is_mine:
                self._stepper = None


def nobody() -> None:
    """In place of a reference to an owner."""
