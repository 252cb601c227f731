"""``guard``: the hardware refuses writes to pages that are mapped in several slots, and to no others."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers.engine import cache_of, tokens_of
from helpers.llama import random_tokens, small_model
from helpers.watchful_driver import LAYOUT, PAGE, WatchfulDriver, launch, new

import vattn
from vattn import Engine, Request, Sampling
from vattn.driver import LedgerDriver

ROWS = 64  # of a page of LAYOUT


@pytest.fixture
def cache() -> Iterator[vattn.KVCache]:
    with guarded() as cache:
        yield cache
        cache.check_integrity()


def guarded(**options: object) -> vattn.KVCache:
    return vattn.KVCache(LAYOUT, 6, "cpu", 64 * PAGE, page_bytes=PAGE, guard=True, **options)  # type: ignore[arg-type]


def read_only(cache: vattn.KVCache, slot: int) -> list[int]:
    """Which of a slot's pages may only be read."""
    cache.check_integrity()
    start, mappings = cache.k(0)[slot].data_ptr(), cache.driver.book.mappings
    found = {page: mappings.get(start + page * PAGE) for page in range(-(-LAYOUT.max_seq_len // ROWS))}
    return [page for page, mapping in found.items() if mapping is not None and not mapping.writable]


# -- what the hardware does ------------------------------------------------------------------------------------------
_WRITE = """
import sys, torch, vattn
device, who = sys.argv[1:]
unit = 4096 if device == "cpu" else 2 << 20
layout = vattn.KVLayout(1, 1, unit // 512, 400, torch.float32)  # 64 tokens to a page
cache = vattn.KVCache(layout, 4, device, 64 * unit, page_bytes=unit, guard=True)
parent = cache.acquire()
cache.ensure(parent, 192)
cache.k(0)[parent, :192] = 5
slot, row = parent, 100
if who == "stored":
    version = int(cache.versions([parent])[0])
    cache.store(parent)
    child = cache.fork(parent, 150, version=version)
else:
    child = cache.fork(parent, 150)
if who in ("child", "stored", "copied"):
    slot = child
if who == "copied":
    cache.make_writable(child, 100, 101)
elif who == "past the shared":
    row = 140
elif who == "cut off":
    cache.truncate(child, 64)
elif who == "last":
    cache.release(child)
    cache.make_writable(parent, 100, 101)
elif who == "gone":
    cache.release(child)
    cache.trim()
print(int(cache.k(0)[slot, row].sum() / layout.groups[0].head_dim), flush=True)
cache.k(0)[slot, row] = 6
cache.driver.synchronize()
other = child if slot == parent else parent
if who in ("copied", "past the shared"):
    assert (cache.k(0)[other, :150] == 5).all()
print("written")
"""
_FAULTS = ("parent", "child", "stored")
_WRITES = ("copied", "past the shared", "cut off", "last", "gone")


@pytest.mark.unsanitized
@pytest.mark.parametrize("who", [*_FAULTS, *_WRITES])
def test_a_write_to_a_shared_row_faults_and_a_read_does_not(device: str, who: str) -> None:
    """In a child process, since it kills."""
    command = [sys.executable, "-c", _WRITE, device, who]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.stdout.split() == (["5"] if who in _FAULTS else ["5", "written"]), child.stderr
    if who in _FAULTS and device == "cpu":
        assert child.returncode == -signal.SIGSEGV
    else:
        assert (child.returncode != 0) == (who in _FAULTS)
    if who in _FAULTS and device == "cuda":
        assert "illegal" in child.stderr or "CUDA" in child.stderr


# -- which pages -----------------------------------------------------------------------------------------------------
def test_pages_are_read_only_from_the_fork_to_the_copy(cache: vattn.KVCache) -> None:
    parent = new(cache, 200)
    assert read_only(cache, parent) == []
    child = cache.fork(parent, 150)
    assert read_only(cache, parent) == read_only(cache, child) == [0, 1]  # the third was copied
    cache.make_writable(child, 70, 80)
    assert read_only(cache, parent) == read_only(cache, child) == [0]
    cache.rows(child, 0)[0][70:] = 1.0
    cache.rows(parent, 0)[0][64:] = 2.0
    assert (cache.rows(child, 0)[0][70:] == 1).all()
    grandchild = cache.fork(child)
    cache.make_writable(parent, 0, 1)
    assert read_only(cache, parent) == []
    assert read_only(cache, child) == read_only(cache, grandchild) == [0, 1]
    cache.truncate(grandchild, 64)
    assert read_only(cache, child) == read_only(cache, grandchild) == [0]
    cache.truncate(child, 0)
    assert read_only(cache, grandchild) == []


def test_growing_in_a_shared_page_makes_a_copy_that_is_writable(cache: vattn.KVCache) -> None:
    parent = new(cache, 128)
    child = cache.fork(parent)
    cache.truncate(child, 100)
    cache.ensure(child, 110)
    assert read_only(cache, parent) == read_only(cache, child) == [0]
    cache.rows(child, 0)[0][100:] = 1.0


def test_a_released_sequence_leaves_pages_that_the_last_owner_gets_back_without_a_copy(cache: vattn.KVCache) -> None:
    parent = new(cache, 128)
    child = cache.fork(parent)
    calls = cache.stats().num_driver_calls
    cache.release(child)
    assert cache.stats().num_driver_calls == calls
    assert read_only(cache, parent) == [0, 1]  # the aliases are parked
    cache.make_writable(parent, 0, 128)
    assert read_only(cache, parent) == []
    assert cache.stats().num_copy == 0
    cache.rows(parent, 0)[0][:] = 1.0


def test_a_fork_into_the_slot_of_the_last_one_takes_no_driver_call(cache: vattn.KVCache) -> None:
    parent = new(cache, 128)
    child = cache.fork(parent)
    cache.release(child)
    calls = cache.stats().num_driver_calls
    assert cache.fork(parent, into=child) == child
    assert cache.stats().num_driver_calls == calls
    assert read_only(cache, parent) == read_only(cache, child) == [0, 1]


def test_parked_pages_are_writable_for_their_next_owner(cache: vattn.KVCache) -> None:
    parent = new(cache, 128)
    child = cache.fork(parent)
    cache.release(parent)
    cache.release(child)
    assert cache.acquire(parent) == parent
    cache.ensure(parent, 200)  # adopts its pages, and scrubs them
    assert read_only(cache, parent) == []
    assert not cache.rows(parent, 0)[0].any()
    cache.rows(parent, 0)[0][:] = 1.0


def test_stored_sequences_share_read_only(cache: vattn.KVCache) -> None:
    slot = new(cache, 128)
    version = int(cache.versions([slot])[0])
    cache.store(slot)
    assert read_only(cache, slot) == []
    child = cache.fork(slot, 100, version=version)
    assert read_only(cache, slot) == read_only(cache, child) == [0]
    assert cache.resume(slot, 128, version=version) == slot
    assert read_only(cache, slot) == [0]
    cache.ensure(slot, 200)
    cache.rows(slot, 0)[0][128:] = 1.0
    cache.truncate(child, 0)
    assert read_only(cache, slot) == []


def test_pages_of_several_sizes(cache: vattn.KVCache) -> None:
    layout = vattn.KVLayout(1, 1, 8, 64 * 64, torch.float32)
    with vattn.KVCache(layout, 3, "cpu", 300 * PAGE, page_bytes=PAGE, max_page_bytes=8 * PAGE, guard=True) as cache:
        parent = new(cache, 60 * ROWS)
        child = cache.fork(parent, 40 * ROWS + 1)
        cache.check_integrity()
        shared = cache.stats().shared_bytes // PAGE * ROWS
        assert shared > 30 * ROWS
        cache.make_writable(child, 0, 40 * ROWS)
        cache.rows(child, 0)[0][:] = 1.0
        cache.rows(parent, 0)[0][:] = 2.0
        assert (cache.rows(child, 0)[0] == 1).all()
        cache.check_integrity()


# -- work that goes on -----------------------------------------------------------------------------------------------
def test_fork_waits_for_work_that_writes_what_it_shares() -> None:
    driver = WatchfulDriver()
    with guarded(driver=driver) as cache:
        parent = new(cache, 128)
        with driver.stream(1), cache.step([parent]):
            found = launch(cache, parent, 128, 7.0)
        child = cache.fork(parent)
        assert found == [True]  # or it would have met pages that it must not write to
        waits = driver.num_waits
        with cache.step([parent]):
            found = launch(cache, parent, 128)
        cache.fork(parent)  # they are read-only already
        assert (found, driver.num_waits) == ([], waits)
        assert (cache.rows(child, 0)[0] == 7).all()


def test_what_reads_a_page_has_ended_before_it_is_writable_again() -> None:
    """On a GPU it could fault."""
    driver = WatchfulDriver()
    with guarded(driver=driver) as cache:
        parent = new(cache, 128)
        cache.rows(parent, 0)[0][:] = 5.0
        child = cache.fork(parent)
        with driver.stream(1), cache.step([parent]):
            found = launch(cache, parent, 128)
        cache.make_writable(child, 0, 64)  # the parent is the last to have the page
        assert found == [True]
        assert read_only(cache, parent) == [1]
        driver.synchronize()
        assert (cache.rows(child, 0)[0] == 5).all()


def test_fork_does_not_wait_where_it_shares_nothing() -> None:
    driver = WatchfulDriver()
    with guarded(driver=driver) as cache:
        parent = new(cache, 128)
        with cache.step([parent]):
            found = launch(cache, parent, 128, 7.0)
            child = cache.fork(parent, 63)
        assert (found, driver.num_waits) == ([], 0)
        driver.run(0)
        assert (cache.rows(child, 0)[0] == 7).all()


def test_fork_is_refused_while_a_step_may_write_what_it_would_share(cache: vattn.KVCache) -> None:
    parent = new(cache, 128)
    with cache.step([parent]):
        with pytest.raises(vattn.ConfigError, match="leave the step before fork"):
            cache.fork(parent)
        assert read_only(cache, parent) == []
        cache.rows(parent, 0)[0][:] = 1.0
    child = cache.fork(parent)
    with cache.step([parent, child]):
        cache.fork(parent)  # nothing becomes read-only that was not before


# -- who asks for it -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_guard_is_a_bool(value: object) -> None:
    with pytest.raises(vattn.ConfigError, match="guard must be True or False"):
        vattn.KVCache(LAYOUT, 1, "cpu", guard=value)  # type: ignore[arg-type]


def test_without_guard_every_page_is_writable() -> None:
    with vattn.KVCache(LAYOUT, 6, "cpu", 64 * PAGE, page_bytes=PAGE) as cache:
        parent = new(cache, 128)
        child = cache.fork(parent)
        assert not cache.guard
        assert read_only(cache, parent) == read_only(cache, child) == []


def test_the_ledger_books_it() -> None:
    driver = LedgerDriver(1 << 30)
    with vattn.KVCache(vattn.KVLayout(4, 4, 1024, 640, torch.float32), 4, driver=driver, guard=True) as cache:
        parent = cache.acquire()
        cache.ensure(parent, 40)
        cache.fork(parent, 32)
        assert sum(not mapping.writable for mapping in driver.book.mappings.values()) == 4
        cache.check_integrity()


@pytest.mark.parametrize("order", ["token", "layer"])
def test_an_engine_gives_the_same_tokens(order: str) -> None:
    model = small_model()
    prompt = random_tokens(70, 128, seed=1)

    def sampled(seed: int) -> Request:
        return Request(prompt[: 40 + 10 * seed], 24, Sampling(0.9, seed=seed), n=3)

    rounds = [[sampled(1), Request(prompt, 24)], [sampled(2), sampled(3)], [Request(prompt, 40), sampled(1)]]
    answers = {}
    for guard in (False, True):
        with cache_of(model, 12, 400, order, guard=guard) as cache, Engine(model, cache) as engine:
            answers[guard] = [tokens_of(engine.generate(requests)) for requests in rounds]
            assert engine.stats().num_prefix_hits > 0
            set_access, maps = cache.stats().num_set_access, cache.stats().num_map
            assert (set_access > maps) == guard  # pages were shared, and given back
            cache.check_integrity()
    assert answers[True] == answers[False]
