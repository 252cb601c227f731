"""What released sequences left mapped in their slots, for the next one there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from ..layout import Lane
from .pages import Page, PhysicalPagePool
from .reservation import Reservation
from .undo import Undo
from .work import Epoch


class Parking:
    """The parked pages of every slot: mapped behind the pages that its sequence owns, and nobody's.

    A parked page is always dirty. It becomes a sequence's own where that grows over it, scrubbed in place. It may be an
    alias, from ``fork``: one that a sequence still has is replaced instead, and does not count as shared for that one;
    if nobody has it, its other mappings go. Nothing reads or writes through a parked mapping but the work of the epoch
    that it was parked with.

    Args:
        pool: where pages go from here.
        lanes: each with the reservation that it lies in.
        ends: per lane and slot, how many pages from the slot's first on are its sequence's; the page table's own.
        max_slots: slots of the cache.

    Attributes:
        epochs: the work that may still touch each slot's parked pages; the slot released least recently comes first.
        num_adopted: pages that sequences have taken over so far.
        num_unparked: pages that were unmapped to be used elsewhere.
    """

    def __init__(
        self, pool: PhysicalPagePool, lanes: list[tuple[Reservation, Lane]], ends: list[list[int]], max_slots: int
    ) -> None:
        self.pool = pool
        self.lanes = lanes
        self.epochs: dict[int, Epoch] = {}
        self.num_adopted = 0
        self.num_unparked = 0
        self._ends = ends
        # Per lane and slot: one past the highest page that was ever parked and not unmapped since.
        self._tops = np.zeros((len(lanes), max_slots), np.int64)

    def park(self, slot: int, epoch: Epoch) -> None:
        """The slot's sequence has ended: its pages are nobody's once ``epoch`` is over. No driver call."""
        tops = self._tops[:, slot]
        np.maximum(tops, [ends[slot] for ends in self._ends], out=tops)
        for ends in self._ends:
            ends[slot] = 0
        self.epochs.pop(slot, None)  # to the end of the line
        if tops.any():
            self.epochs[slot] = epoch

    def note_cut(self, number: int, slot: int, old_end: int, new_end: int) -> None:
        """The slot's own pages from ``new_end`` on were unmapped: if nothing is parked past them, nothing is there."""
        if self._tops[number, slot] <= old_end:
            self._tops[number, slot] = min(int(self._tops[number, slot]), new_end)

    def best_fit(self, slots: np.ndarray, want: list[int]) -> int:
        """Of these free slots that with the most mapped pages among the first ``want`` of each lane, then the fewest
        beyond them, then the lowest."""
        if not self.epochs:
            return int(slots[0])
        tops = self._tops[:, slots]
        useful = np.minimum(tops, np.array(want)[:, None]).sum(0)
        return int(slots[np.lexsort((tops.sum(0), -useful))[0]])

    def emptiest(self, slots: np.ndarray) -> int:
        """Of these free slots that with the fewest pages, then the lowest."""
        return int(slots[self._tops[:, slots].sum(0).argmin()])

    # -- giving back ---------------------------------------------------------------------------------------------
    def any_in(self, slot: int) -> bool:
        """Whether anything may be parked in the slot."""
        return any(top > ends[slot] for top, ends in zip(self._tops[:, slot], self._ends, strict=True))

    def unpark(self, slot: int, count: int, undo: Undo) -> tuple[list[Page], list[int]]:
        """Unmap about ``count`` of a slot's parked pages, those furthest from its start, the same share of every lane.

        The caller has waited for their epoch. Returns what ``finish_unpark`` takes.
        """
        taken: list[Page] = []
        tops: list[int] = []
        for number, ((reservation, lane), ends) in enumerate(zip(self.lanes, self._ends, strict=True)):
            share = -(-max(0, count - len(taken)) // (len(self.lanes) - number))
            base = lane.slot_offset(slot) // reservation.page_bytes
            old = int(self._tops[number, slot])
            tops.append(min(old, max(ends[slot], old - share)))
            taken += reservation.unmap(base + tops[-1], base + old, undo)
        return taken, tops

    def finish_unpark(self, slot: int, taken: list[Page], tops: list[int]) -> None:
        """The unmapping succeeded: free what nobody else has."""
        self._tops[:, slot] = tops
        self.num_unparked += len(taken)
        for page in taken:
            self.pool.put_back(page)
        self.forget_empty(slot)

    def forget_empty(self, slot: int) -> None:
        """Take a slot with nothing parked out of the line."""
        if not self.any_in(slot):
            self.epochs.pop(slot, None)

    def epoch(self, slots: Iterable[int]) -> Epoch:
        """That of everything parked in some slots."""
        fences = {id(fence): fence for slot in slots for fence in self.epochs[slot].fences}
        return Epoch(tuple(fences.values()))

    # -- looking -------------------------------------------------------------------------------------------------
    def pages_of(self, slot: int) -> Iterator[tuple[int, Page]]:
        """(address, page) of every page that is parked in a slot."""
        for (reservation, lane), ends, top in zip(self.lanes, self._ends, self._tops[:, slot].tolist(), strict=True):
            base, pages = lane.slot_offset(slot) // reservation.page_bytes, reservation.pages
            for index in range(base + ends[slot], base + top):
                page = pages.get(index)
                if page is not None:
                    yield reservation.address_of(index), page

    def maps(self) -> Counter[Page]:
        """Every page that is parked somewhere, with the number of its parked mappings."""
        return Counter(page for slot in self.epochs for _, page in self.pages_of(slot))

    def has_pages(self, count: int) -> bool:
        """Whether at least so many pages are nobody's. Looks no further than it must: a full cache has thousands."""
        aliases: Counter[Page] = Counter()
        for slot in self.epochs:
            for _, page in self.pages_of(slot):
                if count <= 0:
                    return True
                aliases[page] += 1
                count -= aliases[page] == len(page.maps)
        return count <= 0

    def num_pages(self) -> int:
        """Pages that are nobody's: all their mappings are parked."""
        return sum(1 for page, count in self.maps().items() if count == len(page.maps))

    def check_integrity(self) -> None:
        """Parked pages are dirty, and in the line of their slots."""
        for slot in range(self._tops.shape[1]):
            for _, page in self.pages_of(slot):
                assert slot in self.epochs, f"slot {slot} has parked pages that no one will ever reclaim"
                assert page.dirty, f"a page parked in slot {slot} would not be scrubbed for its next owner"
