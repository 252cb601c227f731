"""Sequences that arrive, for experiments on how many fit."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_SEQ_LEN = 32768
PROMPT = 4096  # tokens of the shared prompt
SHAPES = {  # layers, KV heads, head_dim
    "8B": (32, 8, 128),
    "1B": (16, 8, 64),
    "70B/8": (80, 1, 128),  # one of eight GPUs
}


def log_normal(rng: random.Random) -> int:
    """Tokens of a sequence: median 1,000, 99th percentile 16,000."""
    sigma = math.log(16) / 2.3263478740408408
    return max(1, min(round(1000 * math.exp(sigma * rng.gauss(0, 1))), MAX_SEQ_LEN - PROMPT))


@dataclass(frozen=True)
class Trace:
    """Arriving sequences: each the shared prompt's tokens, if any, and its own."""

    own_tokens: Callable[[random.Random], int]
    prompt_tokens: int = 0

    def arrivals(self, seed: int) -> Iterator[int]:
        """Tokens that each sequence has of its own."""
        rng = random.Random(seed)
        while True:
            yield self.own_tokens(rng)


TRACES = {
    "2048": Trace(lambda rng: 2048),
    "log-normal": Trace(log_normal),
    "shared": Trace(log_normal, PROMPT),
}
