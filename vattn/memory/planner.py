"""Which pages an operation takes: worked out from who has which, before anything is touched."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from ..layout import Lane
from .pages import Page
from .plans import Growth, OverRead, Plan, Sharing
from .reservation import Reservation


class Planner:
    """The half of the page table that only looks.

    Args:
        lanes: each with the reservation that it lies in.
        max_slots: slots of the cache.
        page_bytes: size of a page.
        over_read: rows past the end of a sequence that have pages too.
    """

    def __init__(
        self, lanes: list[tuple[Reservation, Lane]], max_slots: int, page_bytes: int, over_read: OverRead
    ) -> None:
        self.lanes = lanes
        self.page_bytes = page_bytes
        self.over_read = over_read
        # Per lane and slot: one past the highest page that is the sequence's own, counted from the slot's first. What
        # is mapped from there on is parked.
        self._ends = [[0] * max_slots for _ in lanes]
        self._origins = [reservation.address + lane.offset_bytes for reservation, lane in lanes]
        self._lane_at = sorted(range(len(lanes)), key=self._origins.__getitem__)
        self._sorted_origins = sorted(self._origins)
        self._row_bytes = sorted({lane.row_bytes for _, lane in lanes})

    def growth(self, slot: int, start: int, end: int, keep_rows: int, growth: Growth) -> None:
        """Add to ``growth`` what makes rows ``[start, end)`` of a slot backed and private, those past them readable.

        A copy of a shared page takes the bytes of rows below ``keep_rows``. Where every sharer of a page asks for
        a copy, the last one keeps the page, and the copies are made from there. With ``start == end`` it is only the
        rows past the end that are asked for.
        """
        page_bytes = self.page_bytes
        readable_rows = end + self.over_read.tokens
        # Where kernels do not mask it, what lies past the new end has to be this sequence's own to be wiped.
        private_rows = end if self.over_read.masked or end < keep_rows else readable_rows
        for (reservation, lane), ends in zip(self.lanes, self._ends, strict=True):
            row_bytes, pages = lane.row_bytes, reservation.pages
            missing = growth.missing.setdefault(reservation, [])
            origin = lane.offset_bytes + slot * lane.slot_stride_bytes
            base = origin // page_bytes
            num_pages = -(-readable_rows * row_bytes // page_bytes)
            growth.ends.append((ends, slot, num_pages))
            own_end = base + ends[slot]
            for index in range(base + start * row_bytes // page_bytes, base + num_pages):
                page = pages.get(index)
                if page is None:
                    missing.append(index)
                elif index >= own_end:
                    if not self._adopt(growth, slot, reservation, index, page):
                        missing.append(index)
                        self._unpark_at(growth, [reservation.address_of(index)])
                elif len(page.maps) > 1 and (index - base) * page_bytes < private_rows * row_bytes:
                    leaving = growth.leaving.setdefault(page, set())
                    if self._unpark_aliases_of_last(page, leaving, growth):
                        continue
                    leaving.add(reservation.address_of(index))
                    kept = origin + keep_rows * row_bytes - index * page_bytes
                    growth.shared.append((reservation, index, max(0, min(kept, page_bytes))))
                    growth.slots_read.update(self._owners(page))
                    growth.slots_with_shared.add(slot)

    def _unpark_aliases_of_last(self, page: Page, leaving: set[int], growth: Growth) -> bool:
        """Whether the page has one owner left, who keeps it; what is parked of it elsewhere is in that one's way."""
        parked = [address for address in page.maps if not self._is_owned(address)]
        if len(page.maps) - len(parked) - len(leaving) != 1:
            return False
        self._unpark_at(growth, parked)
        return True

    def _adopt(self, plan: Plan, slot: int, reservation: Reservation, index: int, page: Page) -> bool:
        """Plan for a parked page to become the slot's own, with its aliases out of the way; False if others have it."""
        if len(page.maps) > 1:
            if page in plan.adopted_pages or any(map(self._is_owned, page.maps)):
                return False
            plan.adopted_pages.add(page)
            here = reservation.address_of(index)
            self._unpark_at(plan, [address for address in page.maps if address != here])
        plan.adopted.append((reservation, index))
        plan.slots_adopting.add(slot)
        return True

    def _unpark_at(self, plan: Plan, addresses: list[int]) -> None:
        for address in addresses:
            number, slot, index = self._locate(address)
            reservation, lane = self.lanes[number]
            plan.unparked.append((reservation, lane.slot_offset(slot) // self.page_bytes + index))
            plan.slots_unparked.add(slot)

    def sharing(self, parent: int, child: int, rows: int) -> Sharing:
        """What backs rows ``[0, rows)`` of an empty slot by the parent's pages; that which straddles the end is copied.

        Of what is parked in the child's slot, the parent's own pages stay, and those past the shared rows are used.
        """
        plan = Sharing()
        for reservation, lane in self.lanes:
            num_whole, rest = divmod(rows * lane.row_bytes, self.page_bytes)
            source = lane.slot_offset(parent) // self.page_bytes
            target = lane.slot_offset(child) // self.page_bytes
            pages = reservation.pages
            aliased: list[int] = []
            own: list[int] = []
            for index in range(target, target + self._num_pages(lane, rows)):
                parked = pages.get(index)
                if index < target + num_whole:
                    if parked is pages[source + index - target]:
                        continue
                    aliased.append(index)
                elif parked is not None and self._adopt(plan, child, reservation, index, parked):
                    continue
                else:
                    own.append(index)
                if parked is not None:
                    self._unpark_at(plan, [reservation.address_of(index)])
            plan.aliases.append((reservation, aliased, [pages[source + index - target] for index in aliased]))
            plan.own.append((reservation, own))
            if rest:
                plan.slots_read.update(self._owners(pages[source + num_whole]))
                plan.copies.append((reservation, source + num_whole, target + num_whole, rest))
        return plan

    def num_pages(self, rows: int) -> list[int]:
        """Per lane, the pages that a sequence of so many rows has."""
        return [self._num_pages(lane, rows) for _, lane in self.lanes]

    def _locate(self, address: int) -> tuple[int, int, int]:
        """(lane, slot, which of the slot's pages there) of a mapped address."""
        number = self._lane_at[bisect_right(self._sorted_origins, address) - 1]
        slot, offset = divmod(address - self._origins[number], self.lanes[number][1].slot_stride_bytes)
        return number, slot, offset // self.page_bytes

    def _owners(self, page: Page) -> Iterator[int]:
        """The slots whose sequences have the page."""
        for address in page.maps:
            number, slot, index = self._locate(address)
            if index < self._ends[number][slot]:
                yield slot

    def _is_owned(self, address: int) -> bool:
        """Whether the page mapped there is a sequence's, and not parked."""
        number, slot, index = self._locate(address)
        return index < self._ends[number][slot]

    def _num_pages(self, lane: Lane, rows: int) -> int:
        """Pages that a sequence of so many rows has, those that kernels read past its end included."""
        return -(-(rows + self.over_read.tokens) * lane.row_bytes // self.page_bytes) if rows else 0
