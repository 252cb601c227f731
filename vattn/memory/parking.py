"""What released sequences left mapped in their slots, for the next one there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np

from .pages import Page, PhysicalPagePool
from .reservation import LanePages
from .undo import Undo
from .work import Fences


class Parking:
    """The parked pages of every slot: mapped behind the pages that its sequence owns, and nobody's.

    A parked page is always dirty. It becomes a sequence's own where that grows over it, scrubbed in place. It may be an
    alias, from ``fork``: one that a sequence still has is replaced instead, and does not count as shared for that one;
    if nobody has it, its other mappings go. Nothing reads or writes through a parked mapping but the work that its
    sequence left.

    Args:
        pool: where pages go from here.
        lanes: the page table's own.
        tops: ``[lanes, slots]``; each lane has a row of it as its own ``tops``.

    Attributes:
        fences: behind the work that may still touch each slot's parked pages; the slot released least recently comes
            first.
        num_adopted: pages that sequences have taken over so far.
        num_unparked: pages that were unmapped to be used elsewhere.
    """

    def __init__(self, pool: PhysicalPagePool, lanes: list[LanePages], tops: np.ndarray) -> None:
        self.pool = pool
        self.lanes = lanes
        self.fences: dict[int, Fences] = {}
        self.num_adopted = 0
        self.num_unparked = 0
        self._tops = tops

    def park(self, slot: int, fences: Fences, rows: int = 0) -> None:
        """The slot's sequence has ended: its pages, but those of its first rows, are nobody's once the work before the
        fences is over."""
        for lane in self.lanes:
            lane.tops[slot] = max(int(lane.tops[slot]), lane.ends[slot])
            lane.ends[slot] = min(lane.ends[slot], lane.end_of(slot, lane.num_pages(rows)))  # a page goes whole
        self.fences.pop(slot, None)  # to the end of the line
        if self.any_in(slot):
            self.fences[slot] = fences

    def best_fit(self, slots: np.ndarray, want: list[int]) -> int:
        """Of these free slots that with the most mapped pages among the first ``want`` of each lane, then the fewest
        beyond them, then the lowest."""
        if not self.fences:
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
        return any(lane.tops[slot] > lane.ends[slot] for lane in self.lanes)

    def reclaim(self, count: int, wait_for: Callable[[Fences, bool], None] | None, sparing: Iterable[int] = ()) -> bool:
        """Unmap parked pages until ``count`` more are free or none is left. Returns whether any was unmapped.

        From the end of a slot's pages to its start, since the next sequence there needs the first ones soonest, and one
        slot after another: first those where the host need not wait for work to end, then the others; among equals the
        one released least recently.

        Args:
            wait_for: called with fences that the host has to wait for, and whether any page was unmapped before; None
                where it may not wait.
            sparing: slots that keep their pages.
        """
        pool, sparing = self.pool, set(sparing)
        target = pool.num_free + count
        found = False
        for busy in (False, True) if wait_for else (False,):
            for slot, fences in tuple(self.fences.items()):
                if pool.num_free >= target:
                    return found
                if slot in sparing or not (busy or fences.done()):
                    continue
                if wait_for is not None:
                    wait_for(fences, found)
                while (missing := target - pool.num_free) > 0 and slot in self.fences:
                    with Undo() as undo:
                        taken, tops = self._unmap(slot, missing, undo)
                    self.finish_unpark(slot, taken, tops)
                    found |= bool(taken)
        return found

    def _unmap(self, slot: int, count: int, undo: Undo) -> tuple[list[Page], list[int]]:
        """Unmap about ``count`` of a slot's parked units, those furthest from its start, the same share of every lane.

        Returns them, and each lane's new top.
        """
        taken: list[Page] = []
        tops: list[int] = []
        for number, lane in enumerate(self.lanes):
            share = -(-max(0, count) // (len(self.lanes) - number))
            base, old = lane.first(slot), int(lane.tops[slot])
            top = min(old, max(lane.ends[slot], old - share))
            if top < old and (found := lane.at(slot, top)):
                top = found[0]  # a page goes whole
            tops.append(top)
            pages = lane.reservation.unmap(base + top, base + old, undo)
            count -= sum(page.size for page in pages)
            taken += pages
        return taken, tops

    def finish_unpark(self, slot: int, taken: list[Page], tops: list[int]) -> None:
        """The unmapping succeeded: free what nobody else has."""
        self._tops[:, slot] = tops
        self.num_unparked += sum(page.size for page in taken)
        for page in taken:
            self.pool.put_back(page)
        self.forget_empty(slot)

    def forget_empty(self, slot: int) -> None:
        """Take a slot with nothing parked out of the line."""
        if not self.any_in(slot):
            self.fences.pop(slot, None)

    # -- looking -------------------------------------------------------------------------------------------------
    def pages_of(self, slot: int) -> Iterator[tuple[int, Page]]:
        """(address, page) of every page that is parked in a slot."""
        for lane in self.lanes:
            yield from lane.parked(slot)

    def num_pages(self, enough: int, others: Iterable[Page] = ()) -> int:
        """Pages that are nobody's, since all their mappings are parked or among ``others``; looks no further than for
        ``enough`` of them, since a full cache has thousands."""
        aliases: Counter[Page] = Counter()
        found = 0
        parked = (page for slot in self.fences for _, page in self.pages_of(slot))
        for page in chain(parked, others):
            if found >= enough:
                return found
            aliases[page] += 1
            found += page.size if aliases[page] == len(page.maps) else 0
        return found

    def check_integrity(self) -> None:
        """Parked pages are dirty, and in the line of their slots."""
        for slot in range(self._tops.shape[1]):
            for _, page in self.pages_of(slot):
                assert slot in self.fences, f"slot {slot} has parked pages that no one will ever reclaim"
                assert page.dirty, f"a page parked in slot {slot} would not be scrubbed for its next owner"
