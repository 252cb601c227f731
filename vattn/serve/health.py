"""Whether an engine can serve: by what its requests come to, and by asking it."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

from ..engine import AsyncEngine
from ..errors import QueueFull
from ..requests import Request

__all__ = ["Health"]

_PROBE_S = 10.0


class Health:
    """Of one engine. Healthy at first, until a request fails; then a request of its own has to succeed.

    Args:
        serving: what runs the engine.
        stalled_s: without a step, while there is work, it counts as stalled. Longer than any step takes, those that
            capture graphs or compute long prompts on a CPU included.
    """

    def __init__(self, serving: AsyncEngine, stalled_s: float = 60.0) -> None:
        self._serving, self._stalled_s = serving, stalled_s
        self._has_failed = False
        self._num_steps, self._moved_s = -1, time.monotonic()
        self._probing: asyncio.Task[None] | None = None
        self.is_closing = False

    def failed(self) -> None:
        """A request ended with an error of the engine."""
        self._has_failed = True

    def look(self) -> None:
        """Note whether the engine makes progress. To be called every few seconds."""
        engine, now = self._serving.engine, time.monotonic()
        if engine.stats().num_steps != self._num_steps or not engine.has_work:
            self._num_steps, self._moved_s = engine.stats().num_steps, now

    async def trouble(self) -> str | None:
        """What keeps the engine from serving; None where nothing does."""
        if self.is_closing:
            return "the server is shutting down"
        self.look()
        if time.monotonic() - self._moved_s > self._stalled_s:
            return f"the engine has work, and has made no step for {self._stalled_s:g} s"
        if not self._has_failed:
            return None
        if self._probing is None or self._probing.done():
            self._probing = asyncio.ensure_future(self._probe())
        await asyncio.wait({self._probing}, timeout=_PROBE_S)
        return "the engine fails" if self._has_failed else None

    async def _probe(self) -> None:
        """One token of a prompt of one."""
        try:
            tokens: Any = self._serving.stream(Request([0], 1))
            async with asyncio.timeout(_PROBE_S), aclosing(tokens) as stream:
                async for new in stream:
                    self._has_failed = new.finish_reason == "error"
        except QueueFull:  # it is busy, which is no failure
            self._has_failed = False
        except Exception:  # whatever an engine that fails raises
            self._has_failed = True
