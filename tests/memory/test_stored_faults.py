"""Stored sequences where driver calls fail, and in random walks."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from helpers.failing_driver import FailingDriver
from test_stored import cache_of, fill, holds, left, stored

import vattn
from vattn.driver import HostDriver


# -- faults ----------------------------------------------------------------------------------------------------------
@dataclass
class Scene:
    """Stored sequences whose pages are shared with a live fork, with each other, or their own; nothing is free."""

    order: str

    def __post_init__(self) -> None:
        self.driver = FailingDriver(HostDriver())
        order, *guard = self.order.split(", ")
        num_pages = 24 if order == "token" else 32
        self.cache = cache = cache_of(num_pages, 8, order, driver=self.driver, guard=bool(guard))
        self.a = stored(cache, 200, 1)
        self.child = cache.fork(self.a[0], 135, version=self.a[1])
        cache.ensure(self.child, 160)
        fill(cache, self.child, 2, 135)
        second = cache.fork(self.a[0], 150, version=self.a[1])
        cache.ensure(second, 180)
        self.b = second, int(cache.versions([second])[0])
        cache.store(second)
        self.c = stored(cache, 200, 3)
        self.live = cache.acquire()
        cache.ensure(self.live, 40)
        fill(cache, self.live, 4)

    def check(self) -> None:
        cache = self.cache
        rest = left(cache)
        assert holds(cache, self.child, 1, 135)
        assert holds(cache, self.child, 2, 160, 135)
        assert holds(cache, self.live, 4, 40)
        for (slot, version), value in ((self.a, 1), (self.b, 1), (self.c, 3)):
            if cache.stored()[0][slot] == version:
                rows = min(150, rest[slot])
                cache.resume(slot, rows, version=version)
                assert holds(cache, slot, value, rows)
                cache.store(slot, 0)
        cache.check_integrity()


OPERATIONS = {
    "fork": lambda scene: scene.cache.fork(scene.a[0], 130, version=scene.a[1]),
    "fork over stored pages": lambda scene: scene.cache.fork(scene.a[0], 130, into=scene.c[0], version=scene.a[1]),
    "resume": lambda scene: scene.cache.resume(scene.b[0], 100, version=scene.b[1]),
    "grow": lambda scene: scene.cache.ensure(scene.live, 400),
    "copy": lambda scene: scene.cache.make_writable(scene.child, 0, 135),
    "take": lambda scene: scene.cache.ensure(scene.cache.acquire(scene.b[0]), 150),
    "trim": lambda scene: scene.cache.trim(),
}


@pytest.mark.parametrize("order", ["token", "layer", "token, guard", "layer, guard"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_driver_call_fails_no_row_changes(operation: str, order: str) -> None:
    scene = Scene(order)
    before = scene.driver.calls.copy()
    OPERATIONS[operation](scene)
    made = scene.driver.calls - before
    scene.cache.check_integrity()
    scene.cache.close()
    assert bool(made) == (operation != "resume")
    for call, total in made.items():
        for at in range(1, total + 1):
            scene = Scene(order)
            scene.driver.fail(call, at=at)
            with pytest.raises(vattn.DriverError, match=call):
                OPERATIONS[operation](scene)
            if operation == "trim" and call == "release":
                scene.driver.heal()
            scene.check()
            scene.driver.heal()
            scene.cache.close()
            assert not scene.driver.book.handles


@pytest.mark.parametrize("order", ["layer", "layer, guard"])
@pytest.mark.parametrize("operation", ["fork", "grow", "copy", "take"])
def test_a_failed_undo_leaves_stored_sequences_alone(operation: str, order: str) -> None:
    for first in ("map", "set_access", "unmap", "copy", "zero"):
        for second in ("unmap", "map", "set_access"):
            scene = Scene(order)
            scene.driver.fail(first, at=2)
            scene.driver.fail(second, at=3, times=1000)
            with suppress(vattn.VattnError):
                OPERATIONS[operation](scene)
            scene.driver.heal()
            cache = scene.cache
            rest = left(cache)
            for (slot, version), value in ((scene.a, 1), (scene.b, 1), (scene.c, 3)):
                if cache.stored()[0][slot] == version:
                    rows = min(150, rest[slot])
                    cache.resume(slot, rows, version=version)
                    assert holds(cache, slot, value, rows)
            cache.check_integrity()
            cache.close()


# -- at random -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_a_random_walk(seed: int) -> None:
    walk(seed, 400)


@pytest.mark.slow
def test_a_long_random_walk() -> None:
    counts = [walk(seed, 3000) for seed in range(100, 104)]
    assert all(sum(each[name] for each in counts) for name in counts[0])  # everything came about


def walk(seed: int, num_operations: int) -> dict[str, int]:
    """Every row of every sequence, live or stored, is what was last written to it."""
    rng = random.Random(seed)
    order = rng.choice(("token", "layer"))
    over_read = rng.choice((0, 0, 24))
    num_pages, max_slots = rng.choice((14, 30)), rng.choice((4, 7))
    options = {"over_read_tokens": over_read, "over_read_masked": bool(seed % 2), "guard": seed % 3 == 0}
    with cache_of(num_pages, max_slots, order, **options) as cache:
        live: dict[int, list[float]] = {}  # slot -> what its rows hold
        kept: dict[tuple[int, int], list[float]] = {}
        value = 0.0

        def write(slot: int, start: int) -> None:
            nonlocal value
            for row in range(start, cache.seq_len(slot)):
                value += 1
                live[slot][row:] = [value]
                for layer in range(2):
                    for tensor in cache.rows(slot, layer):
                        tensor[row] = value + layer / 2

        def check(slot: int) -> None:
            wanted = torch.tensor(live[slot])[:, None, None]
            assert cache.seq_len(slot) == len(live[slot])
            for layer in range(2):
                for tensor in cache.rows(slot, layer):
                    assert torch.equal(tensor, (wanted + layer / 2).expand_as(tensor))

        counts = dict.fromkeys(("fork", "resume", "shrunk", "gone"), 0)
        for _ in range(num_operations):
            versions, rows = cache.stored()
            for (slot, version), content in tuple(kept.items()):
                if versions[slot] != version:
                    counts["gone"] += 1
                    del kept[slot, version]
                else:
                    counts["shrunk"] += rows[slot] < len(content)
                    del content[rows[slot] :]
            assert (rows > 0).sum() == len(kept)
            action = rng.choice(("start", "grow", "grow", "store", "store", "release", "fork", "resume", "cut", "drop"))
            slot = rng.choice(sorted(live)) if live else -1
            source = rng.choice(sorted(kept)) if kept else None
            try:
                if action == "start":
                    slot = cache.acquire(expect_len=rng.choice((None, 50, 200)))
                    live[slot] = []
                elif action in ("fork", "resume") and source is not None:
                    cut = rng.randrange(1, len(kept[source]) + 1)
                    content = kept[source][:cut]
                    slot = getattr(cache, action)(source[0], cut, version=source[1])
                    live[slot] = content
                    counts[action] += 1
                    if action == "resume":
                        del kept[source]
                elif slot < 0:
                    continue
                elif action == "grow":
                    cache.ensure(slot, rng.randrange(len(live[slot]), 300))
                    write(slot, len(live[slot]))
                elif action == "store" and live[slot]:
                    version, keep = int(cache.versions([slot])[0]), rng.randrange(1, len(live[slot]) + 1)
                    if rng.random() < 0.3:
                        with cache.step([slot]):
                            cache.store(slot, keep)
                    else:
                        cache.store(slot, keep)
                    kept[slot, version] = live.pop(slot)[:keep]
                elif action == "release":
                    cache.release(slot)
                    del live[slot]
                elif action == "fork":
                    child = cache.fork(slot, rng.randrange(len(live[slot]) + 1))
                    live[child] = live[slot][: cache.seq_len(child)]
                elif action == "cut":
                    del live[slot][rng.randrange(len(live[slot]) + 1) :]
                    cache.truncate(slot, len(live[slot]))
                elif action == "drop" and source is not None:
                    cache.drop(source[0], version=source[1])
                    del kept[source]
            except vattn.OutOfSlots:
                assert len(live) >= max_slots - (action == "fork")
            except vattn.OutOfPages:
                assert action in ("grow", "fork")
            if rng.random() < 0.2:
                cache.check_integrity()
            for slot in live:
                check(slot)
        return counts
