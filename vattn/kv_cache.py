"""``KVCache``: sequences in slots, K and V views at fixed addresses, pages mapped as sequences grow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType

import numpy as np
import torch

from .arguments import is_int, optional_int, require_bool, require_int
from .driver import Driver, open_driver
from .errors import ConfigError
from .layout import KVLayout
from .memory.backing import Backing
from .memory.integrity import cache_stats, check_integrity
from .memory.lock import FairLock, locked
from .memory.opened import Opened
from .memory.planner import OverRead
from .memory.slots import Slots
from .memory.steps import Steps
from .memory.tensors import BackedRows
from .stats import CacheStats, Event
from .stored import StoredSequences, give_back

__all__ = ["KVCache"]


class KVCache(StoredSequences):
    """The K and V of up to ``max_slots`` sequences, in tensors that never move.

    A slot owns a fixed address range for ``layout.max_seq_len`` tokens; physical pages come as its sequence grows, go
    when it is truncated, and after its release stay for the slot's next sequence until they are needed elsewhere. Every
    method is thread-safe: threads take turns, but for ``step``, which waits only for what is done to its own slots. A
    method that fails leaves everything as it was.

    Args:
        layout: shape of the model's K and V.
        max_slots: sequences that can be live at once.
        device: ``"cuda"``, ``"cuda:i"`` or ``"cpu"``.
        memory_limit: bytes of physical memory; None: 90 % of what the device has free now.
        page_bytes: size of a page, a multiple of the driver's granularity; None: the granularity on CUDA, 2 MiB on
            the CPU.
        max_page_bytes: rows that one call asks for may get larger pages, of up to so many bytes: ``page_bytes`` times
            a power of two. They take fewer driver calls, and ``fork`` copies more where it cuts one. None: all
            pages have ``page_bytes``.
        over_read_tokens: rows past the end of a sequence that kernels may read (an attention backend declares it).
            They stay mapped, and count as waste.
        over_read_masked: whether what lies in those rows can never reach an output. If it can, growing wipes them of
            what an older, longer self of the sequence left there.
        guard: whether the hardware refuses writes to shared pages. A page that is mapped in two or more slots is
            read-only in each of them: a kernel that writes to it faults, which ends the process on the CPU, and its
            CUDA context on a GPU. ``fork`` takes more driver calls, and waits for the work on what it shares.
        driver: instead of the device's own; the cache closes it.

    Raises:
        ConfigError: an argument is wrong or the device is not available; says what would be accepted.
    """

    def __init__(
        self,
        layout: KVLayout,
        max_slots: int,
        device: str | torch.device = "cuda",
        memory_limit: int | None = None,
        *,
        page_bytes: int | None = None,
        max_page_bytes: int | None = None,
        over_read_tokens: int = 0,
        over_read_masked: bool = False,
        guard: bool = False,
        driver: Driver | None = None,
    ) -> None:
        self._lock = FairLock()
        self._opened = Opened()
        if not isinstance(layout, KVLayout):
            raise ConfigError(f"layout must be a vattn.KVLayout, got {layout!r}")
        self.layout = layout
        self.max_slots = require_int("max_slots", max_slots, 1)
        memory_limit = optional_int("memory_limit", memory_limit, 1)
        page_bytes = optional_int("page_bytes", page_bytes, 1)
        max_page_bytes = optional_int("max_page_bytes", max_page_bytes, 1)
        self.over_read_tokens = require_int("over_read_tokens", over_read_tokens, 0)
        self.over_read_masked = require_bool("over_read_masked", over_read_masked) or not over_read_tokens
        self.guard = require_bool("guard", guard)
        if driver is None:
            driver = open_driver(device)
        elif isinstance(driver, type) or not callable(getattr(driver, "reserve", None)):
            raise ConfigError(f"driver must be a vattn.driver.Driver, LedgerDriver(1 << 40) for one, got {driver!r}")
        over_read = OverRead(self.over_read_tokens, self.over_read_masked)
        try:
            backing = Backing(
                driver, layout, self.max_slots, page_bytes, max_page_bytes, memory_limit, over_read, guard
            )
        except BaseException:
            driver.close()
            raise
        self.driver, self.device = driver, driver.device
        self.page_bytes, self.max_page_bytes = backing.page_bytes, backing.max_page_bytes
        self.memory_limit = backing.pool.limit_bytes
        self._k, self._v = backing.views(layout.dtype)
        self._backed_rows = BackedRows(backing)
        self._opened.or_none = Slots(backing, driver, self.max_slots, layout.max_seq_len, self._lock)
        self._steps = Steps(self._opened, self._lock)

    # -- sequences -----------------------------------------------------------------------------------------------
    @locked(give_back=give_back)
    def acquire(self, slot: int | None = None, *, expect_len: int | None = None) -> int:
        """Take a slot for a new, empty sequence: the one named, or the free one that fits it best.

        That is the one with the most pages, left mapped by its last sequence, that ``expect_len`` rows can use; then
        with the fewest more; then the lowest.

        Args:
            expect_len: rows that the sequence may come to; None: any number. Only the choice depends on it.

        Raises:
            OutOfSlots: none is free, or the one named is not.
            ConfigError: there is no such slot.
        """
        slots = self._slots
        if expect_len is not None:
            expect_len = require_int("expect_len", expect_len, 0, self.layout.max_seq_len)
        slot = slots.find_free(slot, expect_len)
        slots.start(slot)
        return slot

    @locked(waits_outside=True)
    def ensure(self, slot: int, seq_len: int) -> None:
        """Back rows ``[0, seq_len)`` of a slot; new rows are private and writable. Never shrinks.

        Rows that no one wrote since the slot was acquired read as zeros.

        Raises:
            OutOfPages: the pages it takes do not fit in the memory limit.
            ConfigError: the slot is not live; ``seq_len`` is negative or beyond ``layout.max_seq_len``; a shared page
                must be copied while a step is open on the slot; or a page must be mapped during graph capture.
        """
        slots = self._slots
        slot = slots.live(slot)
        seq_len = require_int("seq_len", seq_len, 0, self.layout.max_seq_len)
        if seq_len > slots.reach[slot]:
            slots.grow([(slot, seq_len)])
        elif seq_len > slots.seq_len[slot]:
            slots.seq_len[slot] = seq_len

    @locked(waits_outside=True)
    def ensure_batch(
        self,
        slots: Sequence[int] | np.ndarray,
        seq_lens: Sequence[int] | np.ndarray,
        *,
        wait: bool = True,
        versions: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """``ensure`` for many slots at once, all or nothing. Sequences or int64 arrays of one length.

        Args:
            wait: False, for mapping ahead, does without pages that could only be had by waiting for the GPU; being
                refused then does not count into ``num_oom``.
            versions: as for ``step``.

        Raises:
            OutOfPages, ConfigError: as ``ensure``; ConfigError too when a slot is named twice.
        """
        state = self._slots
        index = state.all_live(slots, versions)
        state.ensure(index, state.lengths(index, seq_lens), wait)

    @locked(waits_outside=True, give_back=give_back)
    def fork(
        self, slot: int, seq_len: int | None = None, into: int | None = None, *, version: int | None = None
    ) -> int:
        """A new slot whose first ``seq_len`` rows (None: all) are those of ``slot``, sharing every whole page of them.

        Shared rows are read-only for both: call ``make_writable`` before writing to them in place. Rows that ``ensure``
        adds are private.

        With ``guard``, the host waits for the work on ``slot`` before pages of it become read-only. They stay so, after
        a ``release`` too, until ``ensure`` or ``make_writable`` asks to write there; if all others have ended by then,
        without a copy.

        Args:
            into: the free slot to use; None: that with the fewest pages left mapped, which would be in the way.
            version: of the slot, as ``versions`` or ``stored`` said: refuse another one. A stored sequence can be
                forked only so.

        Raises:
            OutOfSlots, OutOfPages: as ``acquire`` and ``ensure``.
            ConfigError: ``seq_len`` is negative or beyond the slot's own; or, with ``guard``, pages that were its own
                alone are to be shared while a step is open on it.
        """
        slots = self._slots
        slot, rows = slots.parent(slot, seq_len, version)
        return slots.fork(slot, into, rows)

    @locked(waits_outside=True)
    def truncate(self, slot: int, seq_len: int) -> None:
        """Shorten a sequence and give back every whole page past it.

        Raises:
            ConfigError: ``seq_len`` is negative or beyond the slot's own.
        """
        slots = self._slots
        slot = slots.live(slot)
        slots.truncate(slot, slots.rows_of(slot, seq_len, "truncate"))

    @locked(from_finaliser=True)
    def release(self, slot: int) -> None:
        """End a sequence. Its slot is free at once; while a step is open on it, when that step is left.

        Its pages stay mapped for the next sequence of the slot, which finds them zeroed, until they are needed
        elsewhere. No driver call, and no waiting.
        """
        slots = self._slots
        slots.end(slots.live(slot))

    @locked(waits_outside=True)
    def make_writable(self, slot: int, start: int, end: int) -> None:
        """Give the slot private copies of the shared pages under rows ``[start, end)``.

        Raises:
            OutOfPages: no pages for the copies.
            ConfigError: the rows are not within ``[0, seq_len(slot))``, or a step is open on the slot.
        """
        slots = self._slots
        slot = slots.live(slot)
        start, end = require_int("start", start, 0), slots.rows_of(slot, end, "make_writable")
        if start > end:
            raise ConfigError(f"start must be at most end, got {start} and {end}")
        if start < end:
            slots.make_writable(slot, start, end)

    @locked
    def seq_len(self, slot: int) -> int:
        """Rows backed on request."""
        slots = self._slots
        return int(slots.seq_len[slots.live(slot)])

    @locked(quick=True)
    def versions(self, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """Per slot, int64, a number that is another one once its sequence has ended or lost rows; -1 where none is."""
        state = self._slots
        return state.version_of(state.existing(slots))

    # -- tensors -------------------------------------------------------------------------------------------------
    def k(self, layer: int) -> torch.Tensor:
        """K of every slot, ``[max_slots, max_seq_len, num_kv_heads, head_dim]``, at a fixed address.

        For kernels that take lengths. Rows that ``ensure`` did not back have nothing behind them: an operation over the
        whole view, printing included, kills the process; so may a write to it in code under ``torch.compile``, which
        may become a copy of all of it (put the write into a function under ``torch.compiler.disable``). ``rows`` is the
        safe way.
        """
        return self._view(self._k, layer)

    def v(self, layer: int) -> torch.Tensor:
        """V of every slot, ``[max_slots, max_seq_len, num_kv_heads, v_head_dim]``; the same caution as for ``k``."""
        return self._view(self._v, layer)

    @locked
    def rows(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k, v) of one sequence, each ``[seq_len, num_kv_heads, head_dim]``; safe for every torch operation.

        Valid until the sequence is truncated or released. After a ``fork``, writing to shared rows writes to both
        sequences: ``make_writable`` first. What copies a whole storage (``torch.save``, ``copy.deepcopy``) copies what
        lies between these rows as well, other layers' above all: ``clone`` first.
        """
        slots = self._slots
        rows, k, v = int(slots.seq_len[slots.live(slot)]), self.k(layer), self.v(layer)
        backed_k, backed_v = self._backed_rows.of(slot, layer, int(slots.reach[slot]), k, v)
        return backed_k[:rows], backed_v[:rows]

    # -- launching work ------------------------------------------------------------------------------------------
    def step(
        self, slots: Sequence[int] | np.ndarray, *, versions: Sequence[int] | np.ndarray | None = None
    ) -> AbstractContextManager[None]:
        """Bracket the launch of work on some slots: ``with cache.step(slots): graph.replay()``.

        No page of these slots is unmapped or given away before the work that the block submits to its current stream
        has ended. The current stream first waits for what this cache gave other streams to do on these slots. A slot
        released in the block can be acquired again after it.

        Args:
            versions: of these slots, as ``versions`` said: refuse those that have another sequence by now, or fewer
                rows than they had.

        Raises:
            ConfigError: a slot is not live, listed twice or of another version, or the current stream is being
                captured.
            OutOfPages: rows past the end that kernels read unmasked lie on a shared page, after ``truncate``, and there
                is no page to copy it to.
        """
        return self._steps.step(slots, versions)

    # -- looking -------------------------------------------------------------------------------------------------
    @locked
    def stats(self) -> CacheStats:
        """A snapshot of what the cache has reserved, mapped and used."""
        return cache_stats(self._slots, self.layout.bytes_per_token)

    @locked
    def events(self) -> tuple[Event, ...]:
        """The newest driver calls, oldest first."""
        return self._slots.driver.log.snapshot()

    @locked
    def check_integrity(self) -> None:
        """Raise AssertionError where slots, pages or the system's own count of them do not agree."""
        check_integrity(self._slots)

    # -- memory and the end --------------------------------------------------------------------------------------
    @locked(waits_outside=True)
    def trim(self, keep_bytes: int = 0) -> int:
        """Give free, parked and stored pages back to the driver, but for ``keep_bytes`` of them, which are free then.

        Waits for the work of released sequences. Returns the bytes given back.
        """
        return self._slots.trim(require_int("keep_bytes", keep_bytes, 0))

    @locked(from_finaliser=True)
    def close(self) -> None:
        """Wait for the work on the device, then free every page. Idempotent; later use raises ConfigError.

        The addresses stay reserved until the last tensor over them dies.

        Raises:
            ConfigError: a step is open, but for the calling thread's while an exception is on its way through it.
            DriverError: something could not be freed; calling ``close`` again tries what is left.
        """
        slots = self._opened.here
        if slots is None:  # a forked child has nothing to free
            return
        with self._lock.books:
            slots.work.forget_steps()
            self._opened.closing = True  # no step is entered any more
        self._k.clear()
        self._v.clear()
        self._backed_rows = BackedRows(None)
        try:
            slots.backing.close()
        finally:
            if slots.backing.closed:
                self._opened.or_none = None

    def __enter__(self) -> KVCache:
        self._slots  # noqa: B018 - says so where the cache is closed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError(
            "a KVCache is memory of this process and cannot be copied or pickled: clone what rows() returns, or fork()"
        )

    def __repr__(self) -> str:
        state = "closed" if self._opened.or_none is None else f"device={self.device}, page_bytes={self.page_bytes}"
        return f"KVCache({self.layout!r}, max_slots={self.max_slots}, {state})"

    # -- what everything begins with ---------------------------------------------------------------------------------
    @property
    def _slots(self) -> Slots:
        return self._opened.slots

    def _view(self, views: dict[int, torch.Tensor], layer: int) -> torch.Tensor:
        self._slots  # noqa: B018 - says so where the cache is closed, or its parent's
        tensor = views.get(layer) if is_int(layer) else None
        if tensor is None:
            raise ConfigError(f"layer must be one of {list(self.layout.layers)}, got {layer!r}")
        return tensor
