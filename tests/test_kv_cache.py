"""The cache as a user meets it: growth, addresses, accounting, lifetimes. On every device that is there."""

from __future__ import annotations

import copy
import gc
import pickle
import time

import numpy as np
import pytest
import torch

import vattn

LLAMA_8B = vattn.KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, max_seq_len=131072, dtype=torch.bfloat16)
SMALL = vattn.KVLayout(num_layers=3, num_kv_heads=2, head_dim=64, max_seq_len=4096, dtype=torch.float32)


def open_cache(device: str, layout: vattn.KVLayout = SMALL, max_slots: int = 4, **options: object) -> vattn.KVCache:
    return vattn.KVCache(layout, max_slots, device=device, **options)  # type: ignore[arg-type]


def is_reserved(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        spans = (line.split(maxsplit=1)[0].split("-") for line in maps)
        return any(int(low, 16) <= address < int(high, 16) for low, high in spans)


def test_a_tebibyte_of_addresses_opens_at_once_and_holds_nothing(device):
    open_cache(device).close()  # the CUDA context, and torch's first DLPack import
    start = time.perf_counter()
    cache = open_cache(device, LLAMA_8B, 64)
    seconds = time.perf_counter() - start
    with cache:
        assert cache.stats().reserved_bytes == 1 << 40
        assert cache.stats().physical_bytes == 0
        assert seconds < 0.05


def test_the_last_slot_is_addressed_right(device):
    with open_cache(device, LLAMA_8B, 64) as cache:
        first, last = cache.acquire(0), cache.acquire(63)
        cache.ensure_batch([first, last], [40, 40])
        for layer in (0, 31):
            assert cache.k(layer)[63].data_ptr() - cache.k(layer)[0].data_ptr() == 63 * 131072 * 131072
            for slot in (first, last):
                # Through the index, as a model appends: more than 2**31 elements from the view's start.
                index = torch.tensor([slot], device=cache.device), torch.tensor([39], device=cache.device)
                cache.k(layer).index_put_(
                    index, torch.full((1, 8, 128), slot + layer + 1.0, device=cache.device).bfloat16()
                )
                cache.v(layer)[slot, 39] = -(slot + layer + 1.0)
        for layer in (0, 31):
            for slot in (first, last):
                k, v = cache.rows(slot, layer)
                assert k.shape == v.shape == (40, 8, 128)
                assert (k[39] == slot + layer + 1.0).all()
                assert (v[39] == -(slot + layer + 1.0)).all()
                assert not k[:39].any()
                assert not v[:39].any()
        assert cache.stats().physical_bytes == 2 * 3 * (2 << 20)  # 16 tokens of this model in 2 MiB


@pytest.mark.parametrize("order", ["token", "layer"])
def test_addresses_never_change(device, order):
    layout = vattn.KVLayout(3, 2, 64, 2048, torch.float32, order=order)
    with open_cache(device, layout) as cache:
        before = [cache.k(layer).data_ptr() for layer in range(3)] + [cache.v(layer).data_ptr() for layer in range(3)]
        slot = cache.acquire()
        for rows in (1, 100, 2048):
            cache.ensure(slot, rows)
        cache.truncate(slot, 3)
        cache.release(slot)
        cache.acquire()
        after = [cache.k(layer).data_ptr() for layer in range(3)] + [cache.v(layer).data_ptr() for layer in range(3)]
        assert before == after


def test_ensure_backs_rows_and_never_shrinks(device):
    with open_cache(device) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 1000)
        mapped = cache.stats().mapped_bytes
        for rows in (0, 1, 999, 1000):
            cache.ensure(slot, rows)
        assert cache.seq_len(slot) == 1000
        assert cache.stats().mapped_bytes == mapped
        assert mapped == -(-1000 * SMALL.bytes_per_token // cache.page_bytes) * cache.page_bytes


def test_growth_takes_driver_calls_only_at_page_boundaries(device):
    with open_cache(device) as cache:
        slot = cache.acquire()
        tokens_per_page = int(SMALL.tokens_per_page(cache.page_bytes))
        calls = []
        for rows in range(1, 3 * tokens_per_page + 1):
            before = cache.stats().num_driver_calls
            cache.ensure(slot, rows)
            if cache.stats().num_driver_calls > before:
                calls.append(rows)
            if rows % 97 == 0:
                cache.check_integrity()
        assert len(calls) == -(-3 * tokens_per_page * SMALL.bytes_per_token // cache.page_bytes)
        assert calls[0] == 1


def test_a_sequence_wastes_at_most_one_page_in_token_order(device):
    with open_cache(device, LLAMA_8B) as cache:
        slot = cache.acquire()
        for rows in (1, 15, 16, 17, 100):
            cache.ensure(slot, rows)
            assert cache.stats().waste_bytes < cache.page_bytes
            assert cache.stats().row_bytes == rows * 131072


@pytest.mark.parametrize(
    "as_array", [list, tuple, lambda values: np.array(values, np.int64), lambda values: np.array(values, np.int32)]
)
def test_ensure_batch_takes_sequences_and_arrays(device, as_array):
    with open_cache(device) as cache:
        slots = [cache.acquire() for _ in range(3)]
        cache.ensure_batch(as_array(slots), as_array([5, 0, 700]))
        assert [cache.seq_len(slot) for slot in slots] == [5, 0, 700]
        cache.ensure_batch(as_array(slots[::-1]), as_array([1, 9, 2]))
        assert [cache.seq_len(slot) for slot in slots] == [5, 9, 700]
        cache.ensure_batch(as_array([]), as_array([]))
        cache.check_integrity()


def test_ensure_batch_is_all_or_nothing(device):
    with open_cache(device, memory_limit=8 << 20) as cache:
        slots = [cache.acquire() for _ in range(3)]
        cache.ensure(slots[0], 10)
        before = cache.stats()
        with pytest.raises(vattn.OutOfPages) as caught:
            cache.ensure_batch(slots, [20, 4096, 4096])
        after = cache.stats()
        assert [cache.seq_len(slot) for slot in slots] == [10, 0, 0]
        assert after.physical_bytes == before.physical_bytes
        assert after.num_oom == 1
        assert caught.value.asked_bytes > caught.value.free_bytes
        assert caught.value.limit_bytes == 8 << 20
        for figure in (caught.value.asked_bytes, caught.value.free_bytes, 8 << 20):
            assert str(figure) in str(caught.value)
        cache.check_integrity()


def test_the_limit_is_used_to_the_last_page_and_never_passed(device):
    with open_cache(device, LLAMA_8B, memory_limit=(6 << 20) + 12345) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 48)
        with pytest.raises(vattn.OutOfPages):
            cache.ensure(slot, 49)
        cache.truncate(slot, 16)
        other = cache.acquire()
        cache.ensure(other, 32)  # the pages that truncate gave back
        assert cache.stats().peak_physical_bytes == 6 << 20
        assert cache.stats().num_create == 3


def test_a_page_that_changes_owner_reads_as_zeros(device):
    with open_cache(device, memory_limit=4 << 20) as cache:
        first = cache.acquire()
        cache.ensure(first, 1000)
        for layer in range(3):
            for tensor in cache.rows(first, layer):
                tensor.fill_(torch.nan)
        cache.release(first)
        second = cache.acquire(3)
        cache.ensure(second, 1000)
        assert cache.stats().num_create == 2  # the same memory
        for layer in range(3):
            for tensor in cache.rows(second, layer):
                assert not tensor.any()


@pytest.mark.parametrize("order", ["token", "layer"])
def test_rows_survive_what_copies_whole_storages(device, order, tmp_path):
    """Their storage ends where their pages end: that of the full views goes on where nothing is mapped."""
    layout = vattn.KVLayout(3, 2, 16, 1 << 20, torch.float16, order=order)
    with vattn.KVCache(layout, 4, device, 64 << 20, page_bytes=4096 if device == "cpu" else None) as cache:
        slot = cache.acquire(2)
        for rows in (0, 20, 70_000, 300, 0, 40):  # over page boundaries both ways
            if rows > cache.seq_len(slot):
                cache.ensure(slot, rows)
            elif rows or not cache.seq_len(slot):
                cache.truncate(slot, rows)
            else:
                cache.release(slot)
                cache.trim()
                cache.acquire(slot)
            for layer in range(3):
                for tensor, view in zip(cache.rows(slot, layer), (cache.k(layer), cache.v(layer)), strict=True):
                    tensor.normal_()
                    assert tensor.shape == (rows, 2, 16)
                    assert tensor.data_ptr() == (view[slot].data_ptr() if rows else tensor.data_ptr())
                    assert torch.equal(tensor, view[slot, :rows])
                    torch.save(tensor, tmp_path / "rows.pt")
                    pickled = pickle.loads(pickle.dumps(tensor))
                    for other in (copy.deepcopy(tensor), torch.load(tmp_path / "rows.pt"), pickled):
                        assert torch.equal(other, tensor)
                        assert other.data_ptr() != tensor.data_ptr() or not rows
                    assert tensor.untyped_storage().nbytes() <= cache.stats().physical_bytes


def test_truncate_then_ensure_exposes_zeros_or_own_rows(device):
    with open_cache(device) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 4096)
        cache.rows(slot, 0)[0].fill_(7)
        cache.truncate(slot, 10)
        cache.ensure(slot, 4096)
        k = cache.rows(slot, 0)[0]
        assert (k[:10] == 7).all()
        assert ((k == 0) | (k == 7)).all()


def test_stats_add_up_through_a_life(device):
    with open_cache(device) as cache:
        a, b = cache.acquire(), cache.acquire()
        cache.ensure_batch([a, b], [3000, 100])
        stats = cache.stats()
        assert stats.num_live_slots == 2
        assert stats.row_bytes == 3100 * SMALL.bytes_per_token
        assert stats.mapped_bytes == stats.in_use_bytes == stats.row_bytes + stats.waste_bytes
        cache.release(a)
        stats = cache.stats()
        assert stats.parked_bytes == -(-3000 * SMALL.bytes_per_token // cache.page_bytes) * cache.page_bytes
        assert stats.free_bytes + stats.parked_bytes + stats.in_use_bytes == stats.physical_bytes
        assert stats.waste_bytes == stats.in_use_bytes - stats.row_bytes
        assert cache.trim() == stats.free_bytes + stats.parked_bytes
        stats = cache.stats()
        assert stats.free_bytes == stats.parked_bytes == 0
        assert stats.physical_bytes == stats.in_use_bytes == cache.page_bytes
        assert stats.num_create - stats.num_release == 1
        assert stats.as_dict()["num_live_slots"] == 1
        with pytest.raises(AttributeError):
            stats.free_bytes = 1  # type: ignore[misc]


def test_trim_keeps_what_it_is_told_to(device):
    with open_cache(device) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 4096)
        cache.release(slot)
        cache.trim(keep_bytes=3 * cache.page_bytes)
        assert cache.stats().free_bytes == 3 * cache.page_bytes
        cache.check_integrity()


def test_contexts_smaller_than_a_page_and_odd_token_sizes(device):
    layout = vattn.KVLayout(num_layers=5, num_kv_heads=3, head_dim=80, max_seq_len=100, dtype=torch.float16)
    with open_cache(device, layout, 8) as cache:
        slots = [cache.acquire() for _ in range(8)]
        cache.ensure_batch(slots, [100] * 8)
        for slot in slots:
            for layer in range(5):
                k, v = cache.rows(slot, layer)
                k.fill_(slot * 10 + layer)
                v.fill_(-slot * 10 - layer)
        for slot in slots:
            for layer in range(5):
                k, v = cache.rows(slot, layer)
                assert (k == slot * 10 + layer).all()
                assert (v == -slot * 10 - layer).all()
        assert cache.stats().physical_bytes == 8 * cache.page_bytes


def test_groups_have_ranges_of_their_own(device):
    layout = vattn.KVLayout(
        groups=[vattn.LayerGroup([0, 2], 4, 64, window=32), vattn.LayerGroup([1], 1, 128, v_head_dim=32)],
        max_seq_len=512,
        dtype=torch.bfloat16,
    )
    with open_cache(device, layout) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 512)
        assert cache.k(1).shape == (4, 512, 1, 128)
        assert cache.v(1).shape == (4, 512, 1, 32)
        for layer in range(3):
            for number, tensor in enumerate(cache.rows(slot, layer)):
                tensor.fill_(2 * layer + number)
        for layer in range(3):
            for number, tensor in enumerate(cache.rows(slot, layer)):
                assert (tensor == 2 * layer + number).all()


def test_views_hold_the_memory_and_then_the_addresses(device):
    cache = open_cache(device)
    slot = cache.acquire()
    cache.ensure(slot, 10)
    k = cache.rows(slot, 0)[0]
    k.fill_(3)
    del cache  # never closed: the view keeps its pages
    gc.collect()
    assert (k == 3).all()
    address = k.data_ptr()
    if device == "cpu":
        assert is_reserved(address)
    del k
    gc.collect()
    if device == "cpu":
        assert not is_reserved(address)


def test_after_close_the_range_stays_until_the_last_view_dies(device):
    cache = open_cache(device)
    driver = cache.driver
    slot = cache.acquire()
    cache.ensure(slot, 10)
    view = cache.k(2)
    part = view[1, :5, 0]
    cache.close()
    assert driver.book.ranges
    assert not driver.book.mappings
    assert not driver.book.handles
    del view
    gc.collect()
    assert driver.book.ranges
    del part
    gc.collect()
    assert not driver.book.ranges


def test_flattened_slots_and_rows_are_one_token_axis(device):
    layout = vattn.KVLayout(num_layers=3, num_kv_heads=1, head_dim=5, max_seq_len=37, dtype=torch.float32)
    with open_cache(device, layout) as cache:
        slot = cache.acquire(2)
        cache.ensure(slot, 37)
        cache.rows(slot, 1)[0][30] = 9
        k = cache.k(1)
        assert k.stride(0) % k.stride(1) == 0
        tokens = k.as_strided((4 * (k.stride(0) // k.stride(1)), 1, 5), (k.stride(1), k.stride(2), 1))
        assert (tokens[2 * (k.stride(0) // k.stride(1)) + 30] == 9).all()


def test_the_event_log_tells_what_the_driver_did(device):
    with open_cache(device) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 1)
        names = [event.name for event in cache.events()]
        assert names == ["reserve", "create", "map", "set_access"]
        times = [event.time_ns for event in cache.events()]
        assert times == sorted(times)
        assert cache.events()[2].fields["size_bytes"] == cache.page_bytes


def test_two_caches_do_not_meet(device):
    with open_cache(device) as one, open_cache(device) as two:
        for cache, value in ((one, 1.0), (two, 2.0)):
            cache.ensure(cache.acquire(), 100)
            cache.rows(0, 0)[0].fill_(value)
        one.close()
        assert (two.rows(0, 0)[0] == 2).all()
        two.check_integrity()


def test_larger_pages(device):
    with open_cache(device, page_bytes=8 << 20) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 1)
        assert cache.stats().physical_bytes == 8 << 20
        cache.check_integrity()


@pytest.mark.gpu
def test_a_cache_on_a_thread_and_stream_of_its_own():
    import threading

    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), open_cache("cuda", memory_limit=8 << 20) as cache:
                for _ in range(3):
                    slot = cache.acquire()
                    cache.ensure(slot, 2000)
                    k = cache.rows(slot, 0)[0]
                    assert not k.any()
                    k.fill_(1)
                    cache.release(slot)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
