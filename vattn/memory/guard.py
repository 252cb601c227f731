"""Sharing that the hardware checks: a page that is mapped more than once may only be read, at each of its addresses.

So a kernel that writes to a shared row faults, instead of changing the rows of another sequence. Mappings count, and
not sequences: a page of a sequence that was released stays shared for as long as it is parked, since ``release`` calls
no driver. Growing and ``make_writable`` unmap such an alias before they grant a write.
"""

from __future__ import annotations

from collections.abc import Callable

from ..driver import Driver
from .pages import Page


class Guard:
    """Keeps the access to pages what the number of their mappings says.

    The caller has waited for the work that may write to a page before it becomes shared. Before one becomes writable,
    all work is waited for: its last owner may be reading there, and on an H200 a kernel that read while ``set_access``
    made its pages writable faulted.

    Attributes:
        hold: called before that, so that no step begins until the operation is over.
        unsettled: pages whose access is another one, since a call on the way back failed.
    """

    def __init__(self, driver: Driver, page_bytes: int) -> None:
        self._driver = driver
        self._page_bytes = page_bytes
        self.hold: Callable[[], None] = lambda: None
        self.unsettled: set[Page] = set()

    def settle(self, page: Page) -> None:
        """Make a page read-only at every address if it has several, and writable if it has one.

        Raises:
            DriverError: a call failed; the page is unsettled.
        """
        writable = len(page.maps) == 1
        try:
            if writable and not page.read_only.isdisjoint(page.maps):
                self.hold()
                self._driver.synchronize()
            for address in page.maps:
                if writable == (address in page.read_only):
                    self._driver.set_access(address, page.size * self._page_bytes, writable)
                    (page.read_only.discard if writable else page.read_only.add)(address)
        except BaseException:
            self.unsettled.add(page)
            raise
        self.unsettled.discard(page)

    def settle_all(self) -> None:
        """Try again what failed on the way back."""
        for page in tuple(self.unsettled):
            self.settle(page)

    def check_integrity(self, pages: set[Page]) -> None:
        """Shared pages are read-only at every address, all others are writable."""
        assert self.unsettled <= pages, "a page that is gone is still to be settled"
        for page in pages - self.unsettled:
            expected = set(page.maps) if len(page.maps) > 1 else set()
            assert page.read_only == expected, f"{page} is read-only at {sorted(map(hex, page.read_only))}"
