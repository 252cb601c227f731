"""Tensors over addresses: every dtype, the right bytes, and an owner that lives as long as any view."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import vattn
from vattn.layout import SUPPORTED_DTYPES
from vattn.memory.tensors import tensor_from_address

PAGE = 4096
CPU = torch.device("cpu")


class Owner:
    """Something that can be referred to weakly."""


@pytest.fixture
def address(host_driver) -> int:
    """One accessible page."""
    address = host_driver.reserve(PAGE)
    host_driver.map(address, PAGE, host_driver.create(PAGE))
    host_driver.set_access(address, PAGE)
    return address


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
def test_every_dtype_lies_where_it_should(address, dtype):
    tensor = tensor_from_address(address, PAGE, dtype, CPU, None)
    assert (tensor.dtype, tensor.device, tensor.shape) == (dtype, CPU, (PAGE // dtype.itemsize,))
    assert tensor.data_ptr() == address
    assert tensor[3:].data_ptr() == address + 3 * dtype.itemsize
    tensor[1] = 1
    raw = tensor_from_address(address, PAGE, torch.uint8, CPU, None)
    expected = torch.tensor([0, 1, 0], dtype=dtype).view(torch.uint8)
    assert torch.equal(raw[: len(expected)], expected)
    assert not raw[len(expected) :].any()


def test_nothing_need_be_mapped_yet(host_driver):
    address = host_driver.reserve(1 << 40)
    tensor = tensor_from_address(address, 1 << 40, torch.bfloat16, CPU, None)
    view = tensor.as_strided((64, 1 << 20, 8, 128), (1 << 33, 1 << 13, 128, 1))
    assert view[63].data_ptr() == address + 63 * (1 << 34)  # past 2**31 elements
    assert tensor.numel() == 1 << 39


def test_a_size_that_is_no_multiple_of_the_dtype_leaks_nothing(address):
    owner = Owner()
    alive = weakref.ref(owner)
    with pytest.raises(RuntimeError):
        tensor_from_address(address, 7, torch.float32, CPU, owner)
    del owner
    assert alive() is None


VIEWS = {
    "slice": lambda tensor: tensor[5:9],
    "dtype": lambda tensor: tensor.view(torch.uint8),
    "as_strided": lambda tensor: tensor.as_strided((2, 2), (8, 1), 3),
    "detach": lambda tensor: tensor.detach(),
    "reshape": lambda tensor: tensor.reshape(-1, 4).t(),
    "numpy": lambda tensor: tensor[:16].numpy(),
    "untyped storage": lambda tensor: tensor.untyped_storage(),
}


@pytest.mark.parametrize("make_view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("order", ["view last", "view first"])
def test_the_owner_lives_as_long_as_any_view(address, make_view, order):
    owner = Owner()
    alive = weakref.ref(owner)
    held = [tensor_from_address(address, PAGE, torch.float32, CPU, owner)]
    held.append(make_view(held[0]))
    del owner
    assert alive() is not None
    held.pop(0 if order == "view last" else 1)
    assert alive() is not None
    held.pop()
    assert alive() is None


def test_two_tensors_hold_the_owner_apart(address):
    owner = Owner()
    alive = weakref.ref(owner)
    one, other = (tensor_from_address(address, PAGE, torch.uint8, CPU, owner) for _ in range(2))
    del owner, one
    assert alive() is not None
    del other
    assert alive() is None


def test_the_last_view_may_die_in_another_thread(address):
    owner = Owner()
    alive = weakref.ref(owner)
    held = [tensor_from_address(address, PAGE, torch.uint8, CPU, owner)[1:]]
    del owner
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert alive() is None


def test_many_tensors_in_many_threads_leave_nothing(address):
    owners = weakref.WeakSet()

    def make():
        for _ in range(500):
            owner = Owner()
            owners.add(owner)
            tensor_from_address(address, PAGE, torch.float16, CPU, owner)[2:].view(torch.uint8)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not owners


class MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def test_thousands_of_tensors_take_no_memory(address):
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not say how much memory is taken")
    libc.mallinfo2.restype = MallocInfo

    def make(count):
        for _ in range(count):
            tensor_from_address(address, PAGE, torch.float32, CPU, Owner())
        gc.collect()
        return libc.mallinfo2().uordblks, sys.getallocatedblocks()

    bytes_before, blocks_before = make(500)  # caches fill up
    bytes_after, blocks_after = make(5000)
    assert bytes_after - bytes_before < 5000 * 16
    assert blocks_after - blocks_before < 500  # far less than one block a tensor


_EXIT = """
import torch, vattn
cache = vattn.KVCache(vattn.KVLayout(2, 2, 64, 4096, torch.float32), 4, "{device}", 64 << 20)
cache.ensure(cache.acquire(), 10)
views = [cache.k(0), cache.rows(0, 1), cache.v(1).view(torch.uint8)[2:]]
cycle = [views]
cycle.append(cycle)
torch.kept = cache.k(1)  # dies after the modules that made it
if {close}:
    cache.close()
"""


@pytest.mark.parametrize("close", [False, True])
def test_the_interpreter_ends_cleanly_with_live_tensors(close, device):
    script = _EXIT.format(close=close, device=device)
    child = subprocess.run([sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stderr) == (0, "")


def test_a_cache_made_in_inference_mode_can_be_written_outside(make_cache):
    with torch.inference_mode():
        cache = make_cache()
        slot = cache.acquire()
        cache.ensure(slot, 8)
    k, v = cache.rows(slot, 1)
    k.fill_(2.0)
    v.add_(k)
    assert not cache.k(0).is_inference()
    assert cache.v(1)[slot, :8].eq(2.0).all()


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
def test_a_cache_of_every_dtype(make_cache, device, dtype):
    cache = make_cache(vattn.KVLayout(2, 3, 5, 16, dtype), device=device)
    slot = cache.acquire()
    cache.ensure(slot, 16)
    for layer, value in ((0, 1), (1, 2)):
        for tensor in cache.rows(slot, layer):
            tensor.copy_(torch.full_like(tensor, value))
    assert cache.rows(slot, 0)[0].dtype == dtype
    assert cache.rows(slot, 0)[1].float().eq(1.0).all()
    assert cache.rows(slot, 1)[0].float().eq(2.0).all()
