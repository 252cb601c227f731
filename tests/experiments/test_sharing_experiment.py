"""The experiment on sharing and parking counts what it says that it counts."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "06_sharing"))
from beside import Beside, Churn, levelled
from common import Records
from serving import LENGTHS, limit_for, pages_and_rounds, serve, warmed_up_after
from table import read

from vattn import KVLayout
from vattn.driver import LedgerDriver
from vattn.errors import OutOfSlots
from vattn.kv_cache import KVCache


@pytest.mark.parametrize("name", LENGTHS)
def test_requests_reuse_parked_pages_within_the_limit(name):
    lengths = LENGTHS[name](np.random.default_rng(0), 400)
    pages, num_rounds = pages_and_rounds(lengths)
    assert pages.min() >= 1
    assert num_rounds.min() >= 1
    limit = limit_for(lengths, 4)
    parked, unmapped = (serve(lengths, limit, system) for system in ("vattn", "vattn-no-parking"))
    assert parked.busy == unmapped.busy
    assert parked.peak_bytes <= limit
    assert parked.calls[200:].sum() < unmapped.calls[200:].sum() / 2
    # All pages but those that a sequence gets after the last admission are mapped, and made accessible.
    assert 1.5 < unmapped.calls.sum() / pages.sum() < 2.5


def test_warmed_up_after_the_last_window_with_too_many_calls():
    calls = np.zeros(5000)
    assert warmed_up_after(calls) == 0
    calls[1500] = 100  # windows that begin at 501 to 1,500 have it
    assert warmed_up_after(calls) == 1501
    calls[4999] = 100
    assert warmed_up_after(calls) is None


def test_levelling_takes_growth_away_and_leaves_what_stands_out():
    growing = 5 + 0.01 * np.arange(101)
    slow = growing.copy()
    slow[3] += 2
    level = levelled({"none": [growing.tolist()] * 2, "busy": [slow.tolist()]}, ["none"])
    assert np.allclose(level["none"], 5.5)
    assert np.allclose(np.sort(level["busy"][0])[[0, -2, -1]], [5.5, 5.5, 7.5])


@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("forks", [True, False])
def test_a_thread_beside_keeps_its_rate_and_leaves_other_slots_alone(make_cache, parks, forks):
    cache = make_cache(KVLayout(2, 1, 16, 400, torch.float32), 6, page_bytes=4096, memory_limit=1 << 20)
    cache.acquire(0)
    cache.ensure(0, 50)
    with Churn(cache, Beside("same-cache", 500, parks, forks)) as churn:
        time.sleep(0.5)
    assert 100 < churn.rate < 700
    assert churn.cache.seq_len(0) == 50
    stats = cache.stats()
    assert stats.num_live_slots == 1
    assert bool(stats.parked_bytes) == parks
    cache.check_integrity()


def test_what_fails_in_the_thread_is_raised():
    layout = KVLayout(32, 8, 128, 1024, torch.bfloat16)
    with KVCache(layout, 1, driver=LedgerDriver()) as cache, pytest.raises(OutOfSlots):  # noqa: SIM117
        with Churn(cache, Beside("ledger", 1000, parks=True)):
            time.sleep(0.05)
    assert not any(thread.name == "churn" for thread in threading.enumerate())


def test_a_part_is_measured_anew_and_the_others_stay(tmp_path):
    def run(parts, value):
        records = Records("06_sharing", True, parts)
        records.path = tmp_path / "quick.jsonl"
        for part in parts or ("one", "two"):
            records.add(f"{part} x=1", "vattn", "calls", "calls", [value])
        records.write()
        return {record["case"]: record["value"] for record in read(records.path)}

    assert run(None, 1.0) == {"one x=1": 1, "two x=1": 1}
    assert run(("two",), 2.0) == {"one x=1": 1, "two x=1": 2}
    assert run(None, 3.0) == {"one x=1": 3, "two x=1": 3}


def test_a_second_run_takes_turns_in_other_orders(monkeypatch):
    def order(case):
        return Records("06_sharing").drawn(case).sample(range(10), 10)

    first = order("one")
    assert order("one") == first
    assert order("two") != first
    monkeypatch.setenv("VATTN_AGAIN", "1")
    assert order("one") != first
