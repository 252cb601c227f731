"""CUDA's rules for virtual memory, checked before each call.

The CUDA driver checks most of them itself. But it unmaps ranges with holes without an error, and it crashes on a handle
that was released already. ``mmap`` checks almost none. These checks run before every driver's calls, so all drivers
behave alike:

* sizes and addresses are multiples of the granularity;
* a handle is mapped whole, at any number of addresses, never over another mapping;
* access is set for whole handles;
* nothing is written to what may only be read;
* the range of an ``unmap`` consists of whole mappings;
* an address range is freed as a whole, when nothing is mapped in it;
* the memory of a released handle stays until its last mapping is removed, but it cannot be mapped again;
* a handle that was imported is not exported again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd

from ..errors import DriverError


@dataclass(slots=True)
class Handle:
    size_bytes: int
    num_maps: int = 0
    released: bool = False
    imported: bool = False


@dataclass(slots=True)
class Mapping:
    address: int
    size_bytes: int
    handle: int
    accessible: bool = False
    writable: bool = False

    @property
    def end(self) -> int:
        return self.address + self.size_bytes


@dataclass(slots=True)
class RuleBook:
    """What a driver has reserved, created and mapped; and checks of whether a call is allowed.

    A check raises ``DriverError`` with the code ``INVALID_VALUE`` where the call is not allowed.

    Attributes:
        granularity_bytes: every size and every address is a multiple of this.
        ranges: bytes of each reserved range, by its first address.
        handles: those that still have memory.
        mappings: by address.
    """

    granularity_bytes: int
    ranges: dict[int, int] = field(default_factory=dict)
    handles: dict[int, Handle] = field(default_factory=dict)
    mappings: dict[int, Mapping] = field(default_factory=dict)
    # Every mapping consists of tiles, of the largest size that divides all their sizes and their distances from the
    # starts of their ranges: a cache's page_bytes. So the mapping of an address is found by rounding the address down:
    # its first tile is in ``mappings``, the others of a larger mapping are here.
    _tile_bytes: int = 0
    _inner_tiles: dict[int, Mapping] = field(default_factory=dict)

    def _refuse(self, call: str, why: str) -> DriverError:
        return DriverError(call, "INVALID_VALUE", why)

    def check_size(self, call: str, size_bytes: int) -> None:
        if size_bytes <= 0 or size_bytes % self.granularity_bytes:
            raise self._refuse(call, f"size {size_bytes} is no positive multiple of {self.granularity_bytes} bytes")

    # -- address ranges ------------------------------------------------------------------------------------------
    def check_free_range(self, address: int, size_bytes: int) -> None:
        if self.ranges.get(address) != size_bytes:
            raise self._refuse("free_range", f"no range of {size_bytes} bytes is reserved at {address:#x}")
        if any(address <= each < address + size_bytes for each in self.mappings):
            raise self._refuse("free_range", f"pages are still mapped in the range at {address:#x}")

    # -- handles -------------------------------------------------------------------------------------------------
    def check_create(self, size_bytes: int) -> None:
        self.check_size("create", size_bytes)
        if size_bytes >> 63:  # would wrap around on its way into C
            raise DriverError("create", "OUT_OF_MEMORY", f"no machine has {size_bytes} bytes", out_of_memory=True)

    def check_export(self, handle: int) -> Handle:
        entry = self.handles.get(handle)
        if entry is None or entry.released:
            raise self._refuse("export_handle", f"handle {handle:#x} is not live")
        if entry.imported:
            raise self._refuse(
                "export_handle",
                f"handle {handle:#x} was imported, and only the process that made it can export it: pass on a "
                "duplicate of the file descriptor that it was imported from",
            )
        return entry

    def check_release(self, handle: int) -> Handle:
        entry = self.handles.get(handle)
        if entry is None or entry.released:
            raise self._refuse("release", f"handle {handle:#x} is not live")
        return entry

    def release(self, handle: int) -> None:
        entry = self.handles[handle]
        entry.released = True
        if not entry.num_maps:
            del self.handles[handle]

    # -- mappings ------------------------------------------------------------------------------------------------
    def check_map(self, address: int, size_bytes: int, handle: int) -> int:
        """Returns the first address of the range that it lies in."""
        entry = self.handles.get(handle)
        if entry is None or entry.released:
            raise self._refuse("map", f"handle {handle:#x} is not live")
        if size_bytes != entry.size_bytes:
            raise self._refuse("map", f"a handle of {entry.size_bytes} bytes is mapped whole, not {size_bytes} bytes")
        if address % self.granularity_bytes:
            raise self._refuse("map", f"address {address:#x} is no multiple of {self.granularity_bytes}")
        base = self._range_of(address, size_bytes)
        if base is None:
            raise self._refuse("map", f"[{address:#x}, +{size_bytes}) lies in no reserved range")
        if self._tile_bytes and self._touching(address, size_bytes, base):
            raise self._refuse("map", f"[{address:#x}, +{size_bytes}) is mapped already")
        return base

    def map(self, address: int, size_bytes: int, handle: int, base: int) -> Mapping:
        """``base``: of its range, as ``check_map`` said."""
        mapping = Mapping(address, size_bytes, handle)
        tile_bytes = self._tile_bytes
        if size_bytes != tile_bytes or (address - base) % tile_bytes:
            self._lay(mapping, base)
        self.mappings[address] = mapping
        self.handles[handle].num_maps += 1
        return mapping

    def whole_mappings(self, call: str, address: int, size_bytes: int) -> list[Mapping]:
        """The mappings that make up ``[address, address + size_bytes)``, without gaps and without more."""
        whole = self.mappings.get(address)
        if whole is not None and whole.size_bytes == size_bytes:
            return [whole]
        self.check_size(call, size_bytes)
        found, cursor, end = [], address, address + size_bytes
        while cursor < end:
            mapping = self.mappings.get(cursor)
            if mapping is None or mapping.end > end:
                raise self._refuse(call, f"[{address:#x}, +{size_bytes}) is not made of whole mapped handles")
            found.append(mapping)
            cursor = mapping.end
        return found

    def unmap(self, mapping: Mapping) -> bool:
        """Remove a mapping. Returns True if it was the last one of a handle that was released before."""
        del self.mappings[mapping.address]
        if mapping.size_bytes != self._tile_bytes:
            for tile in self._inner(mapping):
                del self._inner_tiles[tile]
        entry = self.handles[mapping.handle]
        entry.num_maps -= 1
        gone = entry.released and not entry.num_maps
        if gone:
            del self.handles[mapping.handle]
        return gone

    def check_accessible(self, call: str, address: int, size_bytes: int, writing: bool = True) -> None:
        """Check that every byte of the range is mapped and may be read, and, if ``writing``, written."""
        cursor, end = address, address + size_bytes
        if size_bytes <= 0:
            raise self._refuse(call, f"size {size_bytes} is not positive")
        while cursor < end:
            mapping = self._at(cursor)
            if mapping is None or not mapping.accessible:
                raise self._refuse(
                    call, f"address {cursor:#x} is " + ("not mapped" if mapping is None else "not accessible")
                )
            if writing and not mapping.writable:
                raise self._refuse(call, f"address {cursor:#x} may only be read")
            cursor = mapping.end

    def _range_of(self, address: int, size_bytes: int) -> int | None:
        """First address of the reserved range that contains ``[address, address + size_bytes)``; None if none does."""
        for base, size in self.ranges.items():  # one for each group of layers
            if base <= address and address + size_bytes <= base + size:
                return base
        return None

    def _lay(self, mapping: Mapping, base: int) -> None:
        """Note the tiles of a mapping that is not one; smaller ones from now on if it does not consist of them."""
        tile_bytes = gcd(self._tile_bytes, mapping.size_bytes, mapping.address - base)
        laid = [mapping]
        if tile_bytes != self._tile_bytes:
            self._tile_bytes = tile_bytes
            self._inner_tiles.clear()
            laid += self.mappings.values()
        self._inner_tiles.update((tile, each) for each in laid for tile in self._inner(each))

    def _inner(self, mapping: Mapping) -> range:
        return range(mapping.address + self._tile_bytes, mapping.end, self._tile_bytes)

    def _at(self, address: int) -> Mapping | None:
        """The mapping that contains ``address``, or None."""
        base = self._range_of(address, 1)
        if base is None or not self._tile_bytes:
            return None
        tile = address - (address - base) % self._tile_bytes
        return self.mappings.get(tile) or self._inner_tiles.get(tile)

    def _touching(self, address: int, size_bytes: int, base: int) -> bool:
        """Whether anything is mapped in ``[address, address + size_bytes)``, of the range that begins at ``base``."""
        tile_bytes = self._tile_bytes
        if size_bytes == tile_bytes and not (address - base) % tile_bytes:
            return address in self.mappings or address in self._inner_tiles
        first = address - (address - base) % tile_bytes
        return any(
            tile in self.mappings or tile in self._inner_tiles
            for tile in range(first, address + size_bytes, tile_bytes)
        )
