"""Plain data about a cache: counters, snapshots and the event log. No GPU, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from time import monotonic_ns

__all__ = ["CacheStats", "CallCounts", "Event", "EventLog"]


@dataclass(slots=True)
class CallCounts:
    """Driver calls that succeeded, undone ones included."""

    num_create: int = 0
    num_release: int = 0
    num_map: int = 0
    num_unmap: int = 0
    num_set_access: int = 0
    num_copy: int = 0
    num_zero: int = 0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot of one cache. Sizes are bytes, counts run since the cache was opened.

    ``physical_bytes == in_use_bytes + parked_bytes + free_bytes + index_bytes`` (each handle once).

    Attributes:
        reserved_bytes: address space reserved; costs no memory.
        physical_bytes: memory taken from the driver.
        mapped_bytes: every mapping counted, so a page shared by two slots counts twice.
        in_use_bytes: handles that live sequences have.
        parked_bytes: handles that only released sequences had, still mapped where those were, for the next in the slot.
        free_bytes: handles kept for the next request; ``KVCache.trim`` gives them back to the driver.
        index_bytes: handles that no live sequence has, but stored ones (see ``KVCache.stored``).
        shared_bytes: handles mapped by two or more live slots, each once.
        row_bytes: rows backed on request, each row once per slot.
        waste_bytes: live sequences' mapped bytes minus their ``row_bytes``.
        peak_physical_bytes: the largest ``physical_bytes`` so far.
        memory_limit_bytes: what ``physical_bytes`` never exceeds.
        page_bytes: size of one handle.
        num_live_slots: slots that own a sequence.
        num_stored_slots: slots that store one that has ended; they count as free.
        num_create, num_release, num_map, num_unmap, num_set_access, num_copy, num_zero: driver calls.
        num_oom: how often ``OutOfPages`` was raised.
        num_adopted: parked pages that a sequence took over, without a driver call.
        num_unparked: parked pages that were unmapped, for use elsewhere or by ``KVCache.trim``.
    """

    reserved_bytes: int
    physical_bytes: int
    mapped_bytes: int
    in_use_bytes: int
    parked_bytes: int
    free_bytes: int
    index_bytes: int
    shared_bytes: int
    row_bytes: int
    waste_bytes: int
    peak_physical_bytes: int
    memory_limit_bytes: int
    page_bytes: int
    num_live_slots: int
    num_stored_slots: int
    num_create: int
    num_release: int
    num_map: int
    num_unmap: int
    num_set_access: int
    num_copy: int
    num_zero: int
    num_oom: int
    num_adopted: int
    num_unparked: int

    @property
    def num_driver_calls(self) -> int:
        """Calls that created, released, mapped, unmapped or granted access."""
        return self.num_create + self.num_release + self.num_map + self.num_unmap + self.num_set_access

    def as_dict(self) -> dict[str, int]:
        """The fields as a plain dictionary, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the event log.

    Attributes:
        time_ns: ``time.monotonic_ns()`` when it was logged.
        name: the driver call (``map``, ``unmap``, …).
        fields: those of its address, size_bytes and handle that the call has.
    """

    time_ns: int
    name: str
    fields: dict[str, int]


class EventLog:
    """The newest driver calls of a cache, bounded. Operations served without a driver call are not logged."""

    def __init__(self, max_events: int = 4096) -> None:
        self._entries: deque[tuple[int, str, int | None, int | None, int | None]] = deque(maxlen=max_events)
        self._append = self._entries.append

    def add(
        self, name: str, address: int | None = None, size_bytes: int | None = None, handle: int | None = None
    ) -> None:
        self._append((monotonic_ns(), name, address, size_bytes, handle))

    def extend(self, entries: Iterable[tuple[str, int | None, int | None, int | None]]) -> None:
        """Many calls at once: (name, address, size_bytes, handle) each."""
        now = monotonic_ns()
        self._entries.extend((now, *entry) for entry in entries)

    def snapshot(self) -> tuple[Event, ...]:
        """The logged events, oldest first."""
        names = ("address", "size_bytes", "handle")
        return tuple(
            Event(when, name, {key: value for key, value in zip(names, values, strict=True) if value is not None})
            for when, name, *values in tuple(self._entries)
        )

    def __len__(self) -> int:
        return len(self._entries)
