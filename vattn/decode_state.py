"""What a decode loop keeps for each slot on the device, and what it asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from .attention import AttentionBackend, DecodeBatch
from .kv_cache import KVCache
from .ops.bundle import Ops

__all__ = ["DecodeModel", "DecodeState", "Sampling"]


class DecodeModel(Protocol):
    """What the loop asks of a model; ``vattn.models.FusedLlama`` is one."""

    ops: Ops

    @property
    def config(self) -> Any:
        """Has ``vocab_size``."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Positions that it can compute."""
        ...

    @property
    def num_heads(self) -> int:
        """Query heads."""
        ...

    def require_fit(self, cache: KVCache) -> None:
        """ConfigError unless the cache has this model's layers and heads, on its device."""
        ...

    @property
    def embedding(self) -> torch.Tensor:
        """``[vocab_size, hidden_size]``."""
        ...

    def decode(
        self, residual: torch.Tensor, batch: DecodeBatch, cache: KVCache, attention: AttentionBackend
    ) -> torch.Tensor:
        """Embeddings ``[batch, hidden_size]`` of one token each -> logits ``[batch, vocab_size]``; appends K and V."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence's tokens are chosen.

    Attributes:
        temperature: 0 takes the largest logit.
        top_k: keep the so many largest logits; 0 for all.
        top_p: then keep the fewest that hold this share of the mass.
        seed: with the position it determines what is drawn, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class DecodeState:
    """Per slot, on the device. Integers share one tensor, so that starting sequences is one small upload."""

    def __init__(self, max_slots: int, max_stop_tokens: int, device: torch.device) -> None:
        self.integers = torch.zeros(4, max_slots, dtype=torch.int32, device=device)
        self.tokens, self.lengths, self.remaining, self.top_k = self.integers
        self.floats = torch.zeros(2, max_slots, dtype=torch.float32, device=device)
        self.temperature, self.top_p = self.floats
        self.seeds = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self.stop_tokens = torch.full((max_slots, max_stop_tokens), -1, dtype=torch.int32, device=device)

    def start(
        self,
        upload: Callable[[np.ndarray], torch.Tensor],
        sequences: Sequence[tuple[int, int, int, Sampling | None, Sequence[int]]],
        rows: Sequence[int],
    ) -> None:
        """Write what new sequences begin with, on the current stream.

        Args:
            upload: brings an array to the device without waiting.
            sequences: (slot, token, max_new_tokens, sampling, stop_tokens).
            rows: that each has in the cache.
        """
        chosen = [sampling or Sampling() for *_, sampling, _ in sequences]
        stops = np.full((len(sequences), self.stop_tokens.shape[1]), -1, np.int32)
        for i, (*_, stop_tokens) in enumerate(sequences):
            stops[i, : len(stop_tokens)] = stop_tokens
        integers = [
            [token, n, max_new_tokens, choice.top_k]
            for (_, token, max_new_tokens, *_), n, choice in zip(sequences, rows, chosen, strict=True)
        ]
        index = upload(np.array([slot for slot, *_ in sequences], np.int64))
        self.integers[:, index] = upload(np.array(integers, np.int32)).T
        self.floats[:, index] = upload(np.array([[c.temperature, c.top_p] for c in chosen], np.float32)).T
        self.seeds[index] = upload(np.array([c.seed for c in chosen], np.int64))
        self.stop_tokens[index] = upload(stops)
