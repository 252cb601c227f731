"""``vattn tune`` chooses among kernels by the time of whole steps."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from vattn.attention import TritonDecodeAttention
from vattn.cli.tune import _small_model
from vattn.errors import ConfigError
from vattn.models import LlamaConfig
from vattn.models.fused_llama import products
from vattn.ops.skinny_linear import LinearConfig
from vattn.tuning import measure, steps
from vattn.tuning.measure import _close, _faster_than_cublas, filled_cache, measure_attention
from vattn.tuning.steps import _step_us, choose, choose_in_steps

CPU = torch.device("cpu")


def test_what_makes_the_whole_faster_is_taken_place_after_place():
    times = {"a": 10.0, "b": 9.0, "c": 8.0, "x": 5.0, "y": 4.999, "z": 6.0}

    def time_us(chosen):
        return sum(times[each] for each in chosen) - 4 * (chosen == ["c", "z"])

    # z is the slowest at its place, and the fastest beside c. y is not faster by enough.
    assert choose([["a", "b", "c"], ["x", "y", "z"]], time_us) == (["c", "z"], 15.0, 10.0)
    assert choose([["a"], ["x", "y"]], time_us) == (["a", "x"], 15.0, 15.0)


@pytest.mark.parametrize(("name", "first_us"), [("a", 8.1), ("b", 5.0)])
def test_one_odd_timing_chooses_nothing(name, first_us):
    """Of what is chosen so far, which seems slow, or of another, which seems fast."""
    seen = []

    def time_us(chosen):
        seen.extend(chosen)
        return first_us if chosen == [name] and seen.count(name) == 1 else 8.0

    assert choose([["a", "b"]], time_us)[0] == ["a"]
    assert sorted(seen) == ["a", "a", "b", "b"]


def model(num_layers, max_seq_len):
    assert (num_layers, max_seq_len > 64) == (8, True)
    return SimpleNamespace(layers=list(range(8)))


def linear(tokens, *times):
    shape = {"outputs": 64, "inputs": 32, "dtype": "bfloat16", "tokens": tokens, "swiglu": False, "cublas_us": 9.0}
    (config, us), *runners_up = times
    return {**shape, "config": config, "us": us, "runners_up": runners_up}


def attention(batch, context, *options):
    (backend, first), *runners_up = options
    case = {"batch": batch, "context": context, "num_kv_heads": 2, "head_dim": 8, "us": {}}
    return {**case, "backend": backend, "options": first, "runners_up": runners_up}


def test_records_name_what_steps_chose(monkeypatch):
    one, other = {"block_n": 1}, {"block_n": 2}
    kernels = ("triton-decode", {"block_n": 64}), ("triton-decode", {"block_n": 32})
    products = [linear(1, (one, 5.0), (other, 5.1)), linear(2, (one, 5.0), (None, 9.0)), linear(4, (one, 5.0))]
    cases = [attention(1, 8, *kernels), attention(1, 16, *kernels), attention(2, 8, *kernels)]
    seen = []

    def step_us(fused, cache, batch, records, pdl, chosen):
        assert [record["tokens"] for record in records] == [len(batch.slots_int32)]
        assert (cache.seq_len(0), int(batch.rows_int32[0])) == (batch.ends_int32[0], batch.ends_int32[0] - 1)
        assert fused.layers == [0, 1]  # as many as the cache has
        (_, options), (config, _) = chosen
        context = int(batch.ends_int32[0])
        # By turns: another backend at 8 rows, another product where that backend is.
        return 100.0 - (options["block_n"] == 32) * (10 if context == 8 else -10) - (config in (other, None))

    monkeypatch.setattr(steps, "_step_us", step_us)
    monkeypatch.setattr(measure, "_layers_of", lambda layer_bytes, device: 2)
    choose_in_steps(model, products, cases, torch.bfloat16, CPU, report=lambda *each: seen.append(each))
    assert [(record["config"], record["us"]) for record in products] == [(other, 5.1), (None, 9.0), (one, 5.0)]
    assert [case["options"]["block_n"] for case in cases] == [32, 64, 32]
    assert seen == [(1, 8, 100.0, 89.0), (1, 16, 99.0, 99.0), (2, 8, 100.0, 89.0)]
    assert not any("runners_up" in record for record in (*products, *cases))


def test_no_room_for_steps_leaves_what_is_fastest_alone(monkeypatch):
    def no_room(*arguments):
        raise torch.OutOfMemoryError("none")

    monkeypatch.setattr(steps, "_step_us", no_room)
    monkeypatch.setattr(measure, "_layers_of", lambda layer_bytes, device: 2)
    products, cases = [linear(1, ({"block_n": 1}, 5.0), (None, 5.1))], [attention(1, 8, ("torch-varlen", {}))]
    with pytest.raises(torch.OutOfMemoryError):
        choose_in_steps(model, products, cases, torch.bfloat16, CPU)
    assert products[0]["config"] == {"block_n": 1}
    assert cases[0]["backend"] == "torch-varlen"
    assert not any("runners_up" in record for record in (*products, *cases))


def test_a_step_runs_what_is_chosen(monkeypatch):
    monkeypatch.setattr(measure, "_layers_of", lambda layer_bytes, device: 2)
    one, other = LinearConfig(2, 32, dot=False), LinearConfig(4, 32, splits=2)
    chosen = [("triton-decode", {"block_n": 32}), (asdict(one), 5.0), (None, 5.0), (asdict(other), 5.0)]
    shapes = [(64, 32, False), (64, 64, True), (32, 64, False)]
    products = [dict(zip(("outputs", "inputs", "swiglu"), shape, strict=True)) for shape in shapes]
    backends = []
    fused = SimpleNamespace(embedding=torch.randn(9, 32), decode=lambda *arguments: backends.append(arguments[-1]))

    def timed(launch, count, repeats):
        launch(0)
        return 7.0

    monkeypatch.setattr(steps, "graph_us", timed)
    with filled_cache(2, 8, torch.bfloat16, CPU, 3, 20) as (cache, batch):
        assert _step_us(fused, cache, batch, products, True, chosen) == 7.0
        assert [cache.seq_len(slot) for slot in range(3)] == batch.ends_int32.tolist() == [20, 20, 20]
    table = fused.ops.linear.__self__
    assert [table.find(outputs, inputs, 3, swiglu) for outputs, inputs, swiglu in shapes] == [None, None, other]
    assert table.find(64, 32, 1) == one  # which is for one token
    assert table.pdl
    (backend,) = backends
    assert isinstance(backend, TritonDecodeAttention)
    assert (backend.block_n, backend.pdl) == (32, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command's own test runs it there")
def test_every_choice_gives_the_same_logits(monkeypatch):
    """The step that is timed, in Triton's interpreter."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16
    )
    model = _small_model(config, torch.float32, CPU, 8, 64)
    assert len(model.layers) == 3
    plain, parts = LinearConfig(16, 32, num_stages=1), LinearConfig(16, 16, splits=2, num_stages=1)
    shapes = [(outputs, inputs, kind == "swiglu") for outputs, inputs, kind in products(config)]
    records = [dict(zip(("outputs", "inputs", "swiglu"), shape, strict=True)) for shape in shapes]
    whole = [kind != "plain" for _, _, kind in products(config)]
    logits = []

    def timed(launch, count, repeats):
        logits.append(launch(0))
        return 7.0

    monkeypatch.setattr(steps, "graph_us", timed)
    monkeypatch.setattr(measure, "_layers_of", lambda layer_bytes, device: 4)
    with filled_cache(2, 16, torch.float32, CPU, 3, 20) as (cache, batch), torch.inference_mode():
        for found in ([None] * 5, [plain] * 5, [plain if each else parts for each in whole]):
            chosen = [(each and asdict(each), 1.0) for each in found]
            _step_us(model, cache, batch, records, False, [("reference", {}), *chosen])
    first, *others = logits
    assert first.shape == (3, 64)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_what_is_near_the_fastest_runs_for_the_choice():
    assert _close({"a": 11.4, "b": 10.0, "c": 11.6}) == {"b": 10.0, "a": 11.4}
    assert list(_close({n: 10 + n / 100 for n in range(20)})) == list(range(8))
    one, other = LinearConfig(2, 32), LinearConfig(4, 32)
    assert _faster_than_cublas({None: 10.0, one: 9.95, other: 9.8}) == {None: 10.0, other: 9.8}


def test_heads_that_no_backend_takes(monkeypatch):
    monkeypatch.setattr(measure, "_layers_of", lambda layer_bytes, device: 2)
    with pytest.raises(ConfigError, match="head_dim 512"):
        measure_attention(4, 2, 512, torch.bfloat16, CPU, [(1, 16)])
