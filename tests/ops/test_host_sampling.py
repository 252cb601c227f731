"""Sampling on every path: what is kept and drawn, worked out by hand or in float64, whatever shares the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.decode_ops import INF, NAN, plain_sampling

import vattn.ops.host_sampling as sampling_module
from vattn.ops.host_sampling import sample_tokens_eager
from vattn.ops.sample_tokens import sample_tokens, sample_tokens_reference
from vattn.ops.triton_support import unavailable

KERNEL = pytest.param(
    sample_tokens, marks=pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())), id="kernel"
)
PATHS = [pytest.param(sample_tokens_eager, id="eager"), KERNEL]
PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])  # in order: 1, 3, 4, 0, 2


def draw(function, logits, temperature=1.0, top_k=0, top_p=1.0, seeds=0, rows=0, **more) -> list[int]:  # type: ignore[no-untyped-def]
    """A token of each row of logits; parameters are a number for all rows, or one each."""
    count, device = len(logits), logits.device
    out = torch.empty(count, dtype=torch.int32, device=device)
    state = plain_sampling(count, device, temperature=temperature, top_k=top_k, top_p=top_p, seeds=seeds, **more)
    rows = torch.as_tensor(rows, dtype=torch.int32, device=device).expand(count).contiguous()
    function(logits, torch.arange(count, dtype=torch.int32, device=device), rows, state, out)
    return out.tolist()


@pytest.mark.parametrize("function", PATHS)
def test_temperatures_that_float32_rounds_to_zero_are_greedy(device, function):
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0]] * 20, device=device)
    seeds = torch.arange(20)
    assert draw(function, logits, 1e-46, seeds=seeds) == [1] * 20
    assert draw(function, logits, 0.0, seeds=seeds) == [1] * 20
    # The smallest that it does not round to 0 draws among the equal ones, and nothing else.
    assert set(draw(function, logits, 1.5e-45, seeds=seeds)) == {1, 2}


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (1e-46, 3, 0.5), (1.0, 0, 1.0), (1e-30, 3, 1.0), (3e38, 0, 0.9)]
)
def test_nan_and_infinities(device, function, temperature, top_k, top_p):
    """NaN is never taken; -inf is never drawn unless all are."""
    cases = [
        ([NAN, NAN, NAN, NAN], {-1}),
        ([NAN, -2.0, NAN, NAN], {1}),
        ([NAN, -INF, NAN, NAN], {1}),
        ([NAN, -INF, 5.0, NAN], {2}),
        ([0.0, INF, NAN, 1.0], {1}),
        ([-INF, 1.0, -INF, -INF], {1}),
        ([3e38, -3e38, NAN, -3e38], {0}),  # their difference is infinite
        ([INF, 0.0, NAN, INF], {0, 3}),
        ([-INF, NAN, NAN, -INF], {0, 3}),
    ]
    logits = torch.tensor([row for row, _ in cases for _ in range(6)], device=device)
    tokens = draw(function, logits, temperature, top_k, top_p, seeds=torch.arange(6).repeat(len(cases)))
    for i, (row, allowed) in enumerate(cases):
        is_greedy = temperature <= 1e-46
        assert set(tokens[6 * i : 6 * i + 6]) == ({min(allowed)} if is_greedy else allowed), row


@pytest.mark.parametrize("function", PATHS)
def test_top_k_keeps_ties_and_one_is_greedy(device, function):
    row = torch.tensor([1.0, 0.5, 1.0, 0.5, 0.4, 0.5], device=device)
    seeds = torch.arange(25)
    for top_k, kept in ((1, {0}), (2, {0, 2}), (3, {0, 1, 2, 3, 5}), (5, {0, 1, 2, 3, 5}), (6, set(range(6)))):
        assert set(draw(function, row.expand(25, -1), 2.0, top_k, seeds=seeds)) == kept, top_k


@pytest.mark.parametrize("function", PATHS)
def test_temperature_then_top_k_then_top_p(device, function):
    """At temperature 0.5 the shares are as 16, 9, 2.25, 1, 0.25; of the first three, 1 and 3 hold 91.7 %."""
    count = 40 if function is sample_tokens_eager else 4  # the kernel's interpreter is slow
    logits, seeds = PROBABILITIES.log().to(device).expand(count, -1), torch.arange(count)
    for temperature, top_k, top_p, kept in (
        (0.5, 3, 0.91, {1, 3}),
        (0.5, 3, 0.93, {1, 3, 4}),
        (0.5, 0, 0.91, {1, 3, 4}),  # they hold 87.7 % of all
        (1.0, 3, 0.91, {1, 3, 4}),
    ):
        tokens = draw(function, logits, temperature, top_k, top_p, seeds=seeds)
        assert set(tokens) <= kept
        assert set(tokens) == kept or function is not sample_tokens_eager
        assert tokens == draw(sample_tokens_eager, logits[:count], temperature, top_k, top_p, seeds=seeds)


@pytest.mark.parametrize("function", PATHS)
def test_min_p(device, function):
    """Shares of the likeliest: 1, 0.75, 0.375, 0.25, 0.125; at temperature 0.5 their squares. Ties are kept."""
    logits, seeds = PROBABILITIES.log().to(device), torch.arange(40 if function is sample_tokens_eager else 4)

    def kept(min_p, temperature=1.0, top_k=0, top_p=1.0):
        reach = -temperature * math.log(min_p)
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "reach": reach, "seeds": seeds}
        tokens = draw(function, logits.expand(len(seeds), -1), **how)
        assert tokens == draw(sample_tokens_eager, logits.expand(len(seeds), -1), **how)
        return set(tokens)

    cases = [
        ({1, 3, 4, 0}, kept(0.24)),
        ({1, 3, 4}, kept(0.26)),
        ({1}, kept(1.0)),
        ({1, 3}, kept(0.5, temperature=0.5)),
        ({1, 3, 4}, kept(0.13, temperature=0.5)),
        ({1, 3}, kept(0.01, top_k=2)),
        ({1, 3}, kept(0.3, top_k=4, top_p=0.8)),  # of 0.4, 0.3 and 0.15, the two hold 0.82
        ({1, 3, 4}, kept(0.3, top_p=0.83)),
    ]
    for wanted, found in cases:
        assert found == wanted if function is sample_tokens_eager else found <= wanted


@pytest.mark.parametrize("function", PATHS)
def test_min_p_of_infinities(device, function):
    logits = torch.tensor([[INF, 0.0, NAN, INF], [-INF, NAN, NAN, -INF], [3e38, -3e38, NAN, 3e38]], device=device)
    tokens = draw(function, logits.repeat(5, 1), 1.0, seeds=torch.arange(15), reach=0.5)
    assert set(tokens) == {0, 3}


def test_min_p_against_float64():
    logits, min_p, temperature = torch.randn(60, 400) * 2, torch.rand(60) * 0.3 + 0.01, torch.rand(60) + 0.7
    reach = -temperature.double() * min_p.double().log()
    tokens = draw(sample_tokens_eager, logits, temperature, seeds=torch.arange(60), reach=reach)
    shares = (logits.double() / temperature[:, None]).softmax(-1)
    shares /= shares.amax(-1, keepdim=True)
    assert (shares[range(60), tokens] >= min_p - 1e-5).all()
    assert (shares[range(60), tokens] < 1).sum() > 10


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {1}), (0.39, {1}), (0.5, {1, 3}), (0.71, {1, 3, 4}), (0.99, {0, 1, 2, 3, 4})]
)
@pytest.mark.parametrize("temperature", [0.5, *(pytest.param(other, marks=pytest.mark.slow) for other in (1.0, 2.0))])
def test_shares(top_p, kept, temperature):
    """Of 20,000 draws, against the softmax of the kept in float64, to five standard deviations."""
    count = 20_000
    logits = PROBABILITIES.log() * temperature  # what is kept does not depend on the temperature then
    tokens = draw(sample_tokens_eager, logits.expand(count, -1), temperature, 0, top_p, rows=torch.arange(count))
    assert set(tokens) == kept
    expected = torch.where(torch.tensor([token in kept for token in range(5)]), PROBABILITIES.double(), 0)
    expected /= expected.sum()
    share = torch.tensor(tokens).bincount(minlength=5) / count
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize("chunk", [64, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_short_way_is_the_long_way(monkeypatch, chunk, dtype):
    """Vocabularies of several chunks, hot and cold, cut and not: as the reference, which hashes everything."""
    monkeypatch.setattr(sampling_module, "_CHUNK", chunk)
    logits = (torch.randn(32, 9000) * torch.linspace(0.1, 6, 32)[:, None]).to(dtype)
    logits[:4, ::3], logits[4:8, ::3] = NAN, -INF
    if dtype == torch.float64:
        logits = logits.float().double()  # the reference computes in float32
    settings = (
        torch.rand(32) * 3,
        torch.randint(0, 200, (32,)) * (torch.arange(32) % 2),
        torch.rand(32).clamp(min=0.01).where(torch.arange(32) % 4 < 2, 1.0),
        torch.randint(0, 2**62, (32,)),
        torch.randint(0, 2**31 - 1, (32,)),
    )
    more = {"reach": (torch.rand(32) * 9).where(torch.arange(32) % 3 == 0, INF)}
    found = draw(sample_tokens_eager, logits, *settings, **more)
    assert found == draw(sample_tokens_reference, logits, *settings, **more)


def test_what_is_drawn_is_kept_in_float64():
    logits = torch.randn(40, 500) * 3
    top_k, top_p, temperature = torch.randint(1, 60, (40,)), torch.rand(40).clamp(min=0.05), torch.rand(40) + 0.3
    tokens = draw(sample_tokens_eager, logits, temperature, top_k, top_p, seeds=torch.arange(40))
    for row, token, heat, k, p in zip(logits.double().numpy(), tokens, temperature, top_k, top_p, strict=True):
        order = np.argsort(-row)[: int(k)]
        share = np.exp((row[order] - row.max()) / heat.item())
        before = np.concatenate(([0], share.cumsum()[:-1])) / share.sum()
        assert token in order[before < p.item()]


def test_a_row_does_not_depend_on_the_batch():
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 3
    settings = [(0.0, 0, 1.0), (1.0, 5, 1.0), (0.7, 0, 0.9), (1.3, 40, 0.5), (0.0, 3, 0.3), (2.0, 0, 1.0)]
    together = draw(sample_tokens_eager, logits, *zip(*settings, strict=True), range(6), range(6))
    alone = [draw(sample_tokens_eager, logits[i : i + 1], *settings[i], i, i) for i in range(6)]
    assert [[token] for token in together] == alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_same_tokens_on_the_gpu() -> None:
    logits = torch.randn(16, 32000, generator=torch.Generator().manual_seed(0)) * 3
    settings = torch.linspace(0, 1.5, 16), torch.arange(16) * 3, torch.linspace(0.2, 1.0, 16), range(16), range(16)
    assert draw(sample_tokens, logits.cuda(), *settings) == draw(sample_tokens_eager, logits, *settings)
