"""``vattn tune`` chooses among kernels by the time of whole steps."""

from __future__ import annotations

import torch

from vattn.models import LlamaConfig
from vattn.tuning import measure, steps
from vattn.tuning.steps import choose, choose_in_steps

CPU = torch.device("cpu")
TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


def test_what_makes_the_whole_faster_is_taken_place_after_place():
    times = {"a": 10.0, "b": 9.0, "c": 8.0, "x": 5.0, "y": 4.999, "z": 6.0}

    def time_us(chosen):
        return sum(times[each] for each in chosen) - 4 * (chosen == ["c", "z"])

    # z is the slowest at its place, and the fastest beside c. y is not faster by enough.
    assert choose([["a", "b", "c"], ["x", "y", "z"]], time_us) == (["c", "z"], 10.0)
    assert choose([["a"], ["x", "y"]], time_us) == (["a", "x"], 15.0)


def test_one_lucky_timing_chooses_nothing():
    calls = {"b": 0}

    def time_us(chosen):
        if chosen == ["b"]:
            calls["b"] += 1
            return 5.0 if calls["b"] == 1 else 10.0
        return 8.0

    assert choose([["a", "b"]], time_us) == (["a"], 8.0)
    assert calls["b"] == 2


def linear(tokens, *times):
    shape = {"outputs": 64, "inputs": 32, "dtype": "bfloat16", "tokens": tokens, "swiglu": False, "cublas_us": 9.0}
    (config, us), *runners_up = times
    return {**shape, "config": config, "us": us, "runners_up": runners_up}


def attention(batch, context, *options):
    (backend, first), *runners_up = options
    return {
        "batch": batch,
        "context": context,
        "backend": backend,
        "options": first,
        "us": {},
        "runners_up": runners_up,
    }


def test_records_name_what_steps_chose(monkeypatch):
    one, other = {"block_n": 1}, {"block_n": 2}
    kernels = ("triton-decode", {"block_n": 64}), ("triton-decode", {"block_n": 32})
    products = [linear(1, (one, 5.0), (other, 5.1)), linear(2, (one, 5.0), (None, 9.0)), linear(4, (one, 5.0))]
    cases = [attention(1, 8, *kernels), attention(1, 16, *kernels), attention(2, 8, *kernels)]
    seen = []

    def step_us(fused, cache, batch, records, pdl, chosen):
        assert [record["tokens"] for record in records] == [len(batch.slots_int32)]
        assert (cache.seq_len(0), int(batch.rows_int32[0])) == (batch.ends_int32[0], batch.ends_int32[0] - 1)
        (_, options), (config, _) = chosen
        context = int(batch.ends_int32[0])
        # By turns: another backend at 8 rows, another product where that backend is.
        return 100.0 - (options["block_n"] == 32) * (10 if context == 8 else -10) - (config in (other, None))

    monkeypatch.setattr(steps, "_step_us", step_us)
    monkeypatch.setattr(measure, "_layers_of", lambda layer_bytes, device: 2)
    choose_in_steps(TINY, products, cases, torch.bfloat16, CPU, report=lambda *each: seen.append(each))
    assert [(record["config"], record["us"]) for record in products] == [(other, 5.1), (None, 9.0), (one, 5.0)]
    assert [case["options"]["block_n"] for case in cases] == [32, 64, 32]
    assert seen == [(1, 8, 100.0, 89.0), (1, 16, 99.0, 99.0), (2, 8, 100.0, 89.0)]
    assert not any("runners_up" in record for record in (*products, *cases))
