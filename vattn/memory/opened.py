"""Whether a cache may be used: it is open, and this is the process that opened it."""

from __future__ import annotations

import os

from ..errors import ConfigError
from .slots import Slots


class Opened:
    """The slots of a cache, for as long as it is open.

    Attributes:
        or_none: these slots; None once the cache is closed, and before it is open.
        closing: whether ``close`` has begun.
    """

    def __init__(self) -> None:
        self.or_none: Slots | None = None
        self.closing = False
        self._pid = os.getpid()

    @property
    def here(self) -> Slots | None:
        """The slots, even while they are closing; None where they are those of a process that this one was forked
        from."""
        return self.or_none if os.getpid() == self._pid else None

    @property
    def slots(self) -> Slots:
        """The slots; ConfigError where they cannot be used."""
        slots = self.or_none
        if slots is None:
            raise ConfigError("this KVCache is closed; open a new one")
        if os.getpid() != self._pid:
            raise ConfigError("this KVCache belongs to the process that opened it; open one of its own after fork")
        if self.closing:
            raise ConfigError(
                "this KVCache is closing; if that failed half-way, call close() again: nothing else works"
            )
        return slots
