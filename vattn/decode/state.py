"""What a decode loop keeps for each slot on the device, and what it asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ..attention import AttentionBackend, DecodeBatch, bind, require_fit
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..ops.ops_table import Ops
from ..requests import Sampling, checked_int, checked_sampling, checked_tokens

__all__ = ["DecodeModel", "DecodeState", "DecodedToken", "Sampling", "as_sequence", "bind_for"]


@runtime_checkable
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
class DecodedToken:
    """A new token of a slot; ``finish_reason`` is ``"stop"``, ``"length"``, or None while it goes on."""

    slot: int
    token: int
    finish_reason: str | None = None


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
        sequences: Sequence[tuple[int, int, int, Sampling, Sequence[int]]],
        rows: Sequence[int],
    ) -> None:
        """Write what new sequences begin with, on the current stream.

        Args:
            upload: brings an array to the device without waiting.
            sequences: (slot, token, max_new_tokens, sampling, stop_tokens).
            rows: that each has in the cache.
        """
        chosen = [sampling for *_, sampling, _ in sequences]
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


def as_sequence(
    given: Any, *, vocab_size: int, max_stop_tokens: int
) -> tuple[int, int, int, Sampling, tuple[int, ...]]:
    """(slot, token, max_new_tokens, sampling, stop_tokens) in plain values, which the caller cannot change.

    Raises:
        ConfigError: it is not that many things, or one of them is not what a sequence can start with.
    """
    if not isinstance(given, Sequence) or len(given) != 5:
        raise ConfigError(f"a sequence is (slot, token, max_new_tokens, sampling, stop_tokens), got {given!r}")
    slot, token, max_new_tokens, sampling, stop_tokens = given
    stops = checked_tokens("stop_tokens", stop_tokens, vocab_size)
    if len(stops) > max_stop_tokens:
        raise ConfigError(f"{len(stops)} stop tokens exceed {max_stop_tokens}; raise max_stop_tokens")
    return (
        checked_int("slot", slot, 0),
        checked_tokens("token", [token], vocab_size)[0],
        checked_int("max_new_tokens", max_new_tokens, 1),
        Sampling() if sampling is None else checked_sampling(sampling),
        stops,
    )


def bind_for(cache: KVCache, attention: AttentionBackend, graphs: str) -> AttentionBackend:
    """The decode half of a backend, ready to be launched; ConfigError where it cannot be over this cache."""
    attention = bind(attention)
    require_fit(attention, cache, captured=graphs != "never")
    return attention
