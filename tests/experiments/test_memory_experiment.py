"""The experiment on backing, sharing and stepping measures what it says that it measures."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "06_sharing"))
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "16_memory"))
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import backing
import prefix
import stepping
from common import Records
from table import read

from vattn import OutOfSlots
from vattn.driver import HostDriver, LedgerDriver


@pytest.fixture
def records(tmp_path):
    records = Records("16_memory", True)
    records.path = tmp_path / "quick.jsonl"
    return records


def open_stepping(system):
    return stepping.SYSTEMS[system](stepping.LAYOUT, 3, driver=HostDriver(), page_bytes=stepping.PAGE_BYTES)


@pytest.mark.parametrize("system", stepping.SYSTEMS)
def test_the_thread_works_beside_steps_and_leaves_their_slots_alone(system):
    with open_stepping(system) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 64)
        with stepping.churning(cache, 256) as done:
            deadline = time.monotonic() + 60
            whole, waited = stepping.steps(cache, [slot], 20)
            while done[0] < 3 and time.monotonic() < deadline:
                time.sleep(0.001)
        assert done[0] >= 3
        assert all(0 < of < all_ for of, all_ in zip(waited, whole, strict=True))
        assert cache.seq_len(slot) == 64
        assert cache.stats().num_live_slots == 1
        assert not cache.stats().parked_bytes  # its next sequence has to be mapped
        cache.check_integrity()


@pytest.mark.parametrize("system", stepping.SYSTEMS)
def test_only_with_one_lock_a_step_waits_for_an_operation(system):
    with open_stepping(system) as cache:
        slot, entered = cache.acquire(), threading.Event()

        def enter() -> None:
            with cache.step([slot]):
                entered.set()

        thread = threading.Thread(target=enter)
        with cache._lock.lock:  # as in an operation
            thread.start()
            deadline = time.monotonic() + 60
            while not entered.is_set() and not cache._lock.hurrying and time.monotonic() < deadline:
                time.sleep(0.001)
            assert entered.is_set() == (system == "vattn")
        thread.join(60)
        assert entered.is_set()


def test_what_fails_in_the_thread_is_raised():
    with open_stepping("vattn") as cache:
        for _ in range(3):
            cache.acquire()
        with pytest.raises(OutOfSlots), stepping.churning(cache):  # noqa: PT012
            deadline = time.monotonic() + 60
            while any(thread.name == "churn" for thread in threading.enumerate()) and time.monotonic() < deadline:
                time.sleep(0.001)


def test_pages_are_taken_and_shared_anew_each_time(records):
    backing.pages(records, "ledger", "vattn", repeats=2)
    found = {(r["case"].split("=")[-1], r["metric"]): r for r in records.records}
    # 512 pages of 2 MiB: created, mapped, made accessible; and 1,024 aliases.
    assert found["new", "back_1gib_calls"]["value"] == 3 * 512
    assert found["free", "back_1gib_calls"]["value"] == 2 * 512
    assert {found[kind, "alias_16k_calls"]["value"] for kind in ("new", "free")} == {2 * 1024}
    assert all(found[kind, "lone_page"]["value"] > 0 for kind in ("new", "free"))
    records.write()
    assert len(read(records.path)) == 10


def test_native_is_switched_for_drivers_that_are_opened_in_the_block(monkeypatch):
    monkeypatch.setenv("VATTN_NATIVE", "1")
    with backing.native(False):
        assert os.environ["VATTN_NATIVE"] == "0"
    with backing.native(True):
        assert "VATTN_NATIVE" not in os.environ
    assert os.environ["VATTN_NATIVE"] == "1"
    assert backing.is_of(LedgerDriver(), "vattn")


class Answering:
    """Answers a request's tokens one a step; notes the prompts and their tenants."""

    def __init__(self):
        self.asked, self.left, self.salt = [], {}, None

    def with_salt(self, salt):
        self.salt = salt
        return self

    def submit(self, prompt, max_new_tokens):
        self.asked.append((tuple(prompt), self.salt))
        self.left[len(self.asked)] = max_new_tokens
        return len(self.asked)

    def step(self):
        self.left = {request: count - 1 for request, count in self.left.items()}
        came, self.left = [(r, 1) for r in self.left], {r: count for r, count in self.left.items() if count}
        return came

    def cancel(self, request):
        raise AssertionError


def test_requests_share_what_their_kind_says():
    case, system = prefix.CASES["tiny"], Answering()
    found = dict(prefix.measure(system, case, ("cold", "warm", "other-salt")))
    assert [len(each["prefix_first_token"]) for each in found.values()] == [case.requests * case.repeats] * 3
    rounds = case.repeats + 1
    sizes = [case.requests] * rounds + [1, case.requests] * 2 * rounds
    groups = [[system.asked.pop(0) for _ in range(size)] for size in sizes]
    shared = [{prompt[: case.shared] for prompt, _ in group} for group in groups]
    assert all(len(each) == 1 for each in shared)
    cold, warm, salted = shared[:rounds], shared[rounds : 3 * rounds], shared[3 * rounds :]
    assert len({prompt for each in (*cold, *warm[::2], *salted[::2]) for prompt in each}) == 3 * rounds
    assert warm[::2] == warm[1::2]
    assert salted[::2] == salted[1::2]
    assert [{salt for _, salt in group} for group in groups[-2:]] == [{"a"}, {"b"}]
    assert {salt for group in groups[: 3 * rounds] for _, salt in group} == {None}
    assert len({prompt for group in groups for prompt, _ in group}) == sum(sizes)
