"""The interface that every driver keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from ..stats import CallCounts, EventLog


@runtime_checkable
class Fence(Protocol):
    """A point in the work submitted to a stream.

    Of two fences in one stream, the later one covers the earlier one.

    Attributes:
        stream: a number that identifies the stream. No other stream ever has the same number, not even after this one
            was destroyed.
    """

    stream: int

    def done(self) -> bool:
        """Whether all work before the point has ended. Does not wait."""

    def wait(self) -> None:
        """Block the host until all work before the point has ended."""


@runtime_checkable
class Driver(Protocol):
    """Virtual memory with the operations that the CUDA driver has.

    A call that fails raises ``DriverError`` and changes nothing. Addresses and handles are ints. Sizes are in bytes. A
    driver belongs to one cache, whose lock guards it; but ``fence``, ``order_after`` and ``is_capturing`` are called
    beside other calls.

    Attributes:
        name: ``"cuda"``, ``"host"`` or ``"ledger"``.
        device: the device of tensors over its addresses.
        granularity_bytes: every size and every address is a multiple of this.
        default_page_bytes: size of a handle where the user gives none.
        counts: calls that succeeded, by kind.
        log: the newest calls.
    """

    name: str
    device: torch.device
    granularity_bytes: int
    default_page_bytes: int
    counts: CallCounts
    log: EventLog

    def reserve(self, size_bytes: int) -> int:
        """Reserve a range of addresses without memory; returns its first address."""

    def free_range(self, address: int, size_bytes: int) -> None:
        """Free a reserved range. It must be the whole range, with nothing mapped in it."""

    def create(self, size_bytes: int) -> int:
        """Allocate physical memory that is zero; returns its handle."""

    def release(self, handle: int) -> None:
        """Release a handle. Its memory is freed when it is mapped nowhere any more."""

    def create_pages(self, size_bytes: int, count: int, done: list[int]) -> None:
        """Call ``create`` ``count`` times. Stops at the first failure.

        The handles are appended to ``done``: after a failure, those that were made before it.
        """

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        """Map a whole handle at an address. It can be accessed after ``set_access``."""

    def map_pages(self, size_bytes: int, addresses: Sequence[int], handles: Sequence[int], done: list[int]) -> None:
        """Call ``map`` and ``set_access`` for one handle after another. Stops at the first failure.

        Args:
            size_bytes: size of each handle.
            addresses, handles: the i-th handle is mapped at the i-th address.
            done: the addresses that were mapped are appended. So after a failure it has those to unmap. The last of
                them may be without access then.

        Raises:
            ValueError: there are not as many addresses as handles. Nothing is mapped.
        """

    def set_access(self, address: int, size_bytes: int, writable: bool = True) -> None:
        """Allow reads, and writes unless ``writable`` is False. The range must consist of whole mapped handles.

        Does **not** wait for work: a kernel that uses the range meanwhile may fault, even one that only reads. A write
        to memory that may only be read ends the process on the CPU, and its CUDA context on a GPU.
        """

    def unmap(self, address: int, size_bytes: int) -> None:
        """Unmap whole handles. Does **not** wait for work that may still use them."""

    def export_handle(self, handle: int) -> int:
        """A file descriptor that stands for a handle, for another process of this machine.

        The caller sends it over a Unix socket (``socket.send_fds``) and closes it. On the host driver the first export
        moves the bytes into a file of their own, which shows nothing else: nobody may write to the handle meanwhile.

        Raises:
            DriverError: the handle is not live or was imported (CUDA exports only what its own process made: pass the
                file descriptor on instead), or the system cannot do this (``NOT_SUPPORTED``).
        """

    def import_handle(self, fd: int, size_bytes: int) -> int:
        """A new handle of memory that a driver of the same kind exported, in another process or in this one.

        It is mapped, with or without write access, and released as any other. The memory stays until every process has
        released it, whoever made it, and does not count into ``allocated_bytes``. The caller closes ``fd``, at once if
        it likes.

        Args:
            size_bytes: size of the exported handle.

        Raises:
            DriverError: ``fd`` is no exported handle of that size (CUDA says so of the size when it is mapped), or this
                driver has that memory already and the system cannot tell the two apart.
        """

    def zero(self, address: int, size_bytes: int) -> None:
        """Fill a range with zeros, on the current stream."""

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy ``size_bytes`` from ``source`` to ``target``, on the current stream."""

    def fence(self) -> Fence | None:
        """A fence after everything submitted to the current stream. None where work is never asynchronous."""

    def order_after(self, fence: Fence) -> None:
        """Make the current stream wait for the fence. The host does not wait."""

    def synchronize(self) -> None:
        """Block the host until all work on the device has ended. Used when a cache is closed, and by ``guard``."""

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph."""

    def memory_info(self) -> tuple[int, int]:
        """The device's memory: (available, total) in bytes."""

    def allocated_bytes(self) -> int | None:
        """Physical memory of this driver in bytes, as the system counts it. None where the system cannot tell."""

    def close(self) -> None:
        """Close the driver's files. Idempotent. ``free_range`` works afterwards too."""
