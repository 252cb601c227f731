"""What operations on the page table will take, worked out before anything is touched. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from .pages import Page
from .reservation import Reservation


@dataclass(slots=True)
class Plan:
    """What an operation takes: new pages, parked ones, and parked mappings that are in its way."""

    adopted: list[tuple[Reservation, int]] = field(default_factory=list)
    unparked: list[tuple[Reservation, int]] = field(default_factory=list)
    unparked_pages: list[Page] = field(default_factory=list)
    adopted_pages: set[Page] = field(default_factory=set)  # those of them that had aliases
    slots_adopting: set[int] = field(default_factory=set)
    slots_unparked: set[int] = field(default_factory=set)  # whose epochs have to be over first
    slots_read: set[int] = field(default_factory=set)  # all that have a page which is copied from

    @property
    def num_pages(self) -> int:
        """New pages."""
        raise NotImplementedError


@dataclass(slots=True)
class Growth(Plan):
    """What it takes to make rows backed, private and writable."""

    missing: dict[Reservation, list[int]] = field(default_factory=dict)
    shared: list[tuple[Reservation, int, int]] = field(default_factory=list)  # with the bytes to keep, from the start
    slots_with_shared: set[int] = field(default_factory=set)
    leaving: dict[Page, set[int]] = field(default_factory=dict)  # addresses at which a shared page will be replaced
    ends: list[tuple[list[int], int, int]] = field(default_factory=list)  # (ends of a lane, slot, pages it will have)

    @property
    def num_pages(self) -> int:
        return sum(map(len, self.missing.values())) + len(self.shared)


@dataclass(slots=True)
class Sharing(Plan):
    """What it takes to back the first rows of a slot by another's pages."""

    aliases: list[tuple[Reservation, list[int], list[Page]]] = field(default_factory=list)
    own: list[tuple[Reservation, list[int]]] = field(default_factory=list)
    copies: list[tuple[Reservation, int, int, int]] = field(default_factory=list)  # page from, page to, bytes

    @property
    def num_pages(self) -> int:
        return sum(len(indexes) for _, indexes in self.own)


@dataclass(frozen=True, slots=True)
class OverRead:
    """How far kernels read past the end of a sequence; those rows stay mapped.

    Attributes:
        tokens: rows past the end that may be read.
        masked: whether what lies there can never reach an output. If it can, it is kept free of an earlier sequence's
            data, and of rows that this sequence had there before ``truncate``: a NaN among them would spread.
    """

    tokens: int = 0
    masked: bool = True
