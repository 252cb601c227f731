"""Physical pages: who has how many, who shares which, and how many more there may be.

Pages are of several sizes (see ``page_sizes``); wherever they are counted, it is in units of ``page_bytes``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from ..driver import Driver
from ..errors import DriverError, OutOfPages, VattnError
from .undo import Undo, is_incomplete


class Page:
    """One physical handle.

    Attributes:
        handle: the driver's.
        size: how many units it has, a power of two.
        maps: the addresses that it is mapped at, of its first byte; none while it is free.
        owners, stored: how many of these mappings live and stored sequences have; the others are parked, or what a
            failed undo left.
        dirty: whether an earlier owner may have written to it; such a page is zeroed before its next owner sees it.
        read_only: those of its addresses where it may only be read (see ``guard``).
    """

    __slots__ = ("dirty", "handle", "maps", "owners", "read_only", "size", "stored")

    def __init__(self, handle: int, size: int = 1) -> None:
        self.handle = handle
        self.size = size
        self.maps: list[int] = []
        self.owners = self.stored = 0
        self.dirty = False
        self.read_only: set[int] = set()

    @property
    def shared(self) -> bool:
        return len(self.maps) > 1 or bool(self.read_only)

    def __repr__(self) -> str:
        maps = [hex(address) for address in self.maps]
        return f"Page(handle={self.handle:#x}, size={self.size}, maps={maps}, dirty={self.dirty})"


class PhysicalPagePool:
    """Every page of one cache, conserved: created pages = mapped pages + free pages.

    Args:
        driver: where pages come from.
        page_bytes: a unit, a multiple of the driver's granularity.
        limit_bytes: physical memory is never more than this.

    Attributes:
        pages: all of them.
        num_pages, num_free: units that they have; and those that are mapped nowhere.
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
        self.num_pages = self.num_free = 0
        self._free: dict[int, list[Page]] = {}  # by size
        self.num_owned_maps = self.num_owned = self.num_shared = self.num_index = 0
        self.peak_pages = self.num_oom = 0

    @property
    def physical_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def free(self) -> list[Page]:
        """Those that are mapped nowhere."""
        return [page for pages in self._free.values() for page in pages]

    @property
    def num_available(self) -> int:
        """Pages that the limit still allows to be handed out; the device may have fewer."""
        return self.num_free + self.num_creatable

    @property
    def num_creatable(self) -> int:
        """Pages that the limit still allows to be created."""
        return max(0, self.limit_bytes // self.page_bytes - self.num_pages)

    def take(self, sizes: Sequence[int], undo: Undo) -> list[Page]:
        """A page of each size, mapped nowhere yet; free ones first. Undone, created ones go back to the driver.

        Where the limit or the device has no room for a page of one size, free ones of other sizes are released; these
        stay released, whatever becomes of the operation.

        Raises:
            OutOfPages: the limit or the device does not have that many.
            DriverError: a driver call failed.
        """
        asked = sum(sizes)
        if asked > self.num_available:
            raise self.out_of_pages(asked, "which memory_limit does not allow")
        reused: list[Page] = []
        created: list[Page] = []
        undo.push(self._untake, reused, created)
        wanted: dict[int, int] = {1: asked} if asked == len(sizes) else Counter(sizes)
        missing: dict[int, int] = {}
        for size, number in wanted.items():
            if free := self._free.get(size):
                kept = max(0, len(free) - number)
                reused += free[kept:]
                number -= len(free) - kept
                self.num_free -= size * (len(free) - kept)
                del free[kept:]
            if number:
                missing[size] = number
        for size, number in missing.items():
            self._create(size, number, created, asked)
        if len(wanted) == 1:
            return reused + created
        taken: dict[int, list[Page]] = {size: [] for size in wanted}
        for page in reused + created:
            taken[page.size].append(page)
        return [taken[size].pop() for size in sizes]

    def _create(self, size: int, number: int, created: list[Page], asked: int) -> None:
        """Append pages of one size to ``created``; ``asked`` is what the whole operation takes."""
        last = len(created) + number
        room = self.limit_bytes // self.page_bytes - self.num_pages
        if number * size > room:
            self._give_back(number * size - room)
        while len(created) < last:
            handles: list[int] = []
            try:
                self.driver.create_pages(size * self.page_bytes, last - len(created), handles)
            except DriverError as error:
                if not error.out_of_memory:
                    raise
                if not self.num_free:
                    raise self.out_of_pages(asked, f"which the device does not have ({error})") from error
            finally:
                new = [Page(handle, size) for handle in handles]
                created += new
                self.pages.update(new)
                self.num_pages += size * len(new)
                if self.num_pages > self.peak_pages:
                    self.peak_pages = self.num_pages
            if len(created) < last:
                self._give_back(size * (last - len(created)))

    def _give_back(self, count: int) -> None:
        """Release free pages until ``count`` are gone, or none is left; in as few calls as that takes, about."""
        end = self.num_free - count
        while (excess := self.num_free - end) > 0:
            sizes = [size for size, pages in self._free.items() if pages]
            if not sizes:
                return
            fitting = [size for size in sizes if size <= excess]
            pages = self._free[max(fitting) if fitting else min(sizes)]
            self._destroy(pages[-1])
            self.num_free -= pages.pop().size

    def _untake(self, reused: list[Page], created: list[Page]) -> None:
        # A page that is still mapped stays where it is: undoing its mapping failed.
        for page in reused:
            if not page.maps:
                self._add_free(page)
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
        self.num_pages -= page.size

    def _add_free(self, page: Page) -> None:
        self._free.setdefault(page.size, []).append(page)
        self.num_free += page.size

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

    def shortage(self, wait: bool = True) -> _Shortage:
        """Around an operation: a shortage of any kind raises OutOfPages, and is counted if the operation may ``wait``.

        Raises:
            DriverError: instead, where not everything is as it was; callers go on after a shortage.
        """
        return _Shortage(self, wait)

    def gain(self, pages: Sequence[Page]) -> None:
        """A live sequence has each of these pages now, at one address more."""
        num_maps = num_first = num_second = 0
        for page in pages:
            size = page.size
            num_maps += size
            page.owners += 1
            if page.owners == 1:
                num_first += size
                self.num_index -= size if page.stored else 0
            elif page.owners == 2:
                num_second += size
        self.num_owned_maps += num_maps
        self.num_owned += num_first
        self.num_shared += num_second

    def lose(self, pages: Sequence[Page]) -> None:
        """Each of these pages has one owner less."""
        num_maps = num_last = num_second = 0
        for page in pages:
            size = page.size
            num_maps += size
            page.owners -= 1
            if page.owners == 0:
                num_last += size
                self.num_index += size if page.stored else 0
            elif page.owners == 1:
                num_second += size
        self.num_owned_maps -= num_maps
        self.num_owned -= num_last
        self.num_shared -= num_second

    def store(self, pages: Sequence[Page]) -> None:
        """A stored sequence has each of these pages now."""
        for page in pages:
            page.stored += 1
            self.num_index += page.size if page.stored == 1 and not page.owners else 0

    def unstore(self, pages: Sequence[Page]) -> None:
        """A stored sequence has none of these pages any more."""
        for page in pages:
            page.stored -= 1
            self.num_index -= page.size if not page.stored and not page.owners else 0

    def recount(self, owned: Sequence[Page]) -> None:
        """Begin the count of owners anew, with every page that a live sequence has, once for each of its addresses."""
        for page in self.pages:
            page.owners = 0
        self.num_owned_maps = self.num_owned = self.num_shared = 0
        self.num_index = sum(page.size for page in self.pages if page.stored)
        self.gain(owned)

    def put_back(self, page: Page) -> None:
        """Make a page free if nothing maps it any more; its content is an earlier owner's."""
        if not page.maps:
            page.dirty = True
            self._add_free(page)

    def put_back_lost(self, page: Page) -> None:
        """After an undo: make a page free that was mapped before, and is not any more."""
        if not page.maps and page not in self._free.get(page.size, ()):
            self.put_back(page)

    def trim(self, keep_bytes: int = 0) -> int:
        """Give free pages back to the driver, but for ``keep_bytes`` of them at most. Returns the bytes given back."""
        before = self.physical_bytes
        self._give_back(self.num_free - keep_bytes // self.page_bytes)
        return before - self.physical_bytes

    def release_unmapped(self) -> list[DriverError]:
        """Before the end: give back every page that is mapped nowhere. Goes on past failures, and returns them."""
        failures: list[DriverError] = []
        for page in tuple(self.pages):
            if not page.maps:
                try:
                    self._destroy(page)
                except DriverError as error:
                    failures.append(error)
        for pages in self._free.values():
            pages[:] = [page for page in pages if page in self.pages]
        self.num_free = sum(page.size for page in self.free)
        return failures

    def check_integrity(self) -> None:
        """Each page is free or mapped, once; the limit holds; the system counts what we count."""
        free = self.free
        assert len(set(free)) == len(free), "a page is on the free list twice"
        assert all(page in self.pages and not page.maps for page in free), "a mapped or lost page is free"
        assert all(page.size == size for size, pages in self._free.items() for page in pages), "a free page is misfiled"
        num_mapped = sum(1 for page in self.pages if page.maps)
        assert num_mapped + len(free) == len(self.pages), "a page is neither free nor mapped"
        sizes = [page.size for page in self.pages]
        assert all(size & (size - 1) == 0 < size for size in sizes), "a page's size is no power of two"
        assert self.num_pages == sum(sizes), "the count of pages is off"
        assert self.num_free == sum(page.size for page in free), "the count of free pages is off"
        owners = [(page.owners, page.size) for page in self.pages]
        assert self.num_owned_maps == sum(number * size for number, size in owners), (
            "the count of mappings that sequences have is off"
        )
        assert self.num_owned == sum(size for number, size in owners if number), "the count of pages in use is off"
        assert self.num_shared == sum(size for number, size in owners if number > 1), "the count of shared pages is off"
        num_index = sum(page.size for page in self.pages if page.stored and not page.owners)
        assert self.num_index == num_index, "the count of pages that only stored sequences have is off"
        assert self.physical_bytes <= self.limit_bytes, "more physical memory than the limit allows"
        allocated = self.driver.allocated_bytes()
        assert allocated is None or allocated == self.physical_bytes, (
            f"the system has {allocated} bytes allocated for this cache, the pool counts {self.physical_bytes}"
        )


class _Shortage:
    """See ``PhysicalPagePool.shortage``. A class, since it is around every growth: a generator takes thrice as long."""

    __slots__ = ("_pool", "_wait")

    def __init__(self, pool: PhysicalPagePool, wait: bool) -> None:
        self._pool, self._wait = pool, wait

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pool = self._pool
        if isinstance(error, OutOfPages):
            if is_incomplete(error):
                fault = DriverError("undo", "INCOMPLETE", f"rows are lost, for this could not be undone: {error}")
                fault.undo_incomplete = True  # type: ignore[attr-defined]
                raise _with_notes(fault, error) from error
            pool.num_oom += self._wait
        elif isinstance(error, DriverError) and error.out_of_memory and not is_incomplete(error):
            pool.num_oom += self._wait
            out = OutOfPages(
                f"the system ran out of what mapping pages takes: {error}; {pool.physical_bytes} bytes are taken, "
                f"memory_limit is {pool.limit_bytes} bytes",
                free_bytes=pool.num_available * pool.page_bytes,
                limit_bytes=pool.limit_bytes,
            )
            raise _with_notes(out, error) from error


def _with_notes(error: VattnError, cause: VattnError) -> VattnError:
    for note in getattr(cause, "__notes__", ()):
        error.add_note(note)
    return error
