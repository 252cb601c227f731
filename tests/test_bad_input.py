"""Wrong arguments: each a ConfigError that names the value, raised before anything is touched."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import vattn
from vattn import ConfigError, KVCache, KVLayout, OutOfSlots
from vattn.driver import HostDriver
from vattn.driver.cuda import unavailable

MAX_SLOTS, MAX_SEQ_LEN, SEQ_LEN = 4, 4096, 1500
LAYOUT = KVLayout(2, 2, 64, MAX_SEQ_LEN, torch.float32)

NOT_INTS = [True, 1.0, math.nan, "1", b"1", [1], (), {}, object, torch.tensor(1), np.float32(1), np.bool_(True)]
OUT_OF_RANGE = [-1, 1 << 31, 1 << 63, 1 << 64, 1 << 80]


@pytest.fixture
def cache(make_cache, device) -> KVCache:
    """Slots 0 (1,500 rows) and 1 (none) are live, slot 2 is free, slot 3 was released."""
    cache = make_cache(LAYOUT, MAX_SLOTS, device)
    for _ in range(4):
        cache.acquire()
    cache.ensure(0, SEQ_LEN)
    cache.release(2)
    cache.release(3)
    return cache


def enter(cache, slots):
    with cache.step(slots):
        pytest.fail("the step was entered")


def refuse(cache, *expected, call):
    """``call`` raises a ConfigError with these words in it, and changes nothing."""
    before = cache.stats(), cache.events()
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    del caught  # a traceback in a cycle would keep the cache until the next collection
    for words in expected:
        assert str(words) in message
    assert (cache.stats(), cache.events()) == before
    cache.check_integrity()


# -- slots -----------------------------------------------------------------------------------------------------------
SLOT_CALLS = {
    "ensure": lambda cache, slot: cache.ensure(slot, 1),
    "ensure_batch": lambda cache, slot: cache.ensure_batch([0, slot], [1, 1]),
    "seq_len": lambda cache, slot: cache.seq_len(slot),
    "rows": lambda cache, slot: cache.rows(slot, 0),
    "make_writable": lambda cache, slot: cache.make_writable(slot, 0, 0),
    "fork": lambda cache, slot: cache.fork(slot),
    "truncate": lambda cache, slot: cache.truncate(slot, 0),
    "release": lambda cache, slot: cache.release(slot),
    "step": lambda cache, slot: enter(cache, [0, slot]),
}
NAMING_CALLS = {
    "acquire": lambda cache, slot: cache.acquire(slot),
    "fork into": lambda cache, slot: cache.fork(0, 1, into=slot),
}


def each(calls):
    return pytest.mark.parametrize("call", calls.values(), ids=calls.keys())


@each(SLOT_CALLS | NAMING_CALLS)
@pytest.mark.parametrize("slot", NOT_INTS, ids=repr)
def test_slots_are_ints(cache, call, slot):
    refuse(cache, "slot", call=lambda: call(cache, slot))


@each(SLOT_CALLS)
def test_none_is_no_slot(cache, call):
    refuse(cache, "slot", "None", call=lambda: call(cache, None))


@each(SLOT_CALLS | NAMING_CALLS)
@pytest.mark.parametrize("slot", [*OUT_OF_RANGE, MAX_SLOTS])
def test_slots_are_in_range(cache, call, slot):
    refuse(cache, "slot", slot, call=lambda: call(cache, slot))


@each(SLOT_CALLS)
@pytest.mark.parametrize("slot", [2, 3])
def test_slots_are_live(cache, call, slot):
    refuse(cache, f"slot {slot}", "acquire", call=lambda: call(cache, slot))


def test_a_slot_is_released_once(cache):
    cache.release(0)
    refuse(cache, "slot 0", call=lambda: cache.release(0))


@each(NAMING_CALLS)
@pytest.mark.parametrize("slot", [0, 1])
def test_a_named_slot_that_is_taken(cache, call, slot):
    before = cache.stats()
    with pytest.raises(OutOfSlots, match=f"slot {slot} "):
        call(cache, slot)
    assert cache.stats() == before


def test_no_slot_left(cache):
    cache.acquire()
    cache.acquire()
    with pytest.raises(OutOfSlots, match=f"all {MAX_SLOTS} slots"):
        cache.acquire()


# -- lengths ---------------------------------------------------------------------------------------------------------
LENGTH_CALLS = {
    "ensure": (lambda cache, rows: cache.ensure(0, rows), MAX_SEQ_LEN),
    "ensure_batch": (lambda cache, rows: cache.ensure_batch([0, 1], [2000, rows]), MAX_SEQ_LEN),
    "truncate": (lambda cache, rows: cache.truncate(0, rows), SEQ_LEN),
    "fork": (lambda cache, rows: cache.fork(0, rows), SEQ_LEN),
    "make_writable end": (lambda cache, rows: cache.make_writable(0, 0, rows), SEQ_LEN),
    "make_writable start": (lambda cache, rows: cache.make_writable(0, rows, SEQ_LEN), SEQ_LEN),
}


@pytest.mark.parametrize(("call", "longest"), LENGTH_CALLS.values(), ids=LENGTH_CALLS.keys())
class TestLengths:
    @pytest.mark.parametrize("rows", NOT_INTS, ids=repr)
    def test_they_are_ints(self, cache, call, longest, rows):
        refuse(cache, call=lambda: call(cache, rows))

    @pytest.mark.parametrize("rows", [-1, -(1 << 40)])
    def test_they_are_not_negative(self, cache, call, longest, rows):
        refuse(cache, rows, call=lambda: call(cache, rows))

    @pytest.mark.parametrize("beyond", [1, 1 << 31, 1 << 63, 1 << 80])
    def test_they_are_not_beyond_the_longest(self, cache, call, longest, beyond):
        refuse(cache, longest + beyond, call=lambda: call(cache, longest + beyond))

    def test_the_longest_is_accepted(self, cache, call, longest):
        call(cache, longest)
        cache.check_integrity()


@pytest.mark.parametrize("call", ["ensure", "truncate"])
def test_a_length_must_be_given(cache, call):
    refuse(cache, "None", call=lambda: getattr(cache, call)(0, None))


def test_make_writable_backwards(cache):
    refuse(cache, 5, 4, call=lambda: cache.make_writable(0, 5, 4))


# -- batches ---------------------------------------------------------------------------------------------------------
NOT_BATCHES = [
    0,
    None,
    "01",
    [[0], [1]],
    [0.0, 1.0],
    [True, False],
    [True, 1],
    ["0", "1"],
    [None, 1],
    [[0], 1],
    {0, 1},
    np.array([0.0, 1.0]),
    np.array([[0, 1]]),
    np.array([True, False]),
    torch.tensor([0, 1]),
    [torch.tensor(0), torch.tensor(1)],
]


@pytest.mark.parametrize("values", NOT_BATCHES, ids=repr)
class TestBatches:
    def test_slots(self, cache, values):
        refuse(cache, "slots", call=lambda: cache.ensure_batch(values, [2000, 2000]))

    def test_lengths(self, cache, values):
        refuse(cache, "seq_lens", call=lambda: cache.ensure_batch([0, 1], values))

    def test_steps(self, cache, values):
        refuse(cache, "slots", call=lambda: enter(cache, values))


@pytest.mark.parametrize("rows", [[], [2000], [2000, 2000, 2000]])
def test_a_batch_has_as_many_lengths_as_slots(cache, rows):
    refuse(cache, 2, len(rows), call=lambda: cache.ensure_batch([0, 1], rows))


def test_a_slot_is_in_a_batch_once(cache):
    refuse(cache, "slot 1", "twice", call=lambda: cache.ensure_batch([1, 0, 1], [2000, 2000, 2000]))
    refuse(cache, "slot 1", "twice", call=lambda: enter(cache, np.array([1, 0, 1])))


@pytest.mark.parametrize("value", [1 << 63, (1 << 64) - 1])
def test_unsigned_arrays_do_not_wrap(cache, value):
    refuse(cache, value, call=lambda: cache.ensure_batch(np.array([0, value], np.uint64), [1, 1]))
    refuse(cache, value, call=lambda: cache.ensure_batch([0, 1], np.array([1, value], np.uint64)))


def test_an_empty_batch_is_nothing(cache):
    before = cache.stats()
    cache.ensure_batch([], [])
    with cache.step([]):
        pass
    assert cache.stats() == before


# -- layers, trim ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["k", "v", "rows"])
@pytest.mark.parametrize("layer", [2, -1, 1 << 64, None, *NOT_INTS], ids=repr)
def test_layers_are_the_layouts(cache, call, layer):
    arguments = (0, layer) if call == "rows" else (layer,)
    refuse(cache, "layer", "[0, 1]", call=lambda: getattr(cache, call)(*arguments))


@pytest.mark.parametrize("keep_bytes", [-1, None, *NOT_INTS], ids=repr)
def test_trim_keeps_a_number_of_bytes(cache, keep_bytes):
    refuse(cache, "keep_bytes", call=lambda: cache.trim(keep_bytes))


# -- what is accepted ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64])
def test_numpy_ints_are_ints(make_cache, kind):
    cache = make_cache(LAYOUT, kind(4), memory_limit=np.int64(64 << 20), page_bytes=np.int64(4096))
    slot = cache.acquire(kind(3))
    assert type(slot) is int
    cache.ensure(kind(3), kind(100))
    cache.ensure_batch(np.array([3], kind), np.array([120], kind))
    with cache.step(np.array([3], kind)):
        pass
    cache.make_writable(kind(3), kind(0), kind(100))
    child = cache.fork(kind(3), kind(7), into=kind(1))
    assert (type(child), cache.seq_len(kind(1)), type(cache.seq_len(3))) == (int, 7, int)
    assert cache.k(kind(1)).shape == (4, MAX_SEQ_LEN, 2, 64)
    cache.truncate(kind(3), kind(5))
    cache.check_integrity()
    cache.release(kind(3))


# -- opening ---------------------------------------------------------------------------------------------------------
def refuse_to_open(*expected, **arguments):
    """Nothing is left behind either: the fixture that looks for leaks sees to that."""
    with pytest.raises(ConfigError) as caught:
        KVCache(**{"layout": LAYOUT, "max_slots": 2, "device": "cpu", "memory_limit": 32 << 20} | arguments)
    for words in expected:
        assert str(words) in str(caught.value)


@pytest.mark.parametrize("max_slots", [0, -1, None, *NOT_INTS], ids=repr)
def test_max_slots(max_slots):
    refuse_to_open("max_slots", max_slots, max_slots=max_slots)


@pytest.mark.parametrize("name", ["guard", "over_read_masked"])
@pytest.mark.parametrize("value", ["no", 0, 1, None], ids=repr)
def test_switches(name, value):
    refuse_to_open(f"{name} must be True or False", value, **{name: value})


@pytest.mark.parametrize("memory_limit", [0, -1, -(1 << 40), 32e6, *NOT_INTS], ids=repr)
def test_memory_limit(memory_limit):
    refuse_to_open("memory_limit", memory_limit, memory_limit=memory_limit)


@pytest.mark.parametrize(("memory_limit", "page_bytes"), [(1, None), ((2 << 20) - 1, None), (8191, 8192)])
def test_memory_limit_under_one_page(memory_limit, page_bytes):
    page = page_bytes or 2 << 20
    refuse_to_open("memory_limit", memory_limit, page, memory_limit=memory_limit, page_bytes=page_bytes)


@pytest.mark.parametrize("page_bytes", [0, -4096, *NOT_INTS], ids=repr)
def test_page_bytes(page_bytes):
    refuse_to_open("page_bytes", page_bytes, page_bytes=page_bytes)


@pytest.mark.parametrize("page_bytes", [1, 2048, 4097, (2 << 20) + 1, 3 << 19 | 512])
def test_page_bytes_off_the_granularity(device, page_bytes):
    refuse_to_open("page_bytes", page_bytes, "multiple", device=device, page_bytes=page_bytes)


@pytest.mark.parametrize(
    "device",
    ["tpu", "", "cuda:-1", "cuda:x", "gpu", "meta", "mps", torch.device("meta"), None, 1.5, []],
    ids=repr,
)
def test_unknown_devices(device):
    refuse_to_open("device", repr(device), '"cpu"', device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_where_there_is_none(device):
    reason = unavailable()
    if reason is None:
        pytest.skip("there is CUDA here")
    refuse_to_open("cuda", reason, device=device)


@pytest.mark.parametrize("device", ["cuda:99", 99, torch.device("cuda:99")])
def test_a_cuda_device_too_many(device):
    refuse_to_open("99", device=device)


@pytest.mark.parametrize("driver", ["ledger", "", 0, HostDriver], ids=repr)
def test_drivers(driver):
    refuse_to_open("driver", "LedgerDriver", driver=driver)


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda each: each.__name__)
def test_a_cache_is_not_copied(cache, copy_of):
    with pytest.raises(TypeError, match="rows"):
        copy_of(cache)


@pytest.mark.parametrize("layout", [None, {}, "8B", KVLayout, LAYOUT.groups[0]], ids=repr)
def test_layouts(layout):
    refuse_to_open("layout", "KVLayout", layout=layout)


@pytest.mark.parametrize(
    ("max_seq_len", "max_slots"), [(1 << 37, 2), (1 << 40, 64), (1 << 54, 1), (1 << 64, 1), (1 << 100, 3)]
)
def test_more_addresses_than_there_are(device, max_seq_len, max_slots):
    layout = KVLayout(2, 2, 64, max_seq_len, torch.float32)
    refuse_to_open(max_seq_len, "max_slots", "max_seq_len", device=device, layout=layout, max_slots=max_slots)


# -- after close -----------------------------------------------------------------------------------------------------
AFTER_CLOSE = {
    "acquire": (),
    "ensure": (0, 1),
    "ensure_batch": ([0], [1]),
    "fork": (0,),
    "truncate": (0, 0),
    "release": (0,),
    "make_writable": (0, 0, 0),
    "seq_len": (0,),
    "versions": ([0],),
    "k": (0,),
    "v": (0,),
    "rows": (0, 0),
    "stats": (),
    "events": (),
    "check_integrity": (),
    "trim": (),
}


@pytest.mark.parametrize(("method", "arguments"), AFTER_CLOSE.items())
def test_a_closed_cache_refuses(cache, method, arguments):
    cache.close()
    with pytest.raises(ConfigError, match="closed"):
        getattr(cache, method)(*arguments)


def test_a_closed_cache_refuses_a_step(cache):
    cache.close()
    with pytest.raises(ConfigError, match="closed"):
        enter(cache, [0])


def test_every_method_is_tried_after_close():
    methods = {name for name, value in vars(KVCache).items() if callable(value) and not name.startswith("_")}
    assert methods == {*AFTER_CLOSE, "step", "close"}


def test_close_is_idempotent(cache):
    cache.close()
    cache.close()
    assert "closed" in repr(cache)


def test_the_context_manager_closes():
    with KVCache(LAYOUT, 2, "cpu", 8 << 20) as cache:
        cache.acquire()
    with pytest.raises(ConfigError, match="closed"):
        cache.stats()


def test_close_inside_a_step(cache):
    with cache.step([0]):
        refuse(cache, "step", call=cache.close)
    cache.ensure(0, SEQ_LEN + 1)


def test_config_error_is_a_value_error():
    assert issubclass(vattn.ConfigError, ValueError)
