"""Choosing the next token in torch's operations, as the engine does; decode loops have a kernel for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import ConfigError

__all__ = ["draw_uniforms", "request_generator", "sample", "validate_sampling"]


_FLOAT32_MAX = 3.4028234663852886e38


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def validate_sampling(temperature: float, top_p: float) -> None:
    """ConfigError unless ``temperature`` is finite in float32 and not negative and ``0 < top_p <= 1``."""
    if not _is_number(temperature) or not 0 <= temperature <= _FLOAT32_MAX:
        raise ConfigError(f"temperature must be a finite number >= 0 (0 is greedy), got {temperature!r}")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1] (1 keeps every token), got {top_p!r}")


def request_generator(seed: int) -> torch.Generator:
    """A host generator for one request; on the host, so that a seed means the same on every device.

    Raises:
        ConfigError: a seed outside ``[0, 2 ** 63)``.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be an int of at least 0 and below 2**63, got {seed!r}")
    return torch.Generator("cpu").manual_seed(seed)


def draw_uniforms(generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One number in ``[0, 1)`` from each request's own generator: ``[batch]`` float64 on the host.

    All the randomness of a step, drawn apart from the batched arithmetic, so that what a request draws does not depend
    on which other requests share the batch.
    """
    return torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """The next token of each sequence, every row on its own.

    A row is drawn by inverting its cumulative distribution at its uniform number, over the tokens in descending
    probability (ties by token id). Top-p (nucleus) sampling keeps the smallest such prefix that holds at least
    ``top_p`` of the mass: Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020. The temperature
    is applied first. A row of temperature 0 takes its largest logit, the lowest token id among equals.

    Args:
        logits: ``[batch, vocab_size]``, any float dtype; computed in float32 or wider.
        temperature: ``[batch]`` float, >= 0.
        top_p: ``[batch]`` float, in (0, 1].
        uniforms: ``[batch]`` float64 in ``[0, 1)``; ignored where the temperature is 0.

    Returns:
        ``[batch]`` int64 on the logits' device.
    """
    tokens = logits.argmax(dim=-1)
    drawn = (temperature > 0).nonzero().flatten()
    if drawn.numel() == 0:  # a host decision: this is the eager reference
        return tokens
    rows = drawn.to(logits.device)
    scaled = logits[rows].to(torch.promote_types(logits.dtype, torch.float32))
    scaled = scaled - scaled.amax(dim=-1, keepdim=True)  # a tiny temperature must not make inf - inf
    scaled = scaled / temperature[drawn].to(scaled)[:, None]
    probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)

    # float64, or the rounding of a hundred thousand additions would move the cut
    cumulative = probabilities.double().cumsum(dim=-1)
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    limit = top_p[drawn].to(cumulative)[:, None]
    num_kept = ((before < limit) | (limit >= 1)).sum(dim=-1, keepdim=True)  # at 1 nothing is cut, whatever was rounded
    kept_mass = cumulative.gather(-1, num_kept - 1)
    target = uniforms[drawn].to(cumulative)[:, None] * kept_mass
    position = torch.searchsorted(cumulative, target, right=True).minimum(num_kept - 1)
    tokens[rows] = order.gather(-1, position).flatten()
    return tokens
