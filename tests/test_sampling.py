"""Sampling: against distributions worked out by hand, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

from vattn.errors import ConfigError
from vattn.ops.sampling import draw_uniforms, request_generator, sample, validate_sampling

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])  # in order: 1, 3, 4, 0, 2


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """One distribution, sampled at many uniform numbers."""
    count = uniforms.numel()
    return sample(
        logits.expand(count, -1), torch.full((count,), temperature), torch.full((count,), top_p), uniforms.double()
    )


def test_greedy_takes_the_first_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [-5.0, -4.0, -9.0, -4.5]])
    tokens = sample(logits, torch.zeros(2), torch.ones(2), torch.full((2,), 0.99, dtype=torch.float64))
    assert tokens.tolist() == [1, 1]
    assert tokens.dtype == torch.int64


def test_inverts_the_cumulative_distribution() -> None:
    """Descending: token 1 up to 0.4, 3 up to 0.7, 4 up to 0.85, 0 up to 0.95, 2 to the end."""
    uniforms = torch.tensor([0.0, 0.39, 0.41, 0.69, 0.71, 0.84, 0.86, 0.94, 0.96, 1 - 2**-53], dtype=torch.float64)
    assert draw(PROBABILITIES.log(), uniforms).tolist() == [1, 1, 3, 3, 4, 4, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {1}), (0.39, {1}), (0.5, {1, 3}), (0.71, {1, 3, 4}), (0.99, {0, 1, 2, 3, 4}), (1.0, {0, 1, 2, 3, 4})],
)
def test_top_p_keeps_the_smallest_nucleus(top_p: float, kept: set[int]) -> None:
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens = draw(PROBABILITIES.log(), uniforms, top_p=top_p)
    assert set(tokens.tolist()) == kept
    expected = torch.where(torch.tensor([token in kept for token in range(5)]), PROBABILITIES, 0)
    share = tokens.bincount(minlength=5) / 4000
    torch.testing.assert_close(share, expected / expected.sum(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    share = draw(PROBABILITIES.log(), uniforms, temperature).bincount(minlength=5) / 4000
    expected = PROBABILITIES ** (1 / temperature)
    torch.testing.assert_close(share, expected / expected.sum(), atol=1e-3, rtol=0)


def test_extremes_stay_finite() -> None:
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    huge = torch.tensor([3e38, -3e38, 2e38])
    assert draw(huge, uniforms, temperature=1e-30).tolist() == [0, 0, 0]
    masked = torch.tensor([float("-inf"), 1.0, float("-inf")])
    assert draw(masked, uniforms).tolist() == [1, 1, 1]
    assert draw(torch.zeros(3), uniforms, top_p=1e-9).tolist() == [0, 0, 0]  # ties: the lowest id leads


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 3
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.3, 0.0, 2.0])
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.3, 1.0])
    generators = [request_generator(seed) for seed in range(6)]
    together = sample(logits, temperature, top_p, draw_uniforms(generators))
    for row in range(6):
        alone = draw_uniforms([request_generator(row)])
        one = sample(logits[row : row + 1], temperature[row : row + 1], top_p[row : row + 1], alone)
        assert one.item() == together[row].item()


def test_seeds() -> None:
    assert torch.equal(draw_uniforms([request_generator(3)] * 2), draw_uniforms([request_generator(3)] * 2))
    assert not torch.equal(draw_uniforms([request_generator(3)]), draw_uniforms([request_generator(4)]))
    for seed in (-1, 2**63, 1.0, True):
        with pytest.raises(ConfigError, match="seed"):
            request_generator(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(-0.1, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, float("nan"))],
)
def test_ranges(temperature: float, top_p: float) -> None:
    with pytest.raises(ConfigError):
        validate_sampling(temperature, top_p)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_same_tokens_on_the_gpu() -> None:
    logits = torch.randn(16, 32000, generator=torch.Generator().manual_seed(0)) * 3
    temperature, top_p = torch.linspace(0, 1.5, 16), torch.linspace(0.2, 1.0, 16)
    uniforms = draw_uniforms([request_generator(seed) for seed in range(16)])
    on_gpu = sample(logits.cuda(), temperature, top_p, uniforms)
    assert on_gpu.tolist() == sample(logits, temperature, top_p, uniforms).tolist()
