"""``fork``, copy-on-write and ``truncate`` on shared pages: nobody ever sees another sequence's writes."""

from __future__ import annotations

import pytest
import torch

import vattn

TOKENS_PER_PAGE = 16  # of this layout, at 2 MiB
LAYOUT = vattn.KVLayout(num_layers=4, num_kv_heads=4, head_dim=1024, max_seq_len=640, dtype=torch.float32)
PAGE = TOKENS_PER_PAGE * LAYOUT.bytes_per_token


@pytest.fixture
def cache(device):
    assert PAGE == 2 << 20
    with vattn.KVCache(LAYOUT, 8, device=device) as cache:
        yield cache


def fill(cache: vattn.KVCache, slot: int, start: int, end: int, value: float) -> None:
    for layer in LAYOUT.layers:
        for tensor in cache.rows(slot, layer):
            tensor[start:end] = value


def values(cache: vattn.KVCache, slot: int) -> list[float]:
    """Each row's value, every element of every layer agreeing on it."""
    rows = torch.stack([tensor for layer in LAYOUT.layers for tensor in cache.rows(slot, layer)]).transpose(0, 1)
    rows = rows.flatten(1)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].tolist()


def new(cache: vattn.KVCache, rows: int, value: float) -> int:
    slot = cache.acquire()
    cache.ensure(slot, rows)
    fill(cache, slot, 0, rows, value)
    return slot


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 32, 39, 40])
def test_a_fork_has_the_prefix_and_shares_whole_pages(cache, rows):
    parent = new(cache, 40, 5)
    before = cache.stats()
    child = cache.fork(parent, rows)
    after = cache.stats()
    assert values(cache, child) == [5] * rows
    assert after.shared_bytes == rows // TOKENS_PER_PAGE * PAGE
    assert after.physical_bytes - before.physical_bytes == (PAGE if rows % TOKENS_PER_PAGE else 0)
    assert after.num_copy == (1 if rows % TOKENS_PER_PAGE else 0)
    cache.check_integrity()


def test_the_copied_page_is_zero_past_the_cut(cache):
    parent = new(cache, 32, 5)
    child = cache.fork(parent, 20)
    cache.ensure(child, 32)
    assert values(cache, child) == [5] * 20 + [0] * 12


def test_a_recycled_page_under_the_copy_is_zero_past_the_cut(cache):
    cache.release(new(cache, 40, torch.nan))
    parent = new(cache, 20, 5)
    child = cache.fork(parent)
    cache.ensure(child, 32)
    assert values(cache, child) == [5] * 20 + [0] * 12


def test_both_sides_go_on_alone(cache):
    parent = new(cache, 20, 5)
    child = cache.fork(parent)
    cache.ensure_batch([parent, child], [40, 40])
    fill(cache, parent, 20, 40, 6)
    fill(cache, child, 20, 40, 7)
    assert values(cache, parent) == [5] * 20 + [6] * 20
    assert values(cache, child) == [5] * 20 + [7] * 20


def test_make_writable_copies_what_is_shared_and_nothing_else(cache):
    parent = new(cache, 64, 5)
    child = cache.fork(parent)
    copies = cache.stats().num_copy
    cache.make_writable(child, 17, 18)
    assert cache.stats().num_copy == copies + 1
    fill(cache, child, 16, 32, 8)  # the whole page is the child's now
    assert values(cache, child) == [5] * 16 + [8] * 16 + [5] * 32
    assert values(cache, parent) == [5] * 64
    assert cache.stats().shared_bytes == 3 * PAGE
    cache.make_writable(child, 16, 32)
    cache.make_writable(child, 3, 3)
    assert cache.stats().num_copy == copies + 1
    cache.check_integrity()


def test_growing_over_a_shared_page_copies_the_rows_below_and_zeros_the_rest(cache):
    parent = new(cache, 64, 5)
    child = cache.fork(parent)
    cache.truncate(parent, 20)
    cache.ensure(parent, 64)
    fill(cache, parent, 20, 64, 9)
    assert values(cache, parent) == [5] * 20 + [9] * 44
    assert values(cache, child) == [5] * 64
    cache.check_integrity()


def test_a_page_lives_until_its_last_owner_goes(cache):
    parent = new(cache, 64, 5)
    children = [cache.fork(parent) for _ in range(3)]
    assert cache.stats().in_use_bytes == 4 * PAGE
    cache.release(parent)
    cache.release(children[0])
    assert cache.stats().in_use_bytes == 4 * PAGE
    assert cache.stats().shared_bytes == 4 * PAGE
    cache.release(children[2])
    assert cache.stats().shared_bytes == 0
    assert values(cache, children[1]) == [5] * 64
    cache.make_writable(children[1], 0, 64)  # alone: nothing to copy
    assert cache.stats().num_copy == 0
    cache.release(children[1])
    assert cache.stats().in_use_bytes == 0
    cache.check_integrity()


def test_forks_of_forks_and_into_a_named_slot(cache):
    grandparent = new(cache, 48, 1)
    parent = cache.fork(grandparent, 33, into=7)
    assert parent == 7
    fill(cache, parent, 32, 33, 2)
    child = cache.fork(parent, into=3)
    assert values(cache, child) == [1] * 32 + [2]
    with pytest.raises(vattn.OutOfSlots):
        cache.fork(child, into=7)
    with pytest.raises(vattn.ConfigError):
        cache.fork(child, 34)


def test_a_fork_that_finds_no_page_leaves_everything_as_it_was(device):
    with vattn.KVCache(LAYOUT, 4, device=device, memory_limit=3 * PAGE) as cache:
        parent = new(cache, 40, 5)
        before = cache.stats()
        with pytest.raises(vattn.OutOfPages):
            cache.fork(parent)
        assert cache.stats().num_live_slots == before.num_live_slots
        assert cache.stats().mapped_bytes == before.mapped_bytes
        cache.check_integrity()
        child = cache.fork(parent, 32)  # whole pages only: no memory needed
        with pytest.raises(vattn.OutOfPages):
            cache.make_writable(child, 0, 1)
        assert values(cache, child) == [5] * 32
        cache.check_integrity()


def test_fork_of_nothing_is_acquire(cache):
    parent = new(cache, 20, 5)
    child = cache.fork(parent, 0)
    assert cache.seq_len(child) == 0
    assert cache.stats().num_copy == 0
    assert cache.seq_len(cache.fork(child)) == 0
