"""How large the pages are that back rows which are known ahead: the trade of driver calls against waste, in one place.

The driver's cost is per call, hardly per byte. So a stretch of rows that is asked for at once gets pages of 2, 4, 8, …
units, where a unit is ``page_bytes``. Large pages cost memory where a sequence is cut inside one: a page is mapped
whole, so ``fork`` has to copy what lies before the cut instead of sharing it, and so does a write to a shared row.
Three rules bound that:

* A page covers exactly units that were asked for. No sequence has a unit more than with pages of one size.
* A page has at most a quarter of the units that lie before it in its slot. So a cut copies at most a quarter of what it
  shares, and an eighth in the mean. A stretch of 512 units at the start of a slot takes 41 pages.
* At least as many units as a page has lie behind it in the same stretch, in smaller pages. So ``truncate``, which may
  have to split the page that it cuts, frees the units that takes; and a sequence that grows or is forked near the
  stretch's end finds small pages there.

A page of n units begins at a multiple of n, counted from the first unit of its slot. So the pages of two slots coincide
wherever their sequences asked for the rows in one piece, and a page is found from any of its units.
"""

from __future__ import annotations

from dataclasses import dataclass

_MOST_OF_WHAT_LIES_BEFORE = 4


@dataclass(frozen=True, slots=True)
class PageSizes:
    """The sizes of pages, in units.

    Attributes:
        largest: a power of two; 1: every page is a unit.
    """

    largest: int = 1

    def at(self, first: int, end: int) -> int:
        """The size of the page at ``first``, of a stretch that ends at ``end``; units from the slot's first."""
        most = min(self.largest, first // _MOST_OF_WHAT_LIES_BEFORE, (end - first) // 2, first & -first)
        return 1 << most.bit_length() - 1 if most > 1 else 1

    def most_cut(self, units: int) -> int:
        """Whole units before the ``units``-th that a page may have which lies on both sides of it."""
        return max(0, min(self.largest, units // _MOST_OF_WHAT_LIES_BEFORE) - 1)

    def cover(self, first: int, end: int) -> list[int]:
        """The sizes of the pages, one behind the other, that cover the units ``[first, end)``."""
        if self.largest == 1 or end - first < 4:
            return [1] * (end - first)
        sizes = []
        while first < end:
            sizes.append(self.at(first, end))
            first += sizes[-1]
        return sizes
