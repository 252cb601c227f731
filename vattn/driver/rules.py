"""CUDA's rules for virtual memory, checked before any call is made.

The CUDA driver enforces most of them itself, yet it unmaps holes without a word and crashes on a handle that was
already released; ``mmap`` enforces almost none. One rule book in front of every driver makes them behave alike:

* sizes and addresses are multiples of the granularity;
* a handle is mapped whole, at any number of addresses, never over another mapping;
* access is granted and taken away on whole handles;
* ``unmap`` names exactly the mappings that it removes;
* an address range is freed whole, when nothing is mapped in it;
* a released handle lives on until its last mapping goes, but cannot be mapped again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import DriverError

_BUCKET_SHIFT = 21  # mappings are looked up by the 2 MiB stretches they touch


@dataclass(slots=True)
class Handle:
    size_bytes: int
    num_maps: int = 0
    released: bool = False


@dataclass(slots=True)
class Mapping:
    address: int
    size_bytes: int
    handle: int
    accessible: bool = False

    @property
    def end(self) -> int:
        return self.address + self.size_bytes


@dataclass(slots=True)
class RuleBook:
    """What a driver has reserved, created and mapped, and whether a call on it is allowed."""

    granularity_bytes: int
    ranges: dict[int, int] = field(default_factory=dict)
    handles: dict[int, Handle] = field(default_factory=dict)
    mappings: dict[int, Mapping] = field(default_factory=dict)
    # As long as every mapping is a tile of one size on one grid, as in a cache, ``mappings`` alone says what is where;
    # the first that is not moves the look-up to buckets.
    _tile_bytes: int = 0
    _tile_phase: int = 0
    _buckets: dict[int, list[Mapping]] | None = None

    def _refuse(self, call: str, why: str) -> DriverError:
        return DriverError(call, "INVALID_VALUE", why)

    def check_size(self, call: str, size_bytes: int) -> None:
        if size_bytes <= 0 or size_bytes % self.granularity_bytes:
            raise self._refuse(call, f"size {size_bytes} is no positive multiple of {self.granularity_bytes} bytes")

    # -- address ranges ------------------------------------------------------------------------------------------
    def check_free_range(self, address: int, size_bytes: int) -> None:
        if self.ranges.get(address) != size_bytes:
            raise self._refuse("free_range", f"no range of {size_bytes} bytes is reserved at {address:#x}")
        if self._touching(address, size_bytes):
            raise self._refuse("free_range", f"pages are still mapped in the range at {address:#x}")

    # -- handles -------------------------------------------------------------------------------------------------
    def check_create(self, size_bytes: int) -> None:
        self.check_size("create", size_bytes)
        if size_bytes >> 63:  # would wrap around on its way into C
            raise DriverError("create", "OUT_OF_MEMORY", f"no machine has {size_bytes} bytes", out_of_memory=True)

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
    def check_map(self, address: int, size_bytes: int, handle: int) -> None:
        entry = self.handles.get(handle)
        if entry is None or entry.released:
            raise self._refuse("map", f"handle {handle:#x} is not live")
        if size_bytes != entry.size_bytes:
            raise self._refuse("map", f"a handle of {entry.size_bytes} bytes is mapped whole, not {size_bytes} bytes")
        if address % self.granularity_bytes:
            raise self._refuse("map", f"address {address:#x} is no multiple of {self.granularity_bytes}")
        for base, size in self.ranges.items():
            if base <= address and address + size_bytes <= base + size:
                break
        else:
            raise self._refuse("map", f"[{address:#x}, +{size_bytes}) lies in no reserved range")
        # The usual case without a call: every mapping is a tile, and so is this one.
        if self._buckets is None and size_bytes == self._tile_bytes and address % size_bytes == self._tile_phase:
            taken = address in self.mappings
        else:
            taken = self._touching(address, size_bytes)
        if taken:
            raise self._refuse("map", f"[{address:#x}, +{size_bytes}) is mapped already")

    def map(self, address: int, size_bytes: int, handle: int) -> Mapping:
        mapping = Mapping(address, size_bytes, handle)
        if not self.mappings and self._buckets is None:
            self._tile_bytes, self._tile_phase = size_bytes, address % size_bytes
        elif self._buckets is None and not self._is_tile(address, size_bytes):
            self._buckets = {}
            for earlier in self.mappings.values():
                self._add_to_buckets(self._buckets, earlier)
        self.mappings[address] = mapping
        if self._buckets is not None:
            self._add_to_buckets(self._buckets, mapping)
        self.handles[handle].num_maps += 1
        return mapping

    def _is_tile(self, address: int, size_bytes: int) -> bool:
        return size_bytes == self._tile_bytes and address % size_bytes == self._tile_phase

    def _add_to_buckets(self, buckets: dict[int, list[Mapping]], mapping: Mapping) -> None:
        for bucket in self._bucket_range(mapping.address, mapping.size_bytes):
            buckets.setdefault(bucket, []).append(mapping)

    def whole_mappings(self, call: str, address: int, size_bytes: int) -> list[Mapping]:
        """The mappings that tile ``[address, address + size_bytes)`` exactly."""
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
        """Forget a mapping. Returns whether its handle, released earlier, is gone with it."""
        del self.mappings[mapping.address]
        if self._buckets is not None:
            for bucket in self._bucket_range(mapping.address, mapping.size_bytes):
                entries = self._buckets[bucket]
                entries.remove(mapping)
                if not entries:
                    del self._buckets[bucket]
        entry = self.handles[mapping.handle]
        entry.num_maps -= 1
        gone = entry.released and not entry.num_maps
        if gone:
            del self.handles[mapping.handle]
        return gone

    def check_accessible(self, call: str, address: int, size_bytes: int) -> None:
        """Every byte of the range is mapped and may be read and written."""
        cursor, end = address, address + size_bytes
        if size_bytes <= 0:
            raise self._refuse(call, f"size {size_bytes} is not positive")
        while cursor < end:
            mapping = self._at(cursor)
            if mapping is None or not mapping.accessible:
                raise self._refuse(
                    call, f"address {cursor:#x} is " + ("not mapped" if mapping is None else "not accessible")
                )
            cursor = mapping.end

    def _at(self, address: int) -> Mapping | None:
        """The mapping that ``address`` lies in."""
        if self._buckets is None:
            size, phase = self._tile_bytes or 1, self._tile_phase
            return self.mappings.get((address - phase) // size * size + phase)
        found = self._buckets.get(address >> _BUCKET_SHIFT, ())
        return next((mapping for mapping in found if mapping.address <= address < mapping.end), None)

    def _touching(self, address: int, size_bytes: int) -> bool:
        """Whether anything is mapped in ``[address, address + size_bytes)``."""
        if self._buckets is None and self._is_tile(address, size_bytes):
            return address in self.mappings
        end = address + size_bytes
        if self._buckets is None or size_bytes >> _BUCKET_SHIFT > len(self._buckets):  # a wide range over few mappings
            return any(m.address < end and address < m.end for m in self.mappings.values())
        return any(
            m.address < end and address < m.end
            for bucket in self._bucket_range(address, size_bytes)
            for m in self._buckets.get(bucket, ())
        )

    @staticmethod
    def _bucket_range(address: int, size_bytes: int) -> range:
        return range(address >> _BUCKET_SHIFT, ((address + size_bytes - 1) >> _BUCKET_SHIFT) + 1)
