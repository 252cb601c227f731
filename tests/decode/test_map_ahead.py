"""Mapping ahead: on a thread or in line, it is ready when asked, stays within limits and leaves ended slots alone."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from vattn import KVCache, KVLayout
from vattn.decode.map_ahead import MapAhead
from vattn.errors import ConfigError, OutOfPages


@pytest.fixture
def cache(make_cache) -> KVCache:
    return make_cache(
        KVLayout(2, 1, 16, 500, torch.float32), 4, page_bytes=4096, memory_limit=20 * 4096
    )  # 16 rows a page


@pytest.fixture(params=[True, False], ids=["thread", "inline"])
def mapper(request, cache):
    with MapAhead(cache, 20, threaded=request.param) as mapper:
        yield mapper


def begin(cache, mapper, slot, rows=1, limit=400):
    cache.acquire(slot)
    cache.ensure(slot, rows)
    mapper.track(slot, rows, limit)


def arrays(*values):
    return tuple(np.array(value, np.int64) for value in values)


def test_rows_are_there_before_they_are_needed(cache, mapper):
    begin(cache, mapper, 2)
    for rows in range(1, 120):
        mapper.require(*arrays([2], [rows]))
        assert cache.seq_len(2) >= rows
        mapper.look_ahead(*arrays([2], [rows]))
        mapper._settle()
        assert rows + 10 <= cache.seq_len(2) <= rows + 20
    cache.check_integrity()


def test_never_more_than_the_sequence_needs(cache, mapper):
    begin(cache, mapper, 1, limit=33)
    mapper.look_ahead(*arrays([1], [30]))
    mapper._settle()
    assert cache.seq_len(1) == 33
    mapper.require(*arrays([1], [33]))
    before = cache.stats()
    mapper.look_ahead(*arrays([1], [33]))
    mapper._settle()
    assert cache.stats() == before


def test_what_the_thread_has_not_reached_is_mapped_at_once(cache):
    with MapAhead(cache, 0) as mapper:
        begin(cache, mapper, 0)
        begin(cache, mapper, 3)
        mapper.require(*arrays([3, 0], [40, 1]))
        assert (cache.seq_len(0), cache.seq_len(3)) == (1, 40)


def test_out_of_pages_comes_when_it_is_needed(cache, mapper):
    """Looking ahead in vain says nothing; asking does, and asking again works when there is room."""
    begin(cache, mapper, 0, rows=16 * 19)
    begin(cache, mapper, 1, rows=16)
    mapper.look_ahead(*arrays([1], [16]))
    mapper._settle()
    assert cache.seq_len(1) == 16
    for _ in range(2):
        with pytest.raises(OutOfPages):
            mapper.require(*arrays([1], [17]))
    mapper.forget(0)
    cache.release(0)
    mapper.require(*arrays([1], [17]))
    assert cache.seq_len(1) == 17
    cache.check_integrity()


def test_an_ended_slot_is_left_alone(cache, mapper, monkeypatch):
    """A job that was queued for a sequence does nothing for the slot's next one, or for none."""
    begin(cache, mapper, 0)
    held = threading.Lock()
    ensure_batch = cache.ensure_batch

    def slow(slots, rows):
        with held:
            ensure_batch(slots, rows)

    monkeypatch.setattr(cache, "ensure_batch", slow)
    if mapper._thread is not None:
        with held:
            begin(cache, mapper, 1)
            mapper.look_ahead(*arrays([1], [1]))  # the thread waits in it
            time.sleep(0.02)
            mapper.look_ahead(*arrays([0], [1]))  # queued behind
            mapper._generation[0] += 1  # what ``forget`` does, without waiting for the thread
    else:
        mapper.forget(0)
        mapper.look_ahead(*arrays([0], [1]))
    mapper._settle()
    assert cache.seq_len(0) == 1


def test_a_failure_of_the_thread_reaches_the_caller(cache, monkeypatch):
    with MapAhead(cache, 20) as mapper:
        begin(cache, mapper, 0)
        monkeypatch.setattr(cache, "ensure_batch", lambda *arguments, **options: 1 / 0)
        mapper.look_ahead(*arrays([0], [1]))
        mapper._settle()
        monkeypatch.undo()
        with pytest.raises(ZeroDivisionError):
            mapper.require(*arrays([0], [1]))
        mapper.require(*arrays([0], [30]))
        assert cache.seq_len(0) == 30


def test_no_thread_is_left(cache):
    before = threading.active_count()
    mapper = MapAhead(cache, 5)
    assert threading.active_count() == before + 1
    mapper.close()
    mapper.close()
    assert threading.active_count() == before
    with pytest.raises(ConfigError, match="ahead_tokens"):
        MapAhead(cache, -1)
