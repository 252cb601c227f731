"""Skinny products against the formula in float64: every tile, split sums, odd shapes, what lies past the edges."""

from __future__ import annotations

import pytest
import torch

from vattn.errors import ConfigError
from vattn.ops.ops_table import LinearTable
from vattn.ops.skinny_linear import LinearConfig, skinny_linear, skinny_linear_reference
from vattn.ops.swiglu import swiglu_reference
from vattn.ops.triton_support import unavailable
from vattn.tuning.candidates import linear_candidates
from vattn.tuning.table import TuningTable, table_for, table_paths

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the largest result; partial sums stay in float32. The interpreter cuts where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def poisoned(rows, columns, dtype, device):
    """A random matrix inside a larger one of NaNs."""
    wide = torch.full((rows + 3, columns + 16), float("nan"), dtype=dtype, device=device)
    wide[:rows, :columns] = torch.randn(rows, columns).to(device, dtype)
    return wide[:rows, :columns]


def check(got, x, weight, bias, dtype):
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    total = got.double().sum(0) if got.dim() == 3 else got.double()
    assert (total - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "config"),
    [
        (1, 50, 100, LinearConfig(8, 32, dot=False)),
        (1, 64, 256, LinearConfig(4, 64, 2, dot=False)),
        (1, 64, 200, LinearConfig(16, 64, 4, dot=False)),
        (1, 48, 128, LinearConfig(16, 32, 2)),
        (5, 50, 100, LinearConfig(16, 32, 3)),
        (8, 64, 128, LinearConfig(32, 64)),
        (13, 33, 65, LinearConfig(16, 16, 4)),
        (64, 32, 96, LinearConfig(32, 32)),
    ],
)
def test_against_the_formula(device, dtype, with_bias, tokens, outputs, inputs, config):
    x, weight = poisoned(tokens, inputs, dtype, device), poisoned(outputs, inputs, dtype, device)
    bias = torch.randn(outputs).to(device, dtype) if with_bias else None
    got = skinny_linear(x, weight, config, bias)
    assert got.shape == ((tokens, outputs) if config.splits == 1 else (config.splits, tokens, outputs))
    assert got.dtype == (dtype if config.splits == 1 else torch.float32)
    check(got, x, weight, bias, dtype)
    reference = skinny_linear_reference(x, weight, bias, config.splits, config.block_k)
    assert reference.shape == got.shape
    assert reference.dtype == got.dtype
    check(reference, x, weight, bias, dtype)
    assert (got.double() - reference.double()).abs().max() <= TOLERANCE[dtype] * reference.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "size", "inputs", "config"),
    [
        (1, 25, 100, LinearConfig(8, 32, dot=False)),
        (1, 32, 256, LinearConfig(4, 64, dot=False)),
        (3, 33, 100, LinearConfig(16, 32)),
        (8, 64, 128, LinearConfig(32, 64)),
    ],
)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_with_swiglu(device, dtype, tokens, size, inputs, config, activation):
    x, weight = poisoned(tokens, inputs, dtype, device) / 3, poisoned(2 * size, inputs, dtype, device)
    for bias in (None, torch.randn(2 * size).to(device, dtype)):
        got = skinny_linear(x, weight, config, bias, swiglu=True, activation=activation)
        sums = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        expected = swiglu_reference(sums, activation=activation)
        assert got.shape == expected.shape
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() <= 2 * TOLERANCE[dtype] * expected.abs().max()
    with pytest.raises(ConfigError, match="whole sums"):
        skinny_linear(x, weight, LinearConfig(16, 32, 2), swiglu=True)
    with pytest.raises(ConfigError, match="one of silu, gelu_tanh, got 'relu'"):
        skinny_linear(x, weight, config, swiglu=True, activation="relu")


def test_nothing_past_the_result_is_written(device):
    x, weight = torch.randn(3, 64, device=device), torch.randn(20, 64, device=device)
    wide = torch.full((4, 32), 7.0, device=device)
    skinny_linear(x, weight, LinearConfig(16, 32), out=wide[:3, :20])
    assert (wide[3] == 7).all()
    assert (wide[:, 20:] == 7).all()
    assert not (wide[:3, :20] == 7).any()


def test_too_many_tokens():
    x, weight = torch.ones(129, 16), torch.ones(16, 16)
    with pytest.raises(ConfigError, match="up to 128 tokens"):
        skinny_linear(x, weight, LinearConfig(16, 16))
    with pytest.raises(ConfigError, match="one token"):
        skinny_linear(x[:2], weight, LinearConfig(16, 16, dot=False))


def test_the_table_takes_the_next_larger_entry(monkeypatch):
    one, eight = LinearConfig(2, 16, dot=False), LinearConfig(16, 16, 2)
    table = LinearTable({(32, 64, False): {8: eight, 1: one, 16: None}})
    assert [table.find(32, 64, tokens) for tokens in (1, 2, 8, 9, 16, 17)] == [one, eight, eight, None, None, None]
    assert table.find(64, 32, 1) is None
    x, weight = torch.randn(4, 64), torch.randn(32, 64)
    if not torch.cuda.is_available():
        assert table.linear(x, weight).shape == (2, 4, 32)
    assert table.linear(x, weight, whole=True).shape == (4, 32)


def test_tables_survive_the_disk(tmp_path, monkeypatch):
    table = TuningTable("Some GPU", pdl=True)
    record = {
        "outputs": 8,
        "inputs": 16,
        "dtype": "bfloat16",
        "tokens": 4,
        "swiglu": False,
        "us": 1.5,
        "cublas_us": 2.0,
    }
    table.add("linear", [{**record, "config": {"block_n": 16, "block_k": 32, "splits": 2}}])
    table.add("linear", [{**record, "tokens": 8, "config": None}])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own, shipped = table_paths("Some GPU/x 1")
    assert own == tmp_path / "vattn" / "tuned" / "Some_GPU_x_1.json"
    assert shipped.parent.name == "tuned"
    table.write(own)
    again = TuningTable.read(own)
    assert again == table
    found = again.linear_table(torch.bfloat16)
    assert found.pdl
    assert found.find(8, 16, 3) == LinearConfig(16, 32, 2)
    assert found.find(8, 16, 5) is None
    assert again.linear_table(torch.float32).entries == {}
    table.add("linear", [{**record, "us": 0.5, "config": None}])
    assert len(table.linear) == 2
    assert table.linear_table(torch.bfloat16).find(8, 16, 4) is None
    own.write_text("[1]")
    with pytest.raises(ConfigError, match="no tuning table"):
        TuningTable.read(own)
    assert table_for(torch.device("cpu")).linear == []


def test_candidates_fit_the_product():
    for tokens in (1, 2, 16, 17, 64):
        for outputs, inputs in ((6144, 4096), (128256, 2048), (600, 300)):
            for whole in (False, True):
                for config in linear_candidates(outputs, inputs, tokens, whole):
                    assert inputs >= config.splits * config.block_k
                    assert config.dot or tokens == 1
                    assert config.splits == 1 or not whole
    assert linear_candidates(6144, 4096, 65, False) == []
    assert len(linear_candidates(6144, 4096, 8, False)) > 10
