"""Drivers, devices and caches for every test, and a look after each at what it left behind."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import vattn
from vattn.driver import CudaDriver, Driver, HostDriver, LedgerDriver, native
from vattn.driver.cuda import unavailable
from vattn.driver.ruled import RuledDriver
from vattn.errors import DriverError

MIB = 1 << 20

# Without a GPU, Triton's kernels run in its interpreter; it asks when a kernel is made.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A job that a shell starts in the background ignores Ctrl-C, and one under nohup a hangup, which some tests send.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


# -- what a test must not leave behind -------------------------------------------------------------------------------
_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


def _memfd_files() -> set[int]:
    """The inodes of the memfds that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).startswith("/memfd:vattn"):
                found.add(os.stat(entry).st_ino)
        except OSError:  # the descriptor of this very listing
            continue
    return found


def _memfd_mappings() -> set[str]:
    """Where pages of a memfd are mapped: they live on after its descriptor was closed."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[0] for line in lines if "/memfd:vattn" in line}


_drivers: weakref.WeakSet[RuledDriver] = weakref.WeakSet()
_init_driver = RuledDriver.__init__


def _init_and_note(self: RuledDriver) -> None:
    _init_driver(self)
    _drivers.add(self)


RuledDriver.__init__ = _init_and_note  # type: ignore[method-assign]


def _holding() -> set[int]:
    """The drivers, on any device, that still have handles, mappings or addresses."""
    return {id(driver) for driver in _drivers if driver.book.handles or driver.book.mappings or driver.book.ranges}


def _live() -> tuple[set[int], set[str], set[int]]:
    return _memfd_files(), _memfd_mappings(), _holding()


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """No file, page or address outlives the test; what was there before (a wider-scoped cache) may stay."""
    before = _live()
    yield
    if request.node.stash.get(_failed, False):
        return  # its traceback keeps objects alive, and one error is enough
    for generation in range(3):  # a whole collection is slow with torch loaded, and seldom needed
        if any(now - then for now, then in zip(_live(), before, strict=True)):
            gc.collect(generation)
    files, mappings, holding = (now - then for now, then in zip(_live(), before, strict=True))
    assert not files, f"{len(files)} memfd left open"
    assert not mappings, f"pages left mapped at {sorted(mappings)}"
    assert not holding, f"{len(holding)} drivers left with handles, mappings or addresses"


# -- drivers ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DriverCase:
    """A driver, the handle size to test it with, and whether there is memory behind its addresses.

    ``native``: whether its batches are those of the library of ``native/``.
    """

    open: Callable[[], Driver]
    unit_of: Callable[[Driver], int] = lambda driver: driver.granularity_bytes
    has_memory: bool = True
    needs_cuda: bool = False
    native: bool = False


DRIVER_CASES = {
    "host": DriverCase(HostDriver),
    "host-2MiB": DriverCase(HostDriver, lambda driver: driver.default_page_bytes),
    "host-native": DriverCase(HostDriver, native=True),
    "ledger": DriverCase(LedgerDriver, has_memory=False),
    "cuda": DriverCase(lambda: CudaDriver(torch.device("cuda")), needs_cuda=True),
    "cuda-native": DriverCase(lambda: CudaDriver(torch.device("cuda")), needs_cuda=True, native=True),
}


def _skip_without_cuda() -> None:
    if reason := unavailable():
        pytest.skip(reason)


def clear(driver: Driver) -> None:
    """Take away everything that a driver still holds, and close it."""
    driver.synchronize()
    for mapping in tuple(driver.book.mappings.values()):
        driver.unmap(mapping.address, mapping.size_bytes)
    for handle in tuple(driver.book.handles):
        driver.release(handle)
    for address, size_bytes in tuple(driver.book.ranges.items()):
        driver.free_range(address, size_bytes)
    driver.close()


@pytest.fixture(
    params=[
        pytest.param(case, id=name, marks=[pytest.mark.gpu] if case.needs_cuda else [])
        for name, case in DRIVER_CASES.items()
    ]
)
def driver_case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DriverCase:
    if request.param.needs_cuda:
        _skip_without_cuda()
    monkeypatch.setenv("VATTN_NATIVE", "1" if request.param.native else "0")
    if request.param.native and (reason := native.why_not()):
        pytest.skip(f"without the native library: {reason}")
    return request.param


@pytest.fixture
def open_driver(request: pytest.FixtureRequest, driver_case: DriverCase) -> Iterator[Callable[[], Driver]]:
    """A function that opens a new driver of each kind in turn; it is cleared and closed after the test."""
    opened: list[Driver] = []

    def open_one() -> Driver:
        opened.append(driver_case.open())
        return opened[-1]

    yield open_one
    for driver in opened:
        # After a failure the books may be wrong, and one error is enough.
        with suppress(DriverError) if request.node.stash.get(_failed, False) else nullcontext():
            clear(driver)


@pytest.fixture
def host_driver() -> Iterator[HostDriver]:
    driver = HostDriver()
    yield driver
    clear(driver)


# -- caches ----------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        _skip_without_cuda()
    return request.param


@pytest.fixture
def make_cache() -> Iterator[Callable[..., vattn.KVCache]]:
    """``make_cache(layout=None, max_slots=4, device="cpu", memory_limit=64 MiB, ...)``; closed after the test.

    The default layout has two layers and 2 KiB per token: 1,024 tokens to a page of 2 MiB, four pages to a slot.
    """
    opened: list[vattn.KVCache] = []

    def make(
        layout: vattn.KVLayout | None = None,
        max_slots: int = 4,
        device: str = "cpu",
        memory_limit: int | None = 64 * MIB,
        **options: object,
    ) -> vattn.KVCache:
        layout = layout or vattn.KVLayout(2, 2, 64, 4096, torch.float32)
        opened.append(vattn.KVCache(layout, max_slots, device, memory_limit, **options))
        return opened[-1]

    yield make
    for cache in opened:
        cache.close()
