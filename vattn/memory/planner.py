"""What an operation on the page table will take, worked out from who has which page, before anything is touched.

Numbers of pages are units of ``page_bytes``; a page may have several (see ``page_sizes``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from .page_sizes import PageSizes
from .pages import Page
from .plans import Copy, Growth, Placed, Plan, Rows, Run, Sharing
from .reservation import LanePages, Reservation


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


class Planner:
    """The half of the page table that only looks.

    Args:
        lanes: lowest address first.
        page_bytes: size of a unit.
        sizes: of pages.
        over_read: rows past the end of a sequence that have pages too.
    """

    def __init__(self, lanes: list[LanePages], page_bytes: int, sizes: PageSizes, over_read: OverRead) -> None:
        self.lanes = lanes
        self.page_bytes = page_bytes
        self.sizes = sizes
        self.over_read = over_read
        self._by_address = sorted(lanes, key=lambda lane: lane.first_address)
        self._first_addresses = [lane.first_address for lane in self._by_address]
        self._row_bytes = sorted({lane.row_bytes for lane in lanes})

    def growth(self, rows: Rows, growth: Growth) -> None:
        """Add to ``growth`` what makes these rows backed and private, and those that kernels read past them readable.

        Where every sharer of a page asks for a copy, the last one keeps the page, and the copies are made from there.
        With ``start == end`` it is only the rows past the end that are asked for.
        """
        page_bytes, slot = self.page_bytes, rows.slot
        readable_rows = rows.end + self.over_read.tokens
        # Where kernels do not mask it, what lies past the new end has to be this sequence's own to be wiped.
        private_rows = rows.end if self.over_read.masked or rows.end < rows.keep else readable_rows
        for lane in self.lanes:
            row_bytes, reservation = lane.row_bytes, lane.reservation
            new = growth.missing.get(reservation)
            if new is None:
                new = growth.missing[reservation] = Placed(reservation)
            first = rows.start * row_bytes // page_bytes
            own_end = end = lane.ends[slot]
            stop = -(-readable_rows * row_bytes // page_bytes)
            if first < own_end:
                num_private = -(-private_rows * row_bytes // page_bytes)
                for start, after, page in lane.walk(slot, first, min(own_end, stop)):
                    if page is None:  # lost in an undo that failed
                        new.cover(lane.first(slot) + start, self.sizes.cover(start, after))
                    elif len(page.maps) > 1 and start < num_private:
                        end = self._copy_on_write(growth, lane, rows, start, page)
            first = max(first, own_end)
            if lane.tops[slot] > first:
                self._fill(growth, lane, slot, first, stop, new)
            elif stop > first:
                new.cover(lane.first(slot) + first, self.sizes.cover(first, stop))
            growth.ends[lane, slot] = max(end, stop)

    def _copy_on_write(self, growth: Growth, lane: LanePages, rows: Rows, start: int, page: Page) -> int:
        """Plan for a shared page that is about to be written: the slot gets a copy of it, no further than its rows go,
        unless it is the last one to ask for it. Returns where the slot's own pages will end.

        The whole page is copied, whatever rows are asked for: it has a quarter of what lies before it at most. To split
        it for all of its owners would take its pages from under their steps, and as much memory.
        """
        slot, reservation, end = rows.slot, lane.reservation, lane.ends[rows.slot]
        leaving = growth.leaving.setdefault(page, set())
        if self._unpark_aliases_of_last(page, leaving, growth):
            return end
        index, stop = lane.first(slot) + start, start + page.size
        leaving.add(reservation.address_of(index))
        after = min(stop, lane.num_pages(max(rows.keep, rows.end)))
        kept = min(rows.keep * lane.row_bytes - start * self.page_bytes, (after - start) * self.page_bytes)
        growth.copies.append(Copy(reservation, index, max(0, kept), sizes=self.sizes.cover(start, after)))
        growth.slots_read.update(self._owners(page))
        growth.slots_with_shared.add(slot)
        return after if stop == end else end

    def _fill(self, plan: Plan, lane: LanePages, slot: int, first: int, end: int, new: Placed) -> None:
        """Plan for units ``[first, end)`` behind those that the slot has: the pages parked there whose units are all
        among these become its own, and new ones go in between. What else is parked there goes."""
        base = lane.first(slot)
        gap = first
        for start, stop, page in lane.walk(slot, first, end):
            if page is None or start < first:
                continue
            if stop <= end and self._adopt(plan, slot, lane.reservation, base + start, page):
                new.cover(base + gap, self.sizes.cover(gap, start))
                gap = stop
            else:
                self._unpark_at(plan, [lane.reservation.address_of(base + start)])
        if gap < end:
            new.cover(base + gap, self.sizes.cover(gap, end))

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
        last = plan.adopted[-1] if plan.adopted else None
        if last is not None and last.reservation is reservation and last.stop == index:
            last.stop += page.size
        else:
            plan.adopted.append(Run(reservation, index, index + page.size))
        plan.slots_adopting.add(slot)
        return True

    def _unpark_at(self, plan: Plan, addresses: list[int]) -> None:
        for address in addresses:
            lane, slot, number = self._locate(address)
            index = lane.first(slot) + number
            plan.unparked.append(Run(lane.reservation, index, index + 1))
            plan.slots_unparked.add(slot)

    def sharing(self, parent: int, child: int, rows: int) -> Sharing:
        """What backs rows ``[0, rows)`` of an empty slot by the parent's pages; that which straddles the end is copied.

        Of what is parked in the child's slot, the parent's own pages stay, and those past the shared rows are used.
        """
        plan = Sharing()
        for lane in self.lanes:
            reservation, pages = lane.reservation, lane.pages
            num_whole, rest = divmod(rows * lane.row_bytes, self.page_bytes)
            source, target = lane.first(parent), lane.first(child)
            aliases, own = Placed(reservation), Placed(reservation)
            kept: set[int] = set()
            number = 0
            while number < num_whole and number + (page := pages[source + number]).size <= num_whole:
                if page is pages.get(target + number):  # the slot has had a child of this parent before
                    kept.add(number)
                else:
                    aliases.indexes.append(target + number)
                    aliases.pages.append(page)
                number += page.size
            for start, _, parked in lane.walk(child, 0, min(number, int(lane.tops[child]))):
                if parked is not None and start not in kept:
                    self._unpark_at(plan, [reservation.address_of(target + start)])
            self._fill(plan, lane, child, number, lane.num_pages(rows), own)
            plan.aliases.append(aliases)
            plan.own.append(own)
            if size_bytes := (num_whole - number) * self.page_bytes + rest:
                plan.slots_read.update(self._owners(pages[source + number]))
                plan.copies.append(Copy(reservation, target + number, size_bytes, source + number))
                own.copied_to = (target + number) * self.page_bytes + size_bytes
        return plan

    def num_pages(self, rows: int) -> list[int]:
        """Per lane, the pages that a sequence of so many rows needs."""
        return [lane.num_pages(rows) for lane in self.lanes]

    def _locate(self, address: int) -> tuple[LanePages, int, int]:
        """(lane, slot, which of the slot's units there) of a mapped address."""
        lane = self._by_address[bisect_right(self._first_addresses, address) - 1]
        slot, offset = divmod(address - lane.first_address, lane.slot_stride_bytes)
        return lane, slot, offset // self.page_bytes

    def _owners(self, page: Page) -> Iterator[int]:
        """The slots whose sequences have the page."""
        for address in page.maps:
            lane, slot, number = self._locate(address)
            if number < lane.ends[slot]:
                yield slot

    def _is_owned(self, address: int) -> bool:
        """Whether the page mapped there is a sequence's, and not parked."""
        lane, slot, number = self._locate(address)
        return number < lane.ends[slot]
