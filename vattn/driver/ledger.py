"""A driver without memory, which keeps the books only: for capacity studies larger than the machine."""

from __future__ import annotations

from itertools import count

import torch

from ..errors import ConfigError, DriverError
from .ruled import RuledDriver

_FIRST_ADDRESS = 1 << 32
_ADDRESS_END = 1 << 47


class LedgerDriver(RuledDriver):
    """Simulates a device of any size: ``KVCache(layout, 1024, driver=LedgerDriver(60 << 30))``.

    Its tensors are on the meta device: they have shapes and strides, and no data.

    Args:
        total_bytes: physical memory of the simulated device.
        granularity_bytes: sizes and addresses are multiples of this. A power of two.

    Raises:
        ConfigError: ``total_bytes`` is not positive, or ``granularity_bytes`` is no power of two.
    """

    name = "ledger"

    def __init__(self, total_bytes: int = 80 << 30, granularity_bytes: int = 2 << 20) -> None:
        if total_bytes <= 0 or granularity_bytes <= 0 or granularity_bytes & (granularity_bytes - 1):
            raise ConfigError(
                f"total_bytes must be positive and granularity_bytes a power of two, got {total_bytes} and "
                f"{granularity_bytes}"
            )
        self.device = torch.device("meta")
        self.granularity_bytes = self.default_page_bytes = granularity_bytes
        self.total_bytes = total_bytes
        self._taken_bytes = 0
        self._next_address = _FIRST_ADDRESS
        self._new_handle = count(1).__next__
        super().__init__()

    def _reserve(self, size_bytes: int) -> int:
        if self._next_address + size_bytes > _ADDRESS_END:
            raise DriverError("reserve", "OUT_OF_MEMORY", "no addresses left", out_of_memory=True)
        address, self._next_address = self._next_address, self._next_address + size_bytes
        return address

    def _free_range(self, address: int, size_bytes: int) -> None:
        pass

    def _create(self, size_bytes: int) -> int:
        if self._taken_bytes + size_bytes > self.total_bytes:
            free = self.total_bytes - self._taken_bytes
            raise DriverError("create", "OUT_OF_MEMORY", f"{free} bytes are free", out_of_memory=True)
        self._taken_bytes += size_bytes
        return self._new_handle()

    def _release(self, handle: int, size_bytes: int, still_mapped: bool) -> None:
        if not still_mapped:
            self._taken_bytes -= size_bytes

    def _map(self, address: int, size_bytes: int, handle: int) -> None:
        pass

    def _set_access(self, address: int, size_bytes: int, writable: bool) -> None:
        pass

    def _unmap(self, address: int, size_bytes: int) -> None:
        pass

    def _after_unmap(self, freed: list[tuple[int, int]]) -> None:
        self._taken_bytes -= sum(size_bytes for _, size_bytes in freed)

    def _export(self, handle: int, size_bytes: int) -> int:
        raise DriverError("export_handle", "NOT_SUPPORTED", "a ledger has no memory to share")

    def _import(self, fd: int, size_bytes: int) -> int:
        raise DriverError("import_handle", "NOT_SUPPORTED", "a ledger has no memory to share")

    def _zero(self, address: int, size_bytes: int) -> None:
        pass

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        pass

    def memory_info(self) -> tuple[int, int]:
        return self.total_bytes - self._taken_bytes, self.total_bytes

    def allocated_bytes(self) -> int | None:
        return self._taken_bytes

    def close(self) -> None:
        pass
