"""Every driver call of every public operation failed in turn: the error names it, nothing changed, nothing leaked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from helpers.failing_driver import FailingDriver

import vattn
from vattn.driver import HostDriver, open_driver
from vattn.memory.work import Fences

CALLS = ("create", "release", "map", "set_access", "unmap", "zero", "copy")


def make_layout(page_bytes: int, order: str) -> vattn.KVLayout:
    """Two groups, 10.67 and 21.33 tokens to a page in token order; eight lanes in layer order."""
    unit = page_bytes // 4096
    groups = [
        vattn.LayerGroup([0, 1], num_kv_heads=2, head_dim=12 * unit),
        vattn.LayerGroup([2, 3], num_kv_heads=1, head_dim=8 * unit, v_head_dim=16 * unit),
    ]
    return vattn.KVLayout(groups=groups, max_seq_len=100, dtype=torch.float32, order=order)


@dataclass
class Scene:
    """A cache in the middle of its life: a parent, a child that shares its prefix, free dirty pages, parked ones.

    Slots 0 and 1 are the parent and its child; 2 is empty, with aliases of the child's pages parked in it, 5 short with
    a long tail parked, 3 free with pages parked; 4, 6 and 7 are free and empty.
    """

    device: str
    order: str
    driver: FailingDriver = field(init=False)
    cache: vattn.KVCache = field(init=False)

    def __post_init__(self) -> None:
        self.driver = FailingDriver(open_driver(self.device))
        page_bytes = max(4096, self.driver.granularity_bytes)
        order, *options = self.order.split(", ")
        sizes = "sizes" in options
        # With pages of several sizes, what is a page otherwise becomes 16.
        layout = make_layout(16 * page_bytes if sizes else page_bytes, order)
        self.cache = vattn.KVCache(
            layout,
            8,
            page_bytes=page_bytes,
            max_page_bytes=8 * page_bytes if sizes else page_bytes,
            memory_limit=(6400 if sizes else 400) * page_bytes,
            guard="guard" in options,
            driver=self.driver,
        )
        for slot, rows in ((0, 60), (3, 30), (4, 30), (5, 80)):
            self.cache.acquire(slot)
            self.cache.ensure(slot, rows)
            self.fill(slot, 0, rows)
        assert self.cache.fork(0, 50) == 1
        self.cache.truncate(0, 39 if sizes else 40)  # so that growing copies the page it shares with its child
        assert self.cache.fork(1, 45, into=2) == 2
        self.cache.truncate(4, 0)
        for slot in (2, 3, 4, 5):
            self.cache.release(slot)
        self.cache.acquire(2)
        self.cache.acquire(5)
        self.cache.ensure(5, 3)

    def fill(self, slot: int, start: int, end: int) -> None:
        for layer in range(4):
            for side, tensor in enumerate(self.cache.rows(slot, layer)):
                rows = torch.arange(start, end, device=tensor.device)[:, None, None]
                tensor[start:end] = 1000 * slot + 100 * layer + 10 * side + rows

    def state(self) -> tuple[object, ...]:
        stats = self.cache.stats().as_dict()
        figures = {name: value for name, value in stats.items() if not name.startswith("num_") and "peak" not in name}
        content = [tensor.cpu() for slot in (0, 1, 5) for layer in range(4) for tensor in self.cache.rows(slot, layer)]
        return figures, stats["num_live_slots"], content

    def check_unchanged(self, before: tuple[object, ...]) -> None:
        self.cache.check_integrity()
        figures, live, content = self.state()
        assert (figures, live) == before[:2]
        for now, then in zip(content, before[2], strict=True):  # type: ignore[call-overload]
            assert torch.equal(now, then)

    def close(self) -> None:
        self.driver.heal()
        self.cache.close()
        assert self.driver.allocated_bytes() in (0, None)
        assert not self.driver.book.handles
        assert not self.driver.book.mappings


OPERATIONS: dict[str, Callable[[vattn.KVCache], object]] = {
    "acquire": lambda cache: cache.acquire(),
    "ensure": lambda cache: cache.ensure(0, 100),
    "ensure beyond the free pages": lambda cache: cache.ensure_batch([0, 1], [100, 100]),
    "fork": lambda cache: cache.fork(0, 35),
    "ensure over parked pages": lambda cache: cache.ensure(5, 90),
    "ensure over parked aliases": lambda cache: cache.ensure(2, 60),
    "ensure of sharers and parked": lambda cache: cache.ensure_batch([5, 2, 0, 1], [70, 20, 60, 90]),
    "fork of everything": lambda cache: cache.fork(1, into=7),
    "fork over parked pages": lambda cache: cache.fork(1, 45, into=3),
    "truncate": lambda cache: cache.truncate(1, 3),
    "release": lambda cache: cache.release(0),
    "make_writable": lambda cache: cache.make_writable(1, 0, 50),
    "trim": lambda cache: cache.trim(),
}


def calls_of(operation: str, device: str, order: str) -> Counter[str]:
    scene = Scene(device, order)
    before = scene.driver.calls.copy()
    OPERATIONS[operation](scene.cache)

    made = scene.driver.calls - before
    scene.close()
    return made


@pytest.mark.parametrize("order", ["token", "layer", "token, sizes", "token, guard", "token, sizes, guard"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failed_call_leaves_everything_as_it_was(operation, order, device):
    made = calls_of(operation, device, order)
    expected = {
        "ensure": {"map", "set_access", "unmap", "copy"},
        "ensure beyond the free pages": {"create", "map", "set_access", "unmap", "zero", "copy"},
        "ensure over parked pages": {"map", "set_access", "zero"},
        "ensure over parked aliases": {"map", "set_access", "unmap", "zero"},
        "ensure of sharers and parked": {"map", "set_access", "unmap", "zero", "copy"},
        "fork": {"map", "set_access", "copy"},
        "fork over parked pages": {"map", "set_access", "unmap", "zero", "copy"},
        "fork of everything": {"map", "set_access", "copy"},
        "truncate": {"unmap"},
        "release": set(),  # the pages stay where they are
        "make_writable": {"map", "set_access", "unmap", "copy"},
        "trim": {"unmap", "release"},
        "acquire": set(),
    }[operation]
    assert expected <= made.keys()
    assert expected or not made
    for call, total in made.items():
        # On the GPU a scene takes long enough to test only the first, a middle and the last call of each kind; with
        # its many pages, a dozen of them.
        step = max(1, total // 12) if "sizes" in order else 1
        for at in sorted({*range(1, total + 1, step), total} if device == "cpu" else {1, (total + 1) // 2, total}):
            scene = Scene(device, order)
            before = scene.state()
            scene.driver.fail(call, at=at)
            with pytest.raises(vattn.DriverError, match=call) as caught:
                OPERATIONS[operation](scene.cache)
            assert caught.value.call == call
            if operation == "trim":  # what was given back before the failure stays given back
                scene.cache.check_integrity()
            else:
                scene.check_unchanged(before)
            OPERATIONS[operation](scene.cache)  # and it works now
            scene.cache.check_integrity()
            slot = scene.cache.acquire(6)
            scene.cache.ensure(slot, 40)
            scene.fill(slot, 0, 40)
            scene.close()


@pytest.mark.parametrize("call", ["create", "map", "set_access"])
def test_a_device_out_of_memory_is_out_of_pages(call, device):
    scene = Scene(device, "layer")
    scene.cache.trim()
    before = scene.state()
    scene.driver.fail(call, at=3, out_of_memory=True)
    with pytest.raises(vattn.OutOfPages, match=call):
        scene.cache.ensure_batch([0, 1], [100, 100])
    scene.check_unchanged(before)
    assert scene.cache.stats().num_oom == 1
    scene.cache.ensure_batch([0, 1], [100, 100])
    scene.close()


@pytest.mark.parametrize(
    "operation", [operation for operation in OPERATIONS if operation not in ("acquire", "release", "trim")]
)
@pytest.mark.parametrize("second", ["unmap", "map", "set_access", "release"])
@pytest.mark.parametrize("order", ["layer", "layer, guard"])
def test_a_failure_on_the_way_back_too_loses_no_page(operation, order, second, device):
    """The undo fails as well: rows may be lost, and the error says so; pages never are, and the cache goes on."""
    made = calls_of(operation, device, order)
    for first in made:
        scene = Scene(device, order)
        scene.driver.fail(first, at=made[first])
        # From the failing call on, every call of the second kind fails, some of them in the undo.
        scene.driver.fail(second, at=made[second] + (first != second), times=1000)
        with pytest.raises(vattn.DriverError):
            OPERATIONS[operation](scene.cache)
        scene.cache.check_integrity()
        stats = scene.cache.stats()
        assert stats.physical_bytes == stats.in_use_bytes + stats.parked_bytes + stats.free_bytes
        scene.driver.heal()
        for slot in (0, 1):
            if scene.cache.seq_len(slot):
                scene.cache.rows(slot, 3)[1].sum()
            scene.cache.ensure(slot, 100)
        scene.cache.check_integrity()
        scene.close()


def test_out_of_memory_on_the_way_back_is_not_tried_again(device):
    """Parked pages would make room for a second try, which knows nothing of the rows that the undo lost."""
    scene = Scene(device, "token")
    cache = scene.cache
    child = cache.fork(0)
    parked = cache.acquire()
    cache.ensure(parked, 100)
    cache.release(parked)
    scene.driver.fail("map", times=2, out_of_memory=True)  # of the private copy, and of what was there before
    rows = cache.seq_len(child)
    with pytest.raises(vattn.DriverError, match="INJECTED") as caught:  # no shortage: a caller would go on after that
        cache.make_writable(child, 0, rows)
    assert any("undoing a step failed too" in note for note in caught.value.__notes__)
    assert cache.seq_len(child) < rows
    cache.check_integrity()
    scene.driver.heal()
    cache.ensure(child, rows)
    scene.close()


@pytest.mark.parametrize("call", ["unmap", "release"])
@pytest.mark.parametrize("at", ["first", "third", "last"])
@pytest.mark.parametrize("times", [1, 1000])
def test_close_frees_what_it_can_and_the_next_close_the_rest(call, at, times, device):
    scene = Scene(device, "token")
    before = scene.driver.calls.copy()
    scene.close()
    total = (scene.driver.calls - before)[call]
    scene = Scene(device, "token")
    scene.driver.fail(call, at={"first": 1, "third": 3, "last": total}[at], times=times)
    with pytest.raises(vattn.DriverError, match=call):
        scene.cache.close()
    cache = scene.cache
    uses = (cache.stats, cache.check_integrity, cache.trim, lambda: cache.ensure(0, 50), lambda: cache.rows(0, 0))
    for use in (*uses, lambda: cache.fork(0), lambda: cache.release(0), lambda: cache.k(0)):
        with pytest.raises(vattn.ConfigError, match=r"call close\(\)|closed"):
            use()
    if times == 1:
        assert scene.driver.allocated_bytes() in (0, None)
        assert not scene.driver.book.handles
    scene.close()
    with pytest.raises(vattn.ConfigError, match="closed"):
        scene.cache.acquire()


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_failed_reservation_gives_the_others_back(at, out_of_memory, device):
    driver = FailingDriver(open_driver(device))
    driver.fail("reserve", at=at, out_of_memory=out_of_memory)
    layout = make_layout(max(4096, driver.granularity_bytes), "token")
    with pytest.raises(vattn.ConfigError if out_of_memory else vattn.DriverError, match="reserve"):
        vattn.KVCache(layout, 4, driver=driver, page_bytes=max(4096, driver.granularity_bytes))
    assert not driver.book.ranges


@pytest.mark.parametrize("call", ["unmap", "map", "set_access"])
@pytest.mark.parametrize("order", ["token", "layer", "token, guard"])
def test_what_fails_at_the_end_of_a_step_is_done_later(order, call, device, monkeypatch):
    """Truncated rows are unmapped when the step that read them ends; an error would tell nobody anything."""
    # What the GPU has not done by then is left to whoever comes next: here it always has.
    monkeypatch.setattr(Fences, "done", lambda fences: fences.wait() is None)

    def cut(scene: Scene) -> Counter[str]:
        with scene.cache.step([0, 1]):
            scene.cache.truncate(1, 3)
            begin = scene.driver.calls.copy()
        return scene.driver.calls - begin

    def go_on(scene: Scene) -> tuple[int, ...]:
        assert scene.cache.acquire(6) == 6
        scene.cache.ensure(6, 40)  # whoever grows next clears up
        scene.cache.release(6)
        scene.cache.trim()
        scene.cache.check_integrity()
        stats = scene.cache.stats()
        return stats.in_use_bytes, stats.mapped_bytes, stats.parked_bytes, stats.free_bytes

    scene = Scene(device, order)
    total = cut(scene)["unmap"]
    whole = [tensor.clone() for tensor in scene.state()[2]]  # type: ignore[attr-defined]
    bytes_then = go_on(scene)
    scene.close()
    assert total > 1
    for at in range(1, total + 1) if device == "cpu" else sorted({1, (total + 1) // 2, total}):
        scene = Scene(device, order)
        scene.driver.fail("unmap", at=at)
        if call != "unmap":  # of putting back what was unmapped before
            scene.driver.fail(call, times=1000)
        made = cut(scene)
        assert made["unmap"] == at
        assert call == "unmap" or at == 1 or made[call]
        scene.cache.check_integrity()
        assert scene.cache.rows(1, 3)[1].sum().isfinite()
        scene.driver.heal()
        assert go_on(scene) == bytes_then
        for now, then in zip(scene.state()[2], whole, strict=True):  # type: ignore[call-overload]
            assert torch.equal(now, then)
        scene.close()


def test_truncate_does_not_promise_pages_that_it_gave_back():
    """What was left in rows past the end is wiped last; nothing but a driver's error was expected there."""
    driver = HostDriver()
    layout = vattn.KVLayout(2, 2, 64, 400, torch.float32)
    with vattn.KVCache(layout, 2, driver=driver, page_bytes=4096, over_read_tokens=8, over_read_masked=False) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 200)
        driver._zero = lambda address, size_bytes: 1 / 0
        with pytest.raises(ZeroDivisionError):
            cache.truncate(slot, 5)
        del driver._zero
        cache.check_integrity()
        cache.ensure(slot, 190)
        assert not cache.rows(slot, 0)[0][5:].any()
