"""What is done to live sequences: when one gets pages, from where, and when they may go."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from ..errors import ConfigError, DriverError, OutOfPages, VattnError
from .pages import Page
from .plans import Growth, Plan, Rows, Split
from .slot_states import LIVE, STORED
from .stored import StoredSequences
from .undo import Undo, is_incomplete
from .work import Fences


class Slots(StoredSequences):
    """The slots of one cache. Arguments are right: the methods of ``SlotStates`` have checked them."""

    # -- growing -------------------------------------------------------------------------------------------------
    def ensure(self, slots: np.ndarray, seq_lens: np.ndarray, wait: bool) -> None:
        """Back rows ``[0, seq_len)`` of each slot, all or nothing."""
        short = seq_lens > self.reach[slots]
        ready, old = slots[~short], self.seq_len[slots[~short]]
        # First those that have their pages: making room for the others takes what lies past a sequence's rows.
        self.seq_len[ready] = np.maximum(old, seq_lens[~short])
        if short.any():
            try:
                self.grow(list(zip(slots[short].tolist(), seq_lens[short].tolist(), strict=True)), wait)
            except BaseException:
                self.seq_len[ready] = old
                for slot, rows in zip(ready.tolist(), old.tolist(), strict=True):
                    self.note_pages_past(slot, rows)
                raise

    def grow(self, requests: list[tuple[int, int]], wait: bool = True) -> None:
        """Back the rows of (slot, seq_len) pairs, all or nothing; new rows private, old rows as they are.

        Args:
            wait: whether the host may wait for the GPU to be done with pages.
        """
        # What lies before a slot's reach is backed and private.
        self._back([Rows(slot, int(self.reach[slot]), end, int(self.seq_len[slot])) for slot, end in requests], wait)
        look = self.stale_to or self.table.over_read.tokens
        for slot, end in requests:
            self.seq_len[slot] = end
            if look:
                self.reach[slot] = self._reach_of(slot, end)
            else:  # every page under these rows is private now, to its end
                self.reach[slot] = self.table.rows_of_whole_pages(end, self.max_seq_len)

    def make_writable(self, slot: int, start: int, end: int) -> None:
        """Copy the shared pages under rows ``[start, end)``, whole as far as the sequence goes."""
        self._back([Rows(slot, start, end, int(self.seq_len[slot]))])

    def _back(self, targets: list[Rows], wait: bool = True) -> None:
        """Make these rows backed and private; where pages are short, make room and plan again."""
        slots = [rows.slot for rows in targets]
        # A plan holds only as long as nobody's pages change, so whatever makes room leads to another plan. A wait for
        # the GPU leaves this loop as MustWait: the whole call begins again.
        with self.pool.shortage(wait):
            self.backing.clear_strays()
            while (growth := self._plan_growth(targets)) is not None:
                if not self._has_room(growth, wait):
                    continue
                if growth.slots_with_shared:
                    self.work.wait(list(growth.slots_with_shared), current_stream=True)
                self._await_parked(growth)
                stale = [slot for slot in slots if slot in self.stale_to]
                self.work.hold(stale)  # a step that is entered now would not know of the wiping
                try:
                    with self._transaction(slots) as undo:
                        submitted = self.table.grow(growth, undo)
                        if stale:
                            self.work.order_current_stream(stale)
                            self._wipe(stale, undo)
                            submitted = True
                except (OutOfPages, DriverError) as error:
                    if not self._made_room_after(error, growth, wait):
                        raise
                    continue
                self.table.note_growth(growth)
                if submitted:
                    self.work.submitted([*slots, *growth.slots_read])
                return

    def _plan_growth(self, targets: list[Rows]) -> Growth | None:
        """What backs these rows; None if nothing has to be done."""
        growth = Growth()
        for rows in targets:
            self.table.growth(rows, growth)
        stale = self.stale_to and any(rows.slot in self.stale_to for rows in targets)
        if not (growth.num_pages or growth.adopted or growth.unparked or stale):
            return None
        self.refuse_capture("mapping a page")
        for slot in growth.slots_with_shared:
            if self.work.is_open(slot):
                raise ConfigError(
                    f"rows of slot {slot} share a page with another sequence and need a private copy, which cannot be "
                    "made while a step is open on the slot: call ensure or make_writable before step"
                )
        return growth

    def fork(self, parent: int, into: int | None, rows: int) -> int:
        """Begin a sequence that shares the parent's first rows, in a free slot, which is returned."""
        if rows:
            self.refuse_capture("fork")
        child = self.find_free(into, parent=parent)
        if not rows:
            self.start(child)
            return child
        if self.state[parent] == STORED:
            self.use(parent)
        self.work.order_current_stream([parent])
        with self.pool.shortage(), self.reading(parent, rows):
            self.backing.clear_strays()
            while True:
                plan = self.table.sharing(parent, child, rows)
                if not self._has_room(plan, True):
                    continue
                if self.backing.guard is not None and plan.shares_anew:
                    self._await_writes(parent)
                self._await_parked(plan)
                try:
                    with self._transaction([]) as undo:
                        self.table.share(plan, undo)
                    break
                except (OutOfPages, DriverError) as error:
                    if not self._made_room_after(error, plan, True):
                        raise
        self.table.note_sharing(child, rows, plan)
        # Whatever wrote the shared rows lies before this point of the current stream: the child's work on other streams
        # has to come after it, a copy or not.
        self.work.submitted([parent, child, *plan.slots_read])
        self.start(child)
        self.seq_len[child] = rows
        self._measure_reach(child)
        return child

    def _await_writes(self, parent: int) -> None:
        """A guarded page becomes read-only at once, so the work that may write to it has to be over."""
        if self.work.is_open(parent):
            raise ConfigError(
                f"with guard=True, fork makes pages of slot {parent} read-only, which a step that is open on the slot "
                "may still write to: leave the step before fork"
            )
        self.work.wait([parent], current_stream=True)

    def _await_parked(self, plan: Plan) -> None:
        """Parked pages are unmapped when the work that used them has ended, and scrubbed behind it."""
        fences = self.parking.fences
        if plan.slots_unparked:
            self.lock.wait_for(Fences.of(fences[slot] for slot in plan.slots_unparked))
        if plan.slots_adopting:
            self.work.order_behind(fences[slot] for slot in plan.slots_adopting)

    # -- giving back ---------------------------------------------------------------------------------------------
    def truncate(self, slot: int, rows: int) -> None:
        """Cut a sequence to its first rows. Its other pages go now, or once no step is open on the slot."""
        self.refuse_capture("truncate")
        if rows < self.seq_len[slot]:
            self.note_stale(slot)
        if self.work.is_open(slot):
            self.work.submitted([slot])
            self._cut_to(slot, rows)
            self.to_shrink.add(slot)
        else:
            if self.table.can_shrink(slot, rows) or any(self.table.straddling(slot, rows)):
                self.work.wait([slot], current_stream=True)
            self._shrink_now(slot, rows)
            self._cut_to(slot, rows)  # reach is measured below, once all is done
            self._split_where_cut(slot)
            with suppress(DriverError):  # tried again before the next kernel reads there
                self._wipe_stale(slot)
        self._measure_reach(slot)

    def _cut_to(self, slot: int, rows: int) -> None:
        self.num_cut[slot] += rows < self.seq_len[slot]
        self.seq_len[slot] = self.reach[slot] = rows

    def _wipe_stale(self, slot: int) -> None:
        """Wipe what a longer self of the sequence left where kernels read past the end and do not mask it."""
        if slot in self.stale_to:
            self.work.order_current_stream([slot])
            with self._transaction([]) as undo:
                self._wipe([slot], undo)
            self.work.submitted([slot])

    def is_clean(self, slots: np.ndarray) -> bool:
        """Whether ``clean_over_read`` has nothing to do."""
        return not self.stale_to or self.stale_to.keys().isdisjoint(slots.tolist())

    def clean_over_read(self, slots: np.ndarray) -> None:
        """Before kernels run that do not mask what they read past the end: nothing of a longer self may lie there.

        Pages that others share are copied, but for slots on which another step is open already.
        """
        if not self.stale_to:
            return
        stale = [slot for slot in slots.tolist() if slot in self.stale_to and not self.work.is_open(slot)]
        if stale:
            rows = self.seq_len[stale].tolist()
            self._back([Rows(slot, n, n, n) for slot, n in zip(stale, rows, strict=True) if n])

    def _wipe(self, stale: list[int], undo: Undo) -> None:
        for slot in stale:
            rows, longest = int(self.seq_len[slot]), self.stale_to[slot]
            if longest <= rows or self.table.wipe(slot, rows, longest, undo):
                del self.stale_to[slot]

    def _measure_reach(self, slot: int) -> None:
        self.reach[slot] = self._reach_of(slot, int(self.seq_len[slot]))

    def _reach_of(self, slot: int, rows: int) -> int:
        if slot in self.stale_to:
            return rows  # growing has to wipe first
        reach = min(self.table.private_rows(slot, rows) - self.table.over_read.tokens, self.max_seq_len)
        if slot in self.to_shrink:  # what lies past its rows may be taken
            reach = self.table.rows_of_whole_pages(rows, reach)
        return max(rows, reach)

    def _shrink_now(self, slot: int, rows: int, deferred: bool = False) -> bool:
        """Take whole pages past these rows. Returns whether there were any."""
        taken: list[Page] = []
        if self.table.can_shrink(slot, rows):
            self.refuse_capture("unmapping a page")
            self.work.wait([slot], current_stream=not deferred)  # then a fence was set when the caller asked for it
            with self._transaction([slot]) as undo:
                taken = self.table.shrink(slot, rows, undo)
            self.table.finish_shrink(slot, rows, taken)
        self.note_pages_past(slot, rows)
        return bool(taken)

    def _split_where_cut(self, slot: int) -> None:
        """Have back the units that rows do not need of the page in which they end, if there is room for their copy;
        otherwise that is left until memory is short."""
        for split in self.table.straddling(slot, int(self.seq_len[slot])):
            if split.num_pages <= self.pool.num_available:
                with self.pool.shortage(wait=False):
                    try:
                        self._split(split)
                    except (OutOfPages, DriverError) as error:
                        if is_incomplete(error):
                            raise

    def _split_kept(self, asked: int) -> bool:
        """Before so many pages are taken: split a page that was kept for its first rows, if there might be no room for
        their copy afterwards. Returns whether one was split."""
        slots = [slot for slot in sorted(self.to_shrink) if not self.work.is_open(slot)]
        splits = [split for slot in slots for split in self.table.straddling(slot, int(self.seq_len[slot]))]
        if not splits:
            return False
        available = self.pool.num_available
        enough = asked + max(split.num_pages for split in splits)
        left = available + (self.num_reclaimable(enough - available) if enough > available else 0)
        split = next((split for split in splits if split.num_pages <= left), None)
        if enough <= left or split is None:
            return False
        self.work.wait([split.slot], current_stream=True)
        if split.num_pages > available:
            self.unpark(split.num_pages - available)
        self._split(split)
        self._measure_reach(split.slot)
        return True

    def _split(self, split: Split) -> None:
        """The work on the slot has ended."""
        with self._transaction([split.slot]) as undo:
            self.table.split(split, undo)
        self.table.note_split(split)
        self.work.submitted([split.slot])
        self.note_pages_past(split.slot, int(self.seq_len[split.slot]))

    def finish_deferred(self, wait: bool) -> bool:
        """Do what had to be left while steps were open: park slots that were released, and take the pages of sequences
        that were cut short, where the work on them has ended.

        Args:
            wait: block for work that was submitted (never for a step that is still open), and raise what fails; else
                leave for later whatever cannot be done at once.

        Returns:
            Whether pages of a sequence that was cut short were taken.
        """
        self.park_retired()
        found = False
        if not self.to_shrink or (not wait and self.driver.is_capturing()):
            return found
        for slot in tuple(self.to_shrink):
            if self.work.is_open(slot) if wait else not self.work.done(slot):
                continue
            try:
                found |= self._shrink_now(slot, int(self.seq_len[slot]), deferred=True)
            except DriverError:
                if wait:
                    raise
                continue
            self._measure_reach(slot)
        return found

    def trim(self, keep_bytes: int) -> int:
        """Give pages that no live sequence has back to the driver, but for ``keep_bytes``. Returns the bytes."""
        if not self.driver.is_capturing():
            self.finish_deferred(wait=False)
            self.unpark(self.pool.num_pages)
            self.backing.clear_strays()
        return self.pool.trim(keep_bytes)

    # -- making room ---------------------------------------------------------------------------------------------
    def _has_room(self, plan: Plan, wait: bool) -> bool:
        """Whether there are pages for the plan. If not, some were made free, and it has to be worked out again.

        Raises:
            OutOfPages: there would be too few, whatever is taken. Nothing was.
        """
        pool, num_pages = self.pool, plan.num_pages
        if not (wait or all(self.parking.fences[slot].done() for slot in plan.slots_unparked)):
            raise pool.out_of_pages(num_pages, "of which some are still in use by the GPU")
        asked = num_pages + plan.num_adopted
        if self.to_shrink and asked and wait and self._split_kept(asked):
            return False
        if num_pages <= pool.num_available:
            return True
        if self.finish_deferred(wait):
            return False
        num_parked = self.num_reclaimable(enough=asked - pool.num_available)
        if num_parked < asked - pool.num_available:
            if isinstance(plan, Growth) and self.drop_all_stored(plan.slots_read):
                return False
            raise pool.out_of_pages(asked, "which memory_limit does not allow", num_parked)
        if not self.unpark(num_pages - pool.num_available, plan.slots_adopting, wait) and not wait:
            raise pool.out_of_pages(asked, "of which some are still in use by the GPU")
        return False

    def _made_room_after(self, error: VattnError, plan: Plan, wait: bool) -> bool:
        """Whether the plan, which failed so, is worth another try."""
        pool = self.pool
        if is_incomplete(error):
            return False
        if isinstance(error, OutOfPages):  # not the limit: the device has less
            missing = plan.num_pages - pool.num_free
            return self.finish_deferred(wait) or self.unpark(missing, plan.slots_adopting, wait)
        # The tables that the system keeps of mappings, parked ones too.
        return bool(getattr(error, "out_of_memory", False)) and self.unpark(pool.num_pages, wait=wait)

    # -- all or nothing ------------------------------------------------------------------------------------------
    def _transaction(self, slots: Iterable[int]) -> Undo:
        return Undo(lambda: self._resync(slots))

    def _resync(self, slots: Iterable[int]) -> None:
        """After an undo that failed itself: cut the sequences to the rows that are still backed."""
        for slot in slots:
            over_read = self.table.over_read
            if not over_read.masked:
                self.stale_to[slot] = int(self.seq_len[slot]) + over_read.tokens
            readable = self.table.backed_rows(slot) - over_read.tokens
            self._cut_to(slot, max(0, min(int(self.seq_len[slot]), readable)))
            if self.state[slot] == LIVE:
                self.to_shrink.add(slot)
        self.pool.recount(self.table.owned(self.with_state(LIVE)))
