"""Plans: the pages that an operation on the page table will take, from where, and what is copied.

Numbers of pages are units of ``page_bytes``; a page may have several (see ``page_sizes``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .pages import Page
from .reservation import LanePages, Reservation


@dataclass(slots=True)
class Rows:
    """Rows ``[start, end)`` of a slot, to be backed and private; a copy of a page keeps the rows below ``keep``."""

    slot: int
    start: int
    end: int
    keep: int


@dataclass(slots=True)
class Run:
    """The pages of a reservation that begin at ``first <= index < stop``."""

    reservation: Reservation
    first: int
    stop: int


@dataclass(slots=True)
class Placed:
    """Pages at some indexes of a reservation; none yet where new ones will be taken, of ``sizes``.

    Attributes:
        num_pages: units of ``sizes``.
        copied_to: before this byte of the reservation a copy fills them.
    """

    reservation: Reservation
    indexes: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    num_pages: int = 0
    copied_to: int = 0

    def cover(self, index: int, sizes: list[int]) -> None:
        """Add new pages, one behind the other."""
        self.sizes += sizes
        first = index
        for size in sizes:
            self.indexes.append(index)
            index += size
        self.num_pages += index - first


@dataclass(slots=True)
class Copy:
    """The first bytes of some rows' pages, from the one at an index on, come from another: in ``fork`` the one at
    ``source``; on write the shared page there, which new ones of ``sizes`` replace."""

    reservation: Reservation
    index: int
    size_bytes: int
    source: int = -1
    sizes: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """What an operation takes: new pages, parked ones, and parked mappings that are in its way.

    Attributes:
        adopted: parked pages that become the slot's own, in place.
        adopted_pages: those of them that had aliases.
        unparked: parked mappings that have to go first, one by one.
        slots_adopting, slots_unparked: whose parked pages these are; the work on the latter has to be over first.
        slots_read: all slots that have a page which is copied from.
        new_pages, unparked_pages: noted while the plan is carried out.
    """

    adopted: list[Run] = field(default_factory=list)
    adopted_pages: set[Page] = field(default_factory=set)
    unparked: list[Run] = field(default_factory=list)
    slots_adopting: set[int] = field(default_factory=set)
    slots_unparked: set[int] = field(default_factory=set)
    slots_read: set[int] = field(default_factory=set)
    new_pages: list[Page] = field(default_factory=list)
    unparked_pages: list[Page] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """Of the new pages."""
        raise NotImplementedError

    @property
    def num_pages(self) -> int:
        """New pages."""
        raise NotImplementedError

    @property
    def num_adopted(self) -> int:
        return sum([run.stop - run.first for run in self.adopted]) if self.adopted else 0


@dataclass(slots=True)
class Growth(Plan):
    """What it takes to make rows backed, private and writable.

    Attributes:
        missing: per reservation, the new pages.
        copies: shared pages that are replaced.
        slots_with_shared: whose pages these are.
        leaving: per shared page, the addresses at which it will be replaced.
        ends: per lane and slot, the pages that the slot will have.
    """

    missing: dict[Reservation, Placed] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    slots_with_shared: set[int] = field(default_factory=set)
    leaving: dict[Page, set[int]] = field(default_factory=dict)
    ends: dict[tuple[LanePages, int], int] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        sizes = [size for new in self.missing.values() for size in new.sizes]
        for copy in self.copies:
            sizes += copy.sizes
        return sizes

    @property
    def num_pages(self) -> int:
        num_copied = sum(sum(copy.sizes) for copy in self.copies) if self.copies else 0
        return sum([new.num_pages for new in self.missing.values()]) + num_copied


@dataclass(slots=True)
class Sharing(Plan):
    """What it takes to back the first rows of a slot by another's pages.

    Attributes:
        aliases, own: per lane, the parent's pages and the new ones.
        copies: per lane, what the page has that straddles the end.
    """

    aliases: list[Placed] = field(default_factory=list)
    own: list[Placed] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    @property
    def shares_anew(self) -> bool:
        """Whether a page of the parent's was mapped nowhere else."""
        return any(len(page.maps) == 1 for aliases in self.aliases for page in aliases.pages)

    @property
    def sizes(self) -> list[int]:
        return [size for new in self.own for size in new.sizes]

    @property
    def num_pages(self) -> int:
        return sum([new.num_pages for new in self.own])


@dataclass(slots=True)
class Split:
    """What it takes to have back the units of a sequence's last page that its rows do not need.

    Attributes:
        start, end: the units of the slot that the page begins with, and that the rows end before.
        kept_bytes: of the rows, from the page's first byte on.
        new_pages: noted while it is carried out.
    """

    lane: LanePages
    slot: int
    start: int
    end: int
    kept_bytes: int
    page: Page
    new_pages: list[Page] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        """New pages."""
        return self.end - self.start
