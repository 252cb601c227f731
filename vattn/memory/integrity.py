"""The books of a cache: what they add up to, and whether they agree with each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from ..stats import CacheStats
from .slot_states import FREE, LIVE, RETIRED, STORED
from .slots import Slots


def cache_stats(slots: Slots, bytes_per_token: int) -> CacheStats:
    """Counts and bytes, as ``CacheStats`` defines them. From counters: no look at any page."""
    backing, pool = slots.backing, slots.backing.pool
    page_bytes = pool.page_bytes
    live = slots.state == LIVE
    row_bytes = int(slots.seq_len[live].sum()) * bytes_per_token
    return CacheStats(
        reserved_bytes=backing.reserved_bytes,
        physical_bytes=pool.physical_bytes,
        mapped_bytes=backing.num_mapped * page_bytes,
        in_use_bytes=pool.num_owned * page_bytes,
        # What is mapped and no live sequence has: parked, retired slots', and what failed undos left.
        parked_bytes=(pool.num_pages - pool.num_free - pool.num_owned - pool.num_index) * page_bytes,
        free_bytes=pool.num_free * page_bytes,
        index_bytes=pool.num_index * page_bytes,
        shared_bytes=pool.num_shared * page_bytes,
        row_bytes=row_bytes,
        waste_bytes=pool.num_owned_maps * page_bytes - row_bytes,
        peak_physical_bytes=pool.peak_pages * page_bytes,
        memory_limit_bytes=pool.limit_bytes,
        page_bytes=page_bytes,
        num_live_slots=int(live.sum()),
        num_stored_slots=int((slots.state == STORED).sum()),
        **asdict(slots.driver.counts),
        num_oom=pool.num_oom,
        num_adopted=slots.parking.num_adopted,
        num_unparked=slots.parking.num_unparked,
    )


def check_integrity(slots: Slots) -> None:
    """Every live slot has the pages that its rows need, and what is mapped beyond them is parked. AssertionError."""
    backing, table, parking = slots.backing, slots.table, slots.parking
    backing.check_integrity()
    owners = Counter(table.owned(slots.with_state(LIVE)))
    assert all(page.owners == owners[page] for page in backing.pool.pages), "a page has other owners than it counts"
    stored = Counter(table.owned(slots.with_state(STORED)))
    assert all(page.stored == stored[page] for page in backing.pool.pages), "a page miscounts stored sequences"
    parking.check_integrity()
    seen: Counter[int] = Counter()
    for slot, state in enumerate(slots.state.tolist()):
        rows, reach = int(slots.seq_len[slot]), int(slots.reach[slot])
        for lane in table.lanes:
            first, end, top = lane.first(slot), lane.ends[slot], int(lane.tops[slot])
            seen.update(
                lane.reservation.address_of(first + start)
                for start, stop, page in lane.walk(slot, 0, end)
                if page is not None
            )
            for start, stop, page in lane.walk(slot, 0, max(end, top)):
                assert page is None or start % page.size == 0, f"{page} does not begin at a multiple of its size"
                assert page is None or stop <= end or start >= end, f"slot {slot}: {page} is its own only in part"
                assert page is None or stop <= max(end, top), f"slot {slot}: {page} reaches beyond what is parked"
        seen.update(address for address, _ in parking.pages_of(slot))
        waits = slot in slots.to_shrink
        assert not waits or state == LIVE, "a slot that is not live waits to be shrunk"
        assert 0 <= rows <= reach <= slots.max_seq_len, f"slot {slot}: {rows} rows, reach {reach}"
        if state == LIVE:
            readable = reach + table.over_read.tokens if reach else 0
            assert table.backed_rows(slot) >= readable, f"slot {slot} lacks pages for its rows"
            assert table.private_rows(slot, rows) >= reach, f"slot {slot} would write into a shared page"
            assert waits or not table.has_pages_past(slot, reach), f"slot {slot} keeps pages past its rows"
        elif state == STORED:
            assert 0 < rows == reach, f"slot {slot} stores {rows} rows and reaches {reach}"
            assert table.backed_rows(slot) >= rows + table.over_read.tokens, f"slot {slot} lacks pages for its rows"
            assert not table.can_shrink(slot, rows), f"slot {slot} stores pages past its rows"
            assert not slots.work.is_open(slot), f"a step is open on slot {slot}, which nobody has"
        else:
            assert rows == 0, f"slot {slot} is not live, yet has rows"
            assert state == RETIRED or not table.has_pages_past(slot, 0), f"free slot {slot} owns pages"
            # A step may be left right now, beside this; its slots are parked after this turn.
            waits = slots.work.is_open(slot) or slots.lock.left_over is not None
            assert state == FREE or waits, f"slot {slot} is retired, though no step is open on it"
    mapped = {reservation.address_of(index) for reservation in backing.reservations for index in reservation.pages}
    assert seen.keys() == mapped, "a page is mapped behind a slot that neither owns it nor has it parked"
    assert not seen or max(seen.values()) == 1, "a page is a sequence's own and parked at one address"
