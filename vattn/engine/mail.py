"""What threads leave for the one that steps an engine, and what that one keeps for them."""

from __future__ import annotations

import threading
import time

from ..requests import Request, StepToken

__all__ = ["Mail"]


class Mail:
    """New requests, cancellations, and tokens that nobody has collected yet.

    Attributes:
        lock: held for a moment by every method; reentrant, so that ids can be given out under it.
        arrived: set when something was left.
        kept: tokens for the next ``step``.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.arrived = threading.Event()
        self.kept: list[StepToken] = []
        self.num_arrived = 0  # samples
        self._num_posted = 0
        self._requests: dict[int, tuple[Request, float]] = {}
        self._cancelled: set[int] = set()

    def post(self, request_id: int, request: Request) -> None:
        """A checked request arrives now."""
        with self.lock:
            self._requests[request_id] = request, time.monotonic()
            self.num_arrived += request.n
            self._num_posted = request_id + 1
        self.arrived.set()

    def cancel(self, request_id: int) -> None:
        """Nothing of it is handed out after this."""
        with self.lock:
            if request_id not in range(self._num_posted):  # it may be one of a request to come
                return
            self._cancelled.add(request_id)
            self.kept = [token for token in self.kept if token.request_id != request_id]
        self.arrived.set()

    def take(self) -> tuple[list[tuple[int, Request, float]], list[int]]:
        """(request_id, request, when) of those that arrived, and which to cancel."""
        with self.lock:
            arrived = [(request_id, *each) for request_id, each in self._requests.items()]
            cancelled = list(self._cancelled)
            self._requests.clear()
            self._cancelled.clear()
            self.num_arrived = 0
        return arrived, cancelled

    def keep(self, tokens: list[StepToken]) -> None:
        """For the next ``step``, in front of what comes then."""
        with self.lock:
            self.kept += self._wanted(tokens)

    def reportable(self, tokens: list[StepToken]) -> list[StepToken]:
        """What was kept and these, less what is cancelled."""
        with self.lock:
            kept, self.kept = self.kept, []
            return kept + self._wanted(tokens)

    def _wanted(self, tokens: list[StepToken]) -> list[StepToken]:
        if not self._cancelled:
            return tokens
        return [token for token in tokens if token.request_id not in self._cancelled]
