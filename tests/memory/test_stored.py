"""Stored sequences: nobody's, in the way of nobody, and as they were as long as they are there."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from helpers.watchful_driver import WatchfulDriver, launch, new, num_left, watched_cache

import vattn

PAGE = 4096
ROWS = 64  # of a page of each of the two layers in layer order; 32 of a page in token order


def layout_of(order: str = "token", max_seq_len: int = 512) -> vattn.KVLayout:
    return vattn.KVLayout(2, 1, 8, max_seq_len, torch.float32, order=order)


def cache_of(num_pages: int, max_slots: int = 6, order: str = "token", **options: object) -> vattn.KVCache:
    limit = num_pages * PAGE
    return vattn.KVCache(layout_of(order), max_slots, "cpu", limit, page_bytes=PAGE, **options)  # type: ignore[arg-type]


def fill(cache: vattn.KVCache, slot: int, value: float, start: int = 0) -> None:
    for layer in range(2):
        for tensor in cache.rows(slot, layer):
            tensor[start:] = torch.arange(start, len(tensor))[:, None, None] + 1000 * value


def holds(cache: vattn.KVCache, slot: int, value: float, rows: int, start: int = 0) -> bool:
    wanted = torch.arange(start, rows)[:, None, None] + 1000 * value
    tensors = [tensor[start:rows] for layer in range(2) for tensor in cache.rows(slot, layer)]
    return all(torch.equal(tensor, wanted.expand_as(tensor).to(tensor)) for tensor in tensors)


def stored(cache: vattn.KVCache, rows: int, value: float, keep: int | None = None) -> tuple[int, int]:
    """A stored sequence: its slot and version."""
    slot = cache.acquire(expect_len=0)
    cache.ensure(slot, rows)
    fill(cache, slot, value)
    (version,) = cache.versions([slot])
    cache.store(slot, keep)
    return slot, int(version)


def left(cache: vattn.KVCache) -> dict[int, int]:
    """Rows of stored sequences, by slot."""
    cache.check_integrity()
    versions, rows = cache.stored()
    assert ((versions >= 0) == (rows > 0)).all()
    stats = cache.stats()
    assert stats.physical_bytes == stats.in_use_bytes + stats.parked_bytes + stats.free_bytes + stats.index_bytes
    assert stats.num_stored_slots == (rows > 0).sum()
    return {slot: n for slot, n in enumerate(rows.tolist()) if n}


# -- what it is ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["token", "layer"])
def test_a_sequence_goes_on_in_its_slot_without_a_driver_call(order: str) -> None:
    with cache_of(64, order=order) as cache:
        slot, version = stored(cache, 200, 1)
        assert left(cache) == {slot: 200}
        stats = cache.stats()
        assert stats.index_bytes == stats.physical_bytes
        assert (stats.num_live_slots, stats.row_bytes, stats.waste_bytes, stats.in_use_bytes) == (0, 0, 0, 0)
        assert cache.resume(slot, 150, version=version) == slot
        assert cache.stats().num_driver_calls == stats.num_driver_calls
        assert (cache.seq_len(slot), left(cache)) == (150, {})
        assert holds(cache, slot, 1, 150)
        assert cache.versions([slot])[0] != version
        cache.ensure(slot, 200)  # in the pages that were there
        assert cache.stats().num_driver_calls == stats.num_driver_calls
        fill(cache, slot, 2, 150)
        assert holds(cache, slot, 1, 150)
        assert holds(cache, slot, 2, 200, 150)
        cache.check_integrity()


def test_only_the_rows_to_keep_are_stored() -> None:
    with cache_of(64) as cache:
        slot, version = stored(cache, 200, 1, keep=70)
        assert left(cache) == {slot: 70}
        assert cache.stats().index_bytes == 3 * PAGE
        assert cache.stats().parked_bytes == 4 * PAGE
        with pytest.raises(vattn.ConfigError, match="70 rows left"):
            cache.resume(slot, 71, version=version)
        cache.resume(slot, 70, version=version)
        cache.store(slot, 0)
        assert left(cache) == {}
        assert cache.stats().index_bytes == 0


@pytest.mark.parametrize("order", ["token", "layer"])
def test_a_fork_of_a_stored_sequence_shares_its_whole_pages(order: str) -> None:
    with cache_of(64, order=order) as cache:
        slot, version = stored(cache, 200, 1)
        child = cache.fork(slot, 150, version=version)
        assert child != slot
        assert holds(cache, child, 1, 150)
        cache.ensure(child, 200)
        assert not any(tensor[150:].any() for layer in range(2) for tensor in cache.rows(child, layer))
        fill(cache, child, 2, 150)
        assert left(cache) == {slot: 200}
        assert cache.stats().shared_bytes == 0  # with nobody who lives
        cache.release(child)
        cache.resume(slot, 200, version=version)
        assert holds(cache, slot, 1, 200)
        assert cache.stats().index_bytes == 0


def test_to_everybody_else_its_slot_is_free() -> None:
    with cache_of(64, max_slots=3) as cache:
        slot, version = stored(cache, 100, 1)
        for use in (cache.seq_len, cache.release, cache.store, cache.fork, lambda slot: cache.ensure(slot, 3)):
            with pytest.raises(vattn.ConfigError, match="no sequence"):
                use(slot)
        with pytest.raises(vattn.ConfigError, match="no sequence"), cache.step([slot]):
            pass
        assert cache.versions([slot]).tolist() == [-1]
        assert cache.acquire(slot) == slot
        assert left(cache) == {}
        cache.ensure(slot, 100)
        assert not cache.rows(slot, 0)[0].any()  # nothing of the one before
        for use in (cache.resume, cache.fork):
            with pytest.raises(vattn.ConfigError, match=r"another sequence|no stored sequence"):
                use(slot, 50, version=version)
        cache.drop(slot, version=version)  # which is not there any more
        assert cache.seq_len(slot) == 100
        others = [cache.acquire(), cache.acquire()]
        with pytest.raises(vattn.OutOfSlots):
            cache.acquire()
        cache.store(others[0], 0)
        assert cache.acquire() == others[0]


def test_no_version_is_that_of_no_stored_sequence() -> None:
    """``stored`` and ``versions`` say -1 where there is none, and so may who asks for what is gone by now."""
    with cache_of(40) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 100)
        fill(cache, slot, 1)
        (version,) = cache.stored()[0][[slot]].tolist()
        with pytest.raises(vattn.ConfigError, match="no stored sequence of version -1"):
            cache.resume(slot, 50, version=version)
        cache.drop(slot, version=version)
        with pytest.raises(vattn.ConfigError, match="another sequence"):
            cache.fork(slot, 50, version=version)
        cache.check_integrity()
        assert holds(cache, slot, 1, 100)


def test_slots_are_taken_from_the_sequence_used_least_recently() -> None:
    with cache_of(64, max_slots=5) as cache:
        a, b, c = (stored(cache, 50, value) for value in range(3))
        child = cache.fork(a[0], 40, version=a[1])  # uses it
        assert cache.acquire() not in (a[0], b[0], c[0])  # there is a free one
        assert cache.acquire() == b[0]
        cache.release(child)
        assert cache.fork(c[0], 40, version=c[1]) == child
        assert cache.fork(c[0], 40, version=c[1]) == a[0]
        with pytest.raises(vattn.OutOfSlots):
            cache.fork(c[0], 40, version=c[1])  # the one left is its own
        with pytest.raises(vattn.OutOfSlots):
            cache.fork(c[0], 40, into=c[0], version=c[1])
        assert left(cache) == {c[0]: 50}
        cache.resume(c[0], 40, version=c[1])
        assert holds(cache, c[0], 2, 40)


def test_a_step_that_is_open_ends_first() -> None:
    with cache_of(64) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 100)
        fill(cache, slot, 1)
        (version,) = cache.versions([slot])
        with cache.step([slot]):
            cache.store(slot, 90)
            assert left(cache) == {}
            with pytest.raises(vattn.ConfigError, match="not any more"):
                cache.resume(slot, 90, version=version)
        assert left(cache) == {slot: 90}
        cache.drop(slot, version=version)
        assert left(cache) == {}
        assert cache.stats().parked_bytes == cache.stats().physical_bytes


# -- memory ----------------------------------------------------------------------------------------------------------
def test_rows_go_from_the_end_of_the_sequence_used_least_recently() -> None:
    with cache_of(12) as cache:
        a, b = stored(cache, 160, 1), stored(cache, 160, 2)  # five pages each
        cache.release(new(cache, 64))  # two more, parked
        taker = cache.acquire(5)
        for rows, rest in ((64, (160, 160)), (96, (128, 160)), (160, (64, 160)), (192, (32, 160)), (224, (0, 160))):
            cache.ensure(taker, rows)
            assert left(cache) == {slot: n for (slot, _), n in zip((a, b), rest, strict=True) if n}
        cache.resume(b[0], 160, version=b[1])
        assert holds(cache, b[0], 2, 160)
        with pytest.raises(vattn.OutOfPages):
            cache.ensure(taker, 7 * 32 + 1)
        assert cache.stats().num_oom == 1


def test_a_sequence_that_is_gone_on_with_counts_as_used() -> None:
    with cache_of(10) as cache:
        a, b = stored(cache, 160, 1), stored(cache, 160, 2)
        cache.resume(a[0], 160, version=a[1])
        cache.store(a[0])
        cache.ensure(cache.acquire(5), 1)
        assert left(cache) == {a[0]: 160, b[0]: 128}


@pytest.mark.parametrize("order", ["token", "layer"])
def test_forks_outlive_the_sequence_that_they_are_of(order: str) -> None:
    with cache_of(20 if order == "token" else 24, order=order) as cache:
        slot, version = stored(cache, 200, 1)
        children = [cache.fork(slot, rows, version=version) for rows in (100, 150)]
        taker = cache.acquire(5)
        rows = 0
        with suppress(vattn.OutOfPages):
            for rows in range(8, 513, 8):
                cache.ensure(taker, rows)
                fill(cache, taker, 7)
        assert cache.stats().num_oom == 1
        kept = left(cache).get(slot, 0)
        assert kept < 160  # what only it had is gone; what is shared with a fork costs nothing
        assert cache.stats().index_bytes == 0
        assert [holds(cache, child, 1, n) for child, n in zip(children, (100, 150), strict=True)] == [True, True]
        assert holds(cache, taker, 7, rows - 8)
        cache.release(taker)
        cache.release(children[1])
        if kept:
            cache.resume(slot, kept, version=version)
            assert holds(cache, slot, 1, kept)


def test_a_long_request_takes_everything_that_is_stored_and_no_more_than_there_is() -> None:
    with cache_of(12) as cache:
        for value in range(3):
            stored(cache, 100, value)
        one = cache.acquire(5)
        before = left(cache)
        with pytest.raises(vattn.OutOfPages):
            cache.ensure(one, 12 * 32 + 1)
        assert left(cache) == before  # which does not fit even so
        cache.ensure(one, 12 * 32)
        assert left(cache) == {}
        assert cache.stats().in_use_bytes == 12 * PAGE


def test_a_copy_on_write_that_is_not_needed_without_what_is_stored_is_not_short() -> None:
    with cache_of(2) as cache:
        slot, version = stored(cache, 64, 1)
        child = cache.fork(slot, 64, version=version)
        cache.make_writable(child, 0, 64)  # both pages are shared, and there is no other
        assert left(cache) == {}
        assert holds(cache, child, 1, 64)
        cache.truncate(child, 10)
        cache.ensure(child, 64)


def test_where_pages_are_short_the_sequence_that_has_to_go_leaves_its_pages_to_the_next_one() -> None:
    with cache_of(10) as cache:
        a, b = stored(cache, 160, 1), stored(cache, 160, 2)
        calls = cache.stats().num_driver_calls
        slot = cache.acquire(expect_len=160)
        cache.ensure(slot, 160)
        assert slot == a[0]
        assert cache.stats().num_driver_calls == calls
        assert not cache.rows(slot, 0)[0].any()
        assert left(cache) == {b[0]: 160}


def test_trim_gives_back_what_is_stored() -> None:
    with cache_of(20) as cache:
        slot, version = stored(cache, 160, 1)
        child = cache.fork(slot, 64, version=version)
        assert cache.trim() == 3 * PAGE
        assert cache.stats().physical_bytes == cache.stats().in_use_bytes == 2 * PAGE
        assert left(cache) == {slot: 64}  # it costs nothing while the fork lives
        assert holds(cache, child, 1, 64)


@pytest.mark.parametrize("num_pages", [8, 40])
def test_nothing_of_the_longer_self_is_left_where_kernels_read_past_the_end(num_pages: int) -> None:
    """Of a resumed sequence, whether it was cut by that, by ``store``, or since pages were short."""
    with cache_of(num_pages, over_read_tokens=40, over_read_masked=False) as cache:
        for keep, rows in ((200, 200), (200, 150), (150, 150), (150, 33)):
            slot, version = stored(cache, 200, float("nan"), keep)
            if num_pages == 8:
                other = cache.acquire(5)
                cache.ensure(other, 20)
                cache.store(other, 0)
                rows = min(rows, left(cache)[slot])
            cache.resume(slot, rows, version=version)
            for stop in (rows, rows + 1, 210):
                cache.ensure(slot, stop)
                with cache.step([slot]):
                    past = cache.k(0)[slot, stop : stop + 40]
                    assert past.isfinite().all()
                    assert not past.any()
                    cache.k(0)[slot, rows:stop] = 1.0
            cache.check_integrity()
            cache.store(slot, 0)


# -- work on a device ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["resume", "fork", "shortage", "acquire"])
def test_work_on_a_stored_sequence_comes_before_what_follows(how: str) -> None:
    driver = WatchfulDriver()
    with watched_cache(driver) as cache:
        slot = new(cache, 128)
        (version,) = cache.versions([slot])
        with driver.stream(2):
            driver.launch(lambda: None)  # of somebody else
        with driver.stream(1), cache.step([slot]):
            found = launch(cache, slot, 128, 7.0)
            cache.store(slot)
        assert driver.num_waits == 0
        if how == "shortage":
            cache.ensure(cache.acquire(5), 4 * 64)  # unmapping waits, on the host
            assert found == [True]
        elif how == "acquire":
            assert cache.acquire(slot) == slot
            cache.ensure(slot, 128)
            driver.run(0)
            assert found == [True]  # scrubbed behind it
            assert not cache.rows(slot, 0)[0].any()
        else:
            if how == "resume":
                mine = cache.resume(slot, 100, version=version)
            else:
                mine = cache.fork(slot, 100, version=version)
            assert found == []  # nobody has waited
            with cache.step([mine]):
                seen = launch(cache, mine, 100)
            driver.run(0)
            assert (found, seen) == ([True], [True])
            assert (cache.rows(mine, 0)[0] == 7).all()
        assert num_left(driver, 2) == 1


def test_mapping_ahead_takes_nothing_from_a_sequence_whose_work_goes_on() -> None:
    driver = WatchfulDriver()
    with watched_cache(driver) as cache:
        slot = new(cache, 128)
        with driver.stream(1), cache.step([slot]):
            found = launch(cache, slot, 128)
            cache.store(slot)
        other = new(cache, 128)
        with pytest.raises(vattn.OutOfPages):
            cache.ensure_batch([other], [192], wait=False)
        assert (found, left(cache)) == ([], {slot: 128})
        driver.run(1)
        cache.ensure_batch([other], [192], wait=False)
        assert left(cache) == {slot: 64}
