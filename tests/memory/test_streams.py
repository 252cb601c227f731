"""What the cache promises about work in flight, on streams where nothing runs until it must."""

from __future__ import annotations

import pytest
import torch
from helpers.stream_driver import StreamDriver

import vattn

PAGE = 4096
LAYOUT = vattn.KVLayout(1, 1, 8, 400, torch.float32)  # 64 tokens to a page


@pytest.fixture
def driver():
    return StreamDriver()


@pytest.fixture
def cache(driver):
    with vattn.KVCache(LAYOUT, 6, memory_limit=64 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        yield cache


def new(cache: vattn.KVCache, rows: int) -> int:
    slot = cache.acquire()
    cache.ensure(slot, rows)
    return slot


def launch_fill(cache: vattn.KVCache, slot: int, start: int, end: int, value: float) -> None:
    """A kernel that writes rows, when it comes to run."""
    view = cache.k(0)[slot, start:end]
    cache.driver.launch(lambda: view.fill_(value))


def finish(cache: vattn.KVCache, slot: int) -> torch.Tensor:
    cache.driver.synchronize()
    return cache.rows(slot, 0)[0][:, 0, 0].clone()


def test_release_waits_for_nothing_and_its_pages_for_the_current_stream(cache, driver):
    slot = new(cache, 64)
    launch_fill(cache, slot, 0, 64, 1.0)
    cache.release(slot)
    assert driver.num_waits == 0
    cache.trim()  # the fill would fault on an unmapped page
    assert driver.num_waits
    assert cache.stats().physical_bytes == 0
    cache.check_integrity()


def test_released_pages_wait_for_a_step_on_another_stream(cache, driver):
    slot = new(cache, 64)
    with driver.stream(1), cache.step([slot]):
        launch_fill(cache, slot, 0, 64, 1.0)
    cache.release(slot)
    assert driver.num_waits == 0
    cache.trim()
    assert driver.streams[1].num_done == len(driver.streams[1].queue)


def test_release_inside_a_step_waits_for_nothing_and_takes_nothing(cache, driver):
    slot, other = new(cache, 64), new(cache, 64)
    with cache.step([slot, other]):
        launch_fill(cache, slot, 0, 64, 1.0)
        cache.release(slot)
    with cache.step([other]):
        launch_fill(cache, other, 0, 64, 2.0)
    assert driver.num_waits == 0
    assert cache.stats().parked_bytes == PAGE
    driver.run(0)
    with cache.step([other]):
        launch_fill(cache, other, 0, 64, 3.0)
    cache.trim()
    assert driver.num_waits == 0  # the first step's work had ended, so its page went without waiting for the third's
    assert cache.stats().parked_bytes == 0


def test_release_inside_a_step_covers_work_outside_it_too(cache, driver):
    slot = new(cache, 64)
    step = cache.step([slot])
    with driver.stream(1):
        step.__enter__()
    launch_fill(cache, slot, 0, 64, 1.0)  # on stream 0, before the release
    cache.release(slot)
    with driver.stream(1):
        step.__exit__(None, None, None)
    assert cache.acquire(slot) == slot
    assert driver.num_waits == 0
    cache.trim()
    assert driver.streams[0].num_done == len(driver.streams[0].queue)


def test_a_short_cache_waits_for_deferred_pages_rather_than_fail(driver):
    with vattn.KVCache(LAYOUT, 2, memory_limit=2 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        slot, other = new(cache, 128), cache.acquire()
        with cache.step([slot]):
            launch_fill(cache, slot, 0, 128, 1.0)
            cache.truncate(slot, 64)
        cache.ensure(other, 64)
        assert driver.num_waits
        assert not finish(cache, other).any()


def test_a_step_on_another_stream_comes_after_the_scrubbing(cache, driver):
    slot = new(cache, 64)
    launch_fill(cache, slot, 0, 64, torch.nan)
    cache.release(slot)
    slot = new(cache, 64)  # scrubbed on stream 0
    seen = []
    with driver.stream(1), cache.step([slot]):
        view = cache.k(0)[slot, :64]
        driver.launch(lambda: seen.append(view.isnan().any().item()))
    driver.run(1)
    assert seen == [False]


def test_the_source_of_a_copy_is_not_overwritten_before_it_is_made(cache, driver):
    parent = new(cache, 64)
    launch_fill(cache, parent, 0, 64, 7.0)
    child = cache.fork(parent)
    cache.truncate(parent, 10)
    with driver.stream(1):
        cache.make_writable(child, 0, 64)  # copies from the parent's mapping, later
    with driver.stream(2):
        cache.ensure(parent, 20)
        with cache.step([parent]):
            launch_fill(cache, parent, 10, 20, 99.0)
    driver.run(2)
    assert (finish(cache, child) == 7).all()
    assert finish(cache, parent).tolist() == [7.0] * 10 + [99.0] * 10


@pytest.mark.parametrize("rows", [64, 50])
def test_a_fork_hands_the_parents_work_on(cache, driver, rows):
    parent = new(cache, 64)
    with cache.step([parent]):
        launch_fill(cache, parent, 0, 64, 5.0)
    with driver.stream(1):
        child = cache.fork(parent, rows)
    seen = []
    with driver.stream(2), cache.step([child]):
        view = cache.k(0)[child, :rows]
        driver.launch(lambda: seen.append((view == 5).all().item()))
    driver.run(2)
    assert seen == [True]


def test_a_copy_of_a_shared_page_comes_after_the_work_that_filled_it(cache, driver):
    parent = new(cache, 64)
    with cache.step([parent]):
        launch_fill(cache, parent, 0, 64, 5.0)
    with driver.stream(1):
        child = cache.fork(parent)
    with driver.stream(2):
        cache.make_writable(child, 0, 64)
    assert (finish(cache, child) == 5).all()


def test_stale_rows_are_wiped_before_a_kernel_reads_past_the_end(driver):
    with vattn.KVCache(LAYOUT, 2, memory_limit=64 * PAGE, page_bytes=PAGE, driver=driver, over_read_tokens=30) as cache:
        slot = new(cache, 100)
        launch_fill(cache, slot, 0, 100, torch.nan)
        with cache.step([slot]):
            cache.truncate(slot, 10)  # not now: a kernel may be reading these rows
        seen = []
        with driver.stream(1), cache.step([slot]):
            view = cache.k(0)[slot, 10:40]
            driver.launch(lambda: seen.append(view.isnan().any().item()))
        driver.run(1)
        assert seen == [False]


def test_close_waits_for_everything(cache, driver):
    slot = new(cache, 64)
    with driver.stream(3), cache.step([slot]):
        launch_fill(cache, slot, 0, 64, 1.0)
    cache.close()
    assert all(stream.num_done == len(stream.queue) for stream in driver.streams.values())


def test_a_stream_with_the_handle_of_a_destroyed_one_is_another(cache, driver):
    slot, seen = new(cache, 64), []
    view = cache.k(0)[slot, :64]
    with driver.stream(1), cache.step([slot]):
        launch_fill(cache, slot, 0, 64, 1.0)
    driver.destroy(1)
    with driver.stream(1), cache.step([slot]):
        driver.launch(lambda: seen.append((view == 1).all().item()))
        driver.run(driver.current)
    assert seen == [True]
    with driver.stream(2), cache.step([slot]):
        launch_fill(cache, slot, 0, 64, 2.0)
    driver.destroy(2)
    with driver.stream(2), cache.step([slot]):
        pass
    cache.release(slot)
    cache.trim()  # the fill would fault on an unmapped page
    assert driver.streams[2].num_done == len(driver.streams[2].queue)


def test_streams_that_come_and_go_are_forgotten(cache, driver):
    slot = new(cache, 64)
    for number in range(1, 100):
        with driver.stream(number), cache.step([slot]):
            launch_fill(cache, slot, 0, 64, float(number))
        driver.run(number)
    assert len(cache._slots.work._streams) < 5
    assert (finish(cache, slot) == 99).all()


@pytest.mark.gpu
def test_a_cuda_stream_with_the_handle_of_a_destroyed_one_is_another():
    from cuda.bindings import driver as cuda

    with vattn.KVCache(vattn.KVLayout(1, 1, 64, 64, torch.float32), 1, "cuda", memory_limit=64 << 20) as cache:
        handles, numbers = [], []
        for _ in range(50):
            _, handle = cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
            stream = torch.cuda.ExternalStream(int(handle))
            with torch.cuda.stream(stream):
                handles.append(int(handle))
                numbers.append(cache.driver.fence().stream)
                assert numbers[-1] == cache.driver.fence().stream
            stream.synchronize()
            cuda.cuStreamDestroy(handle)
        assert len(set(handles)) < 50, "no handle came again, so that nothing was tested"
        assert len(set(numbers)) == 50


@pytest.mark.parametrize("order", ["apb", "abp", "pab", "pba", "bap", "bpa", "ap", "pa", "bp"])
def test_a_family_grows_in_one_batch(cache, driver, order):
    whole = new(cache, 64)
    launch_fill(cache, whole, 0, 64, 4.0)
    family = {"p": whole, "a": cache.fork(whole), "b": cache.fork(whole)}
    for slot in family.values():
        cache.truncate(slot, 6)
    cache.ensure_batch([family[name] for name in order], [7] * len(order))
    for slot in family.values():
        assert finish(cache, slot)[:6].tolist() == [4.0] * 6
    cache.check_integrity()


def test_rows_past_the_end_are_clean_at_a_step_though_another_shares_their_page(driver):
    with vattn.KVCache(LAYOUT, 3, memory_limit=64 * PAGE, page_bytes=PAGE, driver=driver, over_read_tokens=30) as cache:
        slot = new(cache, 64)
        launch_fill(cache, slot, 8, 64, torch.nan)
        child = cache.fork(slot)
        cache.truncate(slot, 8)
        with cache.step([slot]):
            driver.synchronize()
            assert not cache.k(0)[slot, 8:38].isnan().any()
        assert finish(cache, child)[8:].isnan().all()


class CapturingDriver(StreamDriver):
    """Says that the current stream is being captured, and notes what is put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[str] = []
        self.capturing = False

    def is_capturing(self) -> bool:
        return self.capturing

    def launch(self, work):
        if self.capturing:
            self.captured.append("work")
        super().launch(work)

    def fence(self):
        if self.capturing:
            self.captured.append("fence")
        return super().fence()


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("operation", ["truncate", "release", "fork", "ensure", "step"])
def test_nothing_of_the_cache_is_captured(operation, in_step):
    driver = CapturingDriver()
    with vattn.KVCache(LAYOUT, 4, memory_limit=64 * PAGE, page_bytes=PAGE, driver=driver, over_read_tokens=3) as cache:
        slot = new(cache, 64)
        step = cache.step([slot])
        if in_step:
            step.__enter__()
        calls = {
            "truncate": lambda: cache.truncate(slot, 63),
            "release": lambda: cache.release(slot),
            "fork": lambda: cache.fork(slot),
            "ensure": lambda: cache.ensure(slot, 200),
            "step": lambda: cache.step([slot]).__enter__(),
        }
        driver.capturing = True
        with pytest.raises(vattn.ConfigError, match="graph"):
            calls[operation]()
        driver.capturing = False
        assert not driver.captured
        assert cache.seq_len(slot) == 64
        assert cache.stats().num_live_slots == 1
        if in_step:
            step.__exit__(None, None, None)
        cache.check_integrity()


@pytest.mark.parametrize("rows", [128, 192])
def test_a_batch_keeps_the_rows_that_one_of_it_has_pages_for(rows):
    """Room for one slot is made of what another was cut by; not of the pages that the same call grows it over again."""
    driver = StreamDriver()
    with vattn.KVCache(LAYOUT, 6, memory_limit=5 * PAGE, page_bytes=PAGE, driver=driver) as cache:
        cut, other = new(cache, 256), cache.acquire()
        with driver.stream(1), cache.step([cut]):
            launch_fill(cache, cut, 0, 10, 1.0)
            cache.truncate(cut, 10)
        if rows == 128:
            cache.ensure_batch([cut, other], [150, rows])
        else:
            with pytest.raises(vattn.OutOfPages):
                cache.ensure_batch([cut, other], [150, rows])
        assert [cache.seq_len(slot) for slot in (cut, other)] == ([150, 128] if rows == 128 else [10, 0])
        cache.check_integrity()
        cache.release(cut)
        cache.ensure(other, 4 * 64)
        cache.check_integrity()
