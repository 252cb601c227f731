"""Experts of a few tokens against their reference, and that against the formula."""

from __future__ import annotations

import pytest
import torch

from vattn.errors import ConfigError
from vattn.ops.experts import MOST_PAIRS, experts, experts_reference
from vattn.ops.triton_support import unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
# Of the largest result. The interpreter cuts to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def draw(device, dtype, tokens, chosen, count, hidden, size):
    """Weights of experts that nobody chose are NaN, and so is what lies past the rows."""
    x = torch.full((tokens, hidden + 8), float("nan"), dtype=dtype, device=device)
    x[:, :hidden] = torch.randn(tokens, hidden) / 2
    index = torch.stack([torch.randperm(count - 1)[:chosen] for _ in range(tokens)]).to(device)
    weights = torch.rand(tokens, chosen).to(device, dtype)
    gate_up, down = torch.randn(count, 2 * size, hidden) / 4, torch.randn(count, hidden, size) / 4
    for expert in set(range(count)) - set(index.flatten().tolist()):
        gate_up[expert], down[expert] = float("nan"), float("nan")
    return x[:, :hidden], index, weights, gate_up.to(device, dtype), down.to(device, dtype)


def formula(x, index, weights, gate_up, down, activation):
    x, weights, gate_up, down = (each.double() for each in (x, weights, gate_up, down))
    act = (
        torch.nn.functional.silu if activation == "silu" else lambda g: torch.nn.functional.gelu(g, approximate="tanh")
    )
    out = torch.zeros_like(x)
    for token, chosen in enumerate(index.tolist()):
        for choice, expert in enumerate(chosen):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += weights[token, choice] * (down[expert] @ (act(gate) * up))
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("tokens", "chosen", "count", "hidden", "size"),
    [(1, 4, 9, 32, 16), (2, 2, 5, 18, 24), (3, 1, 4, 17, 9)],
)
@pytest.mark.parametrize("block_k", [1024, 16])
def test_experts(device, dtype, activation, tokens, chosen, count, hidden, size, block_k, monkeypatch):
    monkeypatch.setattr("vattn.ops.experts._BLOCK_K", block_k)  # one round of the loop, and several
    given = draw(device, dtype, tokens, chosen, count, hidden, size)
    got, expected, exact = (
        function(*given, activation=activation) for function in (experts, experts_reference, formula)
    )
    assert got.shape == expected.shape == (tokens, hidden)
    assert got.dtype == expected.dtype == dtype
    for each in (got, expected):
        assert (each.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


def test_weights_of_another_dtype_and_strided_choices(device):
    x, index, weights, gate_up, down = draw(device, torch.bfloat16, 4, 2, 6, 64, 32)
    wide = torch.cat((index, index), 1)[:, :2]
    got = experts(x, wide, weights.float(), gate_up, down)
    assert not wide.is_contiguous()
    exact = formula(x, index, weights, gate_up, down, "silu")
    assert (got.double() - exact).abs().max() <= 4e-2 * exact.abs().max()


def test_what_is_refused(device):
    x, index, weights, gate_up, down = draw(device, torch.float32, MOST_PAIRS // 2 + 1, 2, 4, 16, 8)
    with pytest.raises(ConfigError, match=f"up to {MOST_PAIRS} choices, got {MOST_PAIRS // 2 + 1} tokens with 2 each"):
        experts(x, index, weights, gate_up, down)
    for function in (experts, experts_reference):
        with pytest.raises(ConfigError, match="one of silu, gelu_tanh, got 'relu'"):
            function(x[:1], index[:1], weights[:1], gate_up, down, activation="relu")
