"""How late a step may be launched: who comes while a pass of prompts runs is in the next one, if that is still open."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

__all__ = ["Pace"]

_MARGIN_S = 6e-3  # before a pass ends: the host takes 2 to 5 ms to back and launch the next
_FORGETTING, _TOO_LATE = 1.05, 0.8  # of the least time that a size took: each time, and where the device had to wait


class Pace:
    """Learns what passes of prompts take, by their rows, from when steps end.

    A step is launched while the one before it runs, so that the device never waits. Beside decode alone that costs a
    request 5 ms at most. Beside a pass of 25 ms it would cost it the whole pass; so the step after it is launched when
    the pass is nearly over.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._least: dict[int, float] = {}  # seconds, by rows
        self._rows, self._begun, self._due = 0, clock(), clock()
        self.has_waited = False

    def early_s(self) -> float:
        """Seconds until the next step is to be launched; none or less: now."""
        early = self._due - self._clock()
        self.has_waited |= early > 0
        return early

    def launched(self, rows: int, too_late: bool = False) -> None:
        """A step is launched, and the one before it has ended just now.

        Args:
            rows: of a pass of prompts; 0 where it only decodes.
            too_late: whether the device had nothing to do when it was launched.
        """
        now, ended = self._clock(), self._rows
        if ended:
            took, least = now - self._begun, self._least.get(ended, math.inf)
            if too_late and self.has_waited:
                self._least[ended] = min(took, least) * _TOO_LATE
            else:
                self._least[ended] = min(took, least * _FORGETTING)
        self._rows, self._begun, self.has_waited = rows, now, False
        self._due = now + max(0.0, self._least.get(rows, 0.0) - _MARGIN_S) if rows else now
