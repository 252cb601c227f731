"""What binds a run, reading or arithmetic, and the share of it that was reached."""

from __future__ import annotations

import pytest
import torch

from vattn.cli.speed import Limits, ModelWork, RunCounts, StepTimes, measure_limits, throughput
from vattn.engine.stats import Meters

WORK = ModelWork(weight_bytes=4000, num_weights=1000, num_head_weights=100, bytes_per_token=10)
STATS = RunCounts(
    num_prefill_tokens=50,
    num_decode_tokens=8,
    prefill_s=1.0,
    decode_s=20.0,
    num_prefill_steps=1,
    num_decode_steps=8,
    num_decode_rows=400,
)


def test_reading_binds_where_memory_is_slow() -> None:
    speed = throughput(STATS, WORK, Limits(4000.0, 1e9))
    assert (speed["decode_bound_by"], speed["decode_limit_s"]) == ("reading", 9.0)
    assert (speed["prefill_bound_by"], speed["prefill_limit_s"]) == ("reading", 0.9)
    assert speed["decode_share_of_limit"] == 0.45
    assert speed["decode_read_bytes_per_s"] == (8 * 4000 + 400 * 10) / 20


def test_arithmetic_binds_where_products_are_slow() -> None:
    speed = throughput(STATS, WORK, Limits(1e9, 2000.0))
    assert (speed["decode_bound_by"], speed["decode_limit_s"]) == ("arithmetic", 8.0)
    assert speed["decode_share_of_limit"] == 0.4
    assert speed["prefill_limit_s"] == pytest.approx(2 * 900 * 50 / 2000)


def test_limits_that_could_not_be_measured() -> None:
    speed = throughput(STATS, WORK, Limits(0.0, 0.0))
    assert (speed["decode_bound_by"], speed["decode_share_of_limit"]) == (None, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_limits(dtype: torch.dtype) -> None:
    limits = measure_limits(torch.device("cpu"), dtype)
    assert 1e8 < limits.read_bytes_per_s < 1e13
    assert 1e8 < limits.multiply_flops_per_s < 1e15


def test_a_step_that_brings_nothing_belongs_to_the_next() -> None:
    """As on a GPU, while a pass of prompts goes on."""
    meters, times = Meters(), StepTimes()

    def step(seconds: float, prefilled: int = 0, decoded: int = 0) -> None:
        meters.num_prefill_tokens += prefilled
        meters.num_decode_tokens += decoded
        times.note(meters.snapshot(0, 1, None, 0.0), seconds)

    step(1.0, prefilled=100)
    for _ in range(20):
        step(0.125)
    step(0.5, prefilled=100)
    step(0.25, decoded=1)
    counts = times.counts(0)
    assert (counts.prefill_s, counts.decode_s) == (4.0, 0.25)
    assert (counts.num_prefill_steps, counts.num_decode_steps) == (2, 1)
