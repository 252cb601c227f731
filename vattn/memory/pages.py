"""Physical pages: who has how many, who shares which, and how many more there may be."""

from __future__ import annotations

from ..driver import Driver
from ..errors import DriverError, OutOfPages
from .undo import Undo


class Page:
    """One physical handle.

    Attributes:
        handle: the driver's.
        maps: the addresses that it is mapped at; none while it is free.
        dirty: whether an earlier owner may have written to it; such a page is zeroed before its next owner sees it.
    """

    __slots__ = ("dirty", "handle", "maps")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.maps: list[int] = []
        self.dirty = False

    @property
    def shared(self) -> bool:
        return len(self.maps) > 1

    def __repr__(self) -> str:
        return f"Page(handle={self.handle:#x}, maps={[hex(address) for address in self.maps]}, dirty={self.dirty})"


class PhysicalPagePool:
    """Every page of one cache, conserved: created pages = mapped pages + free pages.

    Args:
        driver: where pages come from.
        page_bytes: size of each, a multiple of the driver's granularity.
        limit_bytes: physical memory is never more than this.
    """

    def __init__(self, driver: Driver, page_bytes: int, limit_bytes: int) -> None:
        self.driver = driver
        self.page_bytes = page_bytes
        self.limit_bytes = limit_bytes
        self.pages: set[Page] = set()
        self.free: list[Page] = []
        self.num_shared = 0
        self.peak_pages = 0

    @property
    def physical_bytes(self) -> int:
        return len(self.pages) * self.page_bytes

    @property
    def num_available(self) -> int:
        """Pages that the limit still allows to be handed out; the device may have fewer."""
        return len(self.free) + max(0, self.limit_bytes // self.page_bytes - len(self.pages))

    def take(self, count: int, undo: Undo) -> list[Page]:
        """``count`` pages, mapped nowhere yet; free ones first. Undone, created ones go back to the driver.

        Raises:
            OutOfPages: the limit or the device does not have that many.
            DriverError: a driver call failed.
        """
        if count > self.num_available:
            raise self.out_of_pages(count, "which memory_limit does not allow")
        reused: list[Page] = []
        created: list[Page] = []
        undo.push(self._untake, reused, created)
        while self.free and len(reused) < count:
            reused.append(self.free.pop())
        handles: list[int] = []
        try:
            if missing := count - len(reused):
                self.driver.create_pages(self.page_bytes, missing, handles)
        except DriverError as error:
            if error.out_of_memory:
                raise self.out_of_pages(count, f"which the device does not have ({error})") from error
            raise
        finally:
            created += [Page(handle) for handle in handles]
            self.pages.update(created)
            self.peak_pages = max(self.peak_pages, len(self.pages))
        return reused + created

    def _untake(self, reused: list[Page], created: list[Page]) -> None:
        # A page that is still mapped stays where it is: undoing its mapping failed.
        self.free.extend(page for page in reversed(reused) if not page.maps)
        failure: DriverError | None = None
        for page in reversed(created):
            if not page.maps:
                try:
                    self._destroy(page)
                except DriverError as error:
                    failure = failure or error
                    self.put_back(page)
        if failure:
            raise failure

    def _destroy(self, page: Page) -> None:
        self.driver.release(page.handle)
        self.pages.discard(page)

    def out_of_pages(self, count: int, why: str, num_parked: int = 0) -> OutOfPages:
        """The error for ``count`` pages that cannot be had, ``num_parked`` mapped ones that are nobody's included."""
        asked_bytes, free_bytes = count * self.page_bytes, (self.num_available + num_parked) * self.page_bytes
        return OutOfPages(
            f"asked for {asked_bytes} bytes ({count} pages), {why}: {free_bytes} bytes are free, parked or may still "
            f"be created, {self.physical_bytes} bytes are taken, memory_limit is {self.limit_bytes} bytes; "
            "release or truncate a sequence, or raise memory_limit",
            asked_bytes=asked_bytes,
            free_bytes=free_bytes,
            limit_bytes=self.limit_bytes,
        )

    def mapped(self, page: Page, address: int) -> None:
        """The page was mapped at one more address."""
        page.maps.append(address)
        if len(page.maps) == 2:
            self.num_shared += 1

    def unmapped(self, page: Page, address: int) -> None:
        """The page was unmapped from an address; ``put_back`` frees it when that was the last one."""
        page.maps.remove(address)
        if len(page.maps) == 1:
            self.num_shared -= 1

    def put_back(self, page: Page) -> None:
        """Make a page free if nothing maps it any more; its content is an earlier owner's."""
        if not page.maps:
            page.dirty = True
            self.free.append(page)

    def trim(self, keep_bytes: int = 0) -> int:
        """Give free pages back to the driver, but for ``keep_bytes`` of them. Returns the bytes given back."""
        before = self.physical_bytes
        while len(self.free) * self.page_bytes > keep_bytes:
            self._destroy(self.free[-1])
            self.free.pop()
        return before - self.physical_bytes

    def check_integrity(self) -> None:
        """Each page is free or mapped, once; the limit holds; the system counts what we count."""
        assert len(set(self.free)) == len(self.free), "a page is on the free list twice"
        assert all(page in self.pages and not page.maps for page in self.free), "a mapped or lost page is free"
        num_mapped = sum(1 for page in self.pages if page.maps)
        assert num_mapped + len(self.free) == len(self.pages), "a page is neither free nor mapped"
        assert self.num_shared == sum(1 for page in self.pages if page.shared), "the count of shared pages is off"
        assert self.physical_bytes <= self.limit_bytes, "more physical memory than the limit allows"
        allocated = self.driver.allocated_bytes()
        assert allocated is None or allocated == self.physical_bytes, (
            f"the system has {allocated} bytes allocated for this cache, the pool counts {self.physical_bytes}"
        )
