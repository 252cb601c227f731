"""``step``: pages of its slots stay where they are until the work it launched has ended."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import vattn

LAYOUT = vattn.KVLayout(num_layers=4, num_kv_heads=4, head_dim=1024, max_seq_len=640, dtype=torch.float32)


@pytest.fixture
def cache(device):
    with vattn.KVCache(LAYOUT, 4, device=device, memory_limit=64 << 20) as cache:
        yield cache


def test_release_inside_a_step_keeps_pages_and_slot_until_it_ends(cache):
    slot = cache.acquire(2)
    cache.ensure(slot, 100)
    view = cache.rows(slot, 3)[0]
    view.fill_(4)
    before = cache.stats()
    with cache.step([slot]):
        cache.release(slot)
        assert (view == 4).all()  # still mapped
        stats = cache.stats()
        assert stats.parked_bytes == before.in_use_bytes
        assert stats.in_use_bytes == stats.row_bytes == stats.waste_bytes == 0
        with pytest.raises(vattn.ConfigError, match="holds no sequence"):
            cache.seq_len(slot)
        with pytest.raises(vattn.OutOfSlots):
            cache.acquire(slot)
        cache.check_integrity()
    assert cache.acquire(slot) == slot
    assert cache.stats().parked_bytes == before.in_use_bytes  # no sequence's until it grows over them
    cache.ensure(slot, 100)
    assert cache.stats().parked_bytes == 0
    assert not cache.rows(slot, 3)[0].any()
    cache.check_integrity()


def test_truncate_inside_a_step_gives_pages_back_afterwards(cache):
    slot = cache.acquire()
    cache.ensure(slot, 100)
    view = cache.rows(slot, 0)[0]
    view.fill_(1)
    with cache.step([slot]):
        cache.truncate(slot, 20)
        assert view.sum() == view.numel()
        assert cache.seq_len(slot) == 20
        assert cache.stats().waste_bytes == cache.stats().mapped_bytes - 20 * LAYOUT.bytes_per_token
        cache.check_integrity()
    cache.ensure(cache.acquire(), 480)  # needs what truncate left
    assert cache.stats().in_use_bytes <= 64 << 20
    cache.check_integrity()


def test_pages_held_by_an_open_step_are_out_of_reach_and_then_not(device):
    with vattn.KVCache(LAYOUT, 2, device=device, memory_limit=8 << 20) as cache:
        slot, other = cache.acquire(), cache.acquire()
        cache.ensure(slot, 64)
        with cache.step([slot]):
            cache.truncate(slot, 0)
            with pytest.raises(vattn.OutOfPages):
                cache.ensure(other, 1)
            cache.check_integrity()
        cache.ensure(other, 64)
        cache.check_integrity()


def test_the_array_of_slots_may_be_used_again_inside(cache):
    slots = np.array([cache.acquire(), cache.acquire()])
    other = cache.acquire()
    cache.ensure_batch([*slots.tolist(), other], [64, 64, 64])
    with cache.step(slots):
        slots[:] = other
        cache.release(0)
        with pytest.raises(vattn.OutOfSlots):
            cache.acquire(0)
    assert cache.acquire(0) == 0
    cache.release(other)
    assert cache.acquire(other) == other
    cache.check_integrity()


def test_all_slots_in_open_steps_is_out_of_slots(cache):
    slots = [cache.acquire() for _ in range(4)]
    with cache.step(slots):
        for slot in slots:
            cache.release(slot)
        with pytest.raises(vattn.OutOfSlots):
            cache.acquire()
    assert cache.acquire() == 0


def test_a_copy_on_write_inside_a_step_is_refused_before_anything_moves(cache):
    parent = cache.acquire()
    cache.ensure(parent, 32)
    child = cache.fork(parent)
    before = cache.stats()
    with cache.step([child]):
        with pytest.raises(vattn.ConfigError, match="before step"):
            cache.make_writable(child, 0, 1)
        cache.ensure(child, 33)  # a new page is no remapping
    assert cache.stats().num_unmap == before.num_unmap
    cache.make_writable(child, 0, 1)
    cache.check_integrity()


def test_steps_nest_and_overlap(cache):
    a, b = cache.acquire(), cache.acquire()
    cache.ensure_batch([a, b], [50, 50])
    outer, inner = cache.step([a]), cache.step([a, b])
    outer.__enter__()
    inner.__enter__()
    cache.release(a)
    outer.__exit__(None, None, None)
    with pytest.raises(vattn.OutOfSlots):  # the inner step is open
        cache.acquire(a)
    assert cache.trim() == 0
    assert cache.stats().parked_bytes > 0
    inner.__exit__(None, None, None)
    assert cache.acquire(a) == a
    assert cache.trim() > 0
    assert cache.stats().parked_bytes == 0


def test_an_exception_in_the_block_ends_the_step(cache):
    slot = cache.acquire()
    with pytest.raises(KeyboardInterrupt), cache.step([slot]):
        raise KeyboardInterrupt
    cache.release(slot)
    assert cache.acquire(slot) == slot


def test_close_inside_a_step_is_refused(cache):
    slot = cache.acquire()
    with cache.step([slot]), pytest.raises(vattn.ConfigError, match="leave the step"):
        cache.close()
    cache.check_integrity()


@pytest.mark.parametrize("slots", [[9], [-1], [0, 0], [1], [0.5], "0"])
def test_bad_slots(cache, slots):
    cache.acquire(0)
    with pytest.raises(vattn.ConfigError), cache.step(slots):
        pass


def test_another_thread_may_release_while_a_step_is_open(cache):
    slot = cache.acquire()
    cache.ensure(slot, 100)
    view = cache.rows(slot, 0)[0]
    view.fill_(2)
    with cache.step([slot]):
        thread = threading.Thread(target=cache.release, args=(slot,))
        thread.start()
        thread.join()
        assert (view == 2).all()
    cache.check_integrity()


# -- on the GPU work really is in flight ----------------------------------------------------------------------------
def spin(milliseconds: float) -> None:
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@pytest.mark.gpu
@pytest.mark.parametrize("end", ["release", "truncate", "make_writable"])
@pytest.mark.parametrize("bracketed", [False, True])
def test_work_in_flight_finishes_on_its_pages(end, bracketed):
    with vattn.KVCache(LAYOUT, 4, device="cuda", memory_limit=64 << 20) as cache:
        parent = cache.acquire()
        cache.ensure(parent, 64)
        cache.rows(parent, 0)[0].fill_(3)
        slot = cache.fork(parent) if end == "make_writable" else parent
        rows = cache.rows(slot, 0)[0]
        side = torch.cuda.Stream()
        # Bracketed work may run on any stream; without a step only the current stream's is known to the cache.
        stream = side if bracketed else torch.cuda.current_stream()
        side.wait_stream(torch.cuda.current_stream())
        out = torch.zeros((), device="cuda")
        with torch.cuda.stream(stream):
            if bracketed:
                with cache.step([slot]):
                    spin(50)
                    out += rows.sum()
            else:
                spin(50)
                out += rows.sum()
        if end == "release":
            cache.release(slot)
            thief = cache.acquire()
            cache.ensure(thief, 64)
            cache.rows(thief, 0)[0].fill_(1000)
        elif end == "truncate":
            cache.truncate(slot, 0)
            cache.trim()
        else:
            cache.make_writable(slot, 0, 64)
            rows_now = cache.rows(slot, 0)[0]
            rows_now.fill_(1000)
        torch.cuda.synchronize()
        assert out.item() == 3 * rows.numel()
        cache.check_integrity()


@pytest.mark.gpu
def test_a_step_on_another_stream_sees_scrubbed_rows():
    with vattn.KVCache(LAYOUT, 2, device="cuda", memory_limit=32 << 20) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 200)
        cache.rows(slot, 0)[0].fill_(torch.nan)
        cache.release(slot)
        slot = cache.acquire()
        spin(50)  # the scrubbing queues behind this
        cache.ensure(slot, 200)
        with torch.cuda.stream(torch.cuda.Stream()):
            with cache.step([slot]):
                dirty = cache.rows(slot, 0)[0].isnan().any()
            assert not dirty.item()


@pytest.mark.gpu
def test_nothing_is_mapped_during_capture():
    with vattn.KVCache(LAYOUT, 2, device="cuda", memory_limit=32 << 20) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 20)
        k = cache.k(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cache.ensure(slot, 21)  # within the page: no driver call
            for refused in (
                lambda: cache.ensure(slot, 100),
                lambda: cache.fork(slot),
                lambda: cache.truncate(slot, 0),
                lambda: cache.release(slot),
                lambda: cache.step([slot]).__enter__(),
            ):
                with pytest.raises(vattn.ConfigError, match="graph"):
                    refused()
            k[slot, 20].fill_(6)
        cache.check_integrity()
        graph.replay()
        assert (cache.rows(slot, 0)[0][20] == 6).all()


@pytest.mark.gpu
def test_a_captured_graph_reads_pages_mapped_later():
    with vattn.KVCache(LAYOUT, 2, device="cuda", memory_limit=128 << 20) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 640)
        out = torch.zeros((), device="cuda")
        k = cache.rows(slot, 0)[0]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out.copy_(k.sum())
        cache.release(slot)
        cache.trim()
        slot = cache.acquire(slot)
        cache.ensure(slot, 640)
        cache.rows(slot, 0)[0].fill_(2)
        with cache.step([slot]):
            graph.replay()
        assert out.item() == 2 * k.numel()
