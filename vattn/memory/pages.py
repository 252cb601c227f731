"""Physical pages: who has how many, who shares which, and how many more there may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..driver import Driver
from ..errors import DriverError, OutOfPages, VattnError
from .undo import Undo, is_incomplete


class Page:
    """One physical handle.

    Attributes:
        handle: the driver's.
        maps: the addresses that it is mapped at; none while it is free.
        owners, stored: how many of these mappings live and stored sequences have; the others are parked, or what a
            failed undo left.
        dirty: whether an earlier owner may have written to it; such a page is zeroed before its next owner sees it.
    """

    __slots__ = ("dirty", "handle", "maps", "owners", "stored")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.maps: list[int] = []
        self.owners = self.stored = 0
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

    Attributes:
        pages, free: all of them, and those that are mapped nowhere.
        num_owned_maps: mappings that live sequences have. ``gain`` and ``lose`` keep this and the next two up to date,
            so that statistics need not look at each page.
        num_owned: pages that live sequences have.
        num_shared: pages that two or more live sequences have.
        num_index: pages that stored sequences have, and no live one.
        peak_pages: the most pages so far.
        num_oom: how often ``OutOfPages`` was raised.
    """

    def __init__(self, driver: Driver, page_bytes: int, limit_bytes: int) -> None:
        self.driver = driver
        self.page_bytes = page_bytes
        self.limit_bytes = limit_bytes
        self.pages: set[Page] = set()
        self.free: list[Page] = []
        self.num_owned_maps = self.num_owned = self.num_shared = self.num_index = 0
        self.peak_pages = self.num_oom = 0

    @property
    def physical_bytes(self) -> int:
        return len(self.pages) * self.page_bytes

    @property
    def num_available(self) -> int:
        """Pages that the limit still allows to be handed out; the device may have fewer."""
        return len(self.free) + self.num_creatable

    @property
    def num_creatable(self) -> int:
        """Pages that the limit still allows to be created."""
        return max(0, self.limit_bytes // self.page_bytes - len(self.pages))

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

    @contextmanager
    def shortage(self, wait: bool = True) -> Iterator[None]:
        """Around an operation: a shortage of any kind raises OutOfPages, and is counted if the operation may ``wait``.

        Raises:
            DriverError: instead, where not everything is as it was; callers go on after a shortage.
        """
        try:
            yield
        except OutOfPages as error:
            if is_incomplete(error):
                fault = DriverError("undo", "INCOMPLETE", f"rows are lost, for this could not be undone: {error}")
                fault.undo_incomplete = True  # type: ignore[attr-defined]
                raise _with_notes(fault, error) from error
            self.num_oom += wait
            raise
        except DriverError as error:
            if not error.out_of_memory or is_incomplete(error):
                raise
            self.num_oom += wait
            out = OutOfPages(
                f"the system ran out of what mapping pages takes: {error}; {self.physical_bytes} bytes are taken, "
                f"memory_limit is {self.limit_bytes} bytes",
                free_bytes=self.num_available * self.page_bytes,
                limit_bytes=self.limit_bytes,
            )
            raise _with_notes(out, error) from error

    def gain(self, pages: Sequence[Page]) -> None:
        """A live sequence has each of these pages now, at one address more."""
        num_first = num_second = 0
        for page in pages:
            page.owners += 1
            if page.owners == 1:
                num_first += 1
                self.num_index -= page.stored > 0
            elif page.owners == 2:
                num_second += 1
        self.num_owned_maps += len(pages)
        self.num_owned += num_first
        self.num_shared += num_second

    def lose(self, pages: Sequence[Page]) -> None:
        """Each of these pages has one owner less."""
        num_last = num_second = 0
        for page in pages:
            page.owners -= 1
            if page.owners == 0:
                num_last += 1
                self.num_index += page.stored > 0
            elif page.owners == 1:
                num_second += 1
        self.num_owned_maps -= len(pages)
        self.num_owned -= num_last
        self.num_shared -= num_second

    def store(self, pages: Sequence[Page]) -> None:
        """A stored sequence has each of these pages now."""
        for page in pages:
            page.stored += 1
            self.num_index += page.stored == 1 and not page.owners

    def unstore(self, pages: Sequence[Page]) -> None:
        """A stored sequence has none of these pages any more."""
        for page in pages:
            page.stored -= 1
            self.num_index -= not page.stored and not page.owners

    def recount(self, owned: Sequence[Page]) -> None:
        """Begin the count of owners anew, with every page that a live sequence has, once for each of its addresses."""
        for page in self.pages:
            page.owners = 0
        self.num_owned_maps = self.num_owned = self.num_shared = 0
        self.num_index = sum(page.stored > 0 for page in self.pages)
        self.gain(owned)

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
        owners = [page.owners for page in self.pages]
        assert self.num_owned_maps == sum(owners), "the count of mappings that sequences have is off"
        assert self.num_owned == sum(number > 0 for number in owners), "the count of pages in use is off"
        assert self.num_shared == sum(number > 1 for number in owners), "the count of shared pages is off"
        num_index = sum(page.stored > 0 and not page.owners for page in self.pages)
        assert self.num_index == num_index, "the count of pages that only stored sequences have is off"
        assert self.physical_bytes <= self.limit_bytes, "more physical memory than the limit allows"
        allocated = self.driver.allocated_bytes()
        assert allocated is None or allocated == self.physical_bytes, (
            f"the system has {allocated} bytes allocated for this cache, the pool counts {self.physical_bytes}"
        )


def _with_notes(error: VattnError, cause: VattnError) -> VattnError:
    for note in getattr(cause, "__notes__", ()):
        error.add_note(note)
    return error
