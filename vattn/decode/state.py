"""What a decode loop keeps for each slot on the device, and what it asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ..attention import AttentionBackend, DecodeBatch, bind, require_fit
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..ops.ops_table import Ops
from ..requests import MAX_LOGPROBS, Sampling, checked_int, checked_sampling, checked_tokens

__all__ = ["DecodeModel", "DecodeState", "DecodedToken", "Sampling", "Start", "bind_for"]


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
    """A new token of a slot, or its end without one.

    Attributes:
        slot: whose.
        token: its id; None where every token was forbidden or had a logit of NaN.
        finish_reason: ``"stop"``, ``"length"``, ``"error"`` without a token, or None while the sequence goes on.
        logprob: its log-probability, where ``num_logprobs`` asked for it.
        top_logprobs: (token, log-probability) of the likeliest tokens, likeliest first.
    """

    slot: int
    token: int | None
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """A sequence that starts to decode, or goes on.

    Attributes:
        slot: live in the cache; its ``seq_len`` rows are computed.
        token: the first to feed, not in the cache yet: the last of ``prompt_tokens`` and ``answer_tokens``.
        max_new_tokens: tokens to decode from here on.
        sampling: None for greedy.
        stop_tokens: end the sequence when one of these is sampled; it is still reported.
        prompt_tokens: for ``repetition_penalty``; otherwise not looked at.
        answer_tokens: those that the answer has already: for penalties, and for ``min_new_tokens``, which counts them.
        num_logprobs: report each token's log-probability and those of so many likeliest tokens; None for neither.
    """

    slot: int
    token: int
    max_new_tokens: int
    sampling: Sampling | None = None
    stop_tokens: Collection[int] = ()
    prompt_tokens: Sequence[int] = ()
    answer_tokens: Sequence[int] = ()
    num_logprobs: int | None = None

    def checked(self, *, vocab_size: int, max_stop_tokens: int) -> CheckedStart:
        """The same in plain values, which the caller cannot change.

        Raises:
            ConfigError: something is not what a sequence can start with.
        """
        sampling = checked_sampling(self.sampling, vocab_size=vocab_size)
        stops = tuple(dict.fromkeys(checked_tokens("stop_tokens", self.stop_tokens, vocab_size)))
        if len(stops) > max_stop_tokens:
            raise ConfigError(f"{len(stops)} stop tokens exceed {max_stop_tokens}; raise max_stop_tokens")
        logprobs, no_tokens = self.num_logprobs, np.empty(0, np.int64)
        return CheckedStart(
            checked_int("slot", self.slot, 0),
            checked_tokens("token", [self.token], vocab_size)[0],
            checked_int("max_new_tokens", self.max_new_tokens, 1),
            sampling,
            stops,
            _token_array("prompt_tokens", self.prompt_tokens, vocab_size) if sampling.has_penalties else no_tokens,
            _token_array("answer_tokens", self.answer_tokens, vocab_size),
            None if logprobs is None else checked_int("num_logprobs", logprobs, 0, min(MAX_LOGPROBS, vocab_size)),
        )


@dataclass(frozen=True, slots=True)
class CheckedStart:
    """``Start`` in plain values; the tokens of prompt and answer are int64 arrays."""

    slot: int
    token: int
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    prompt_tokens: np.ndarray
    answer_tokens: np.ndarray
    num_logprobs: int | None


def _token_array(name: str, given: Sequence[int], vocab_size: int) -> np.ndarray:
    """``checked_tokens`` for thousands of them."""
    try:
        array = np.array(given)
    except Exception:  # what an object of the caller's raises, or lengths that differ: named below
        array = np.empty(0, object)
    if array.ndim == 1 and array.dtype.kind in "iu" and ((array >= 0) & (array < vocab_size)).all():
        return array.astype(np.int64)
    return np.array(checked_tokens(name, given, vocab_size), np.int64)


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
        self, upload: Callable[[np.ndarray], torch.Tensor], starts: Sequence[CheckedStart], rows: Sequence[int]
    ) -> None:
        """Write what new sequences begin with, on the current stream.

        Args:
            upload: brings an array to the device without waiting.
            starts: checked.
            rows: that each has in the cache.
        """
        chosen = [start.sampling or Sampling() for start in starts]
        stops = np.full((len(starts), self.stop_tokens.shape[1]), -1, np.int32)
        for i, start in enumerate(starts):
            stops[i, : len(start.stop_tokens)] = tuple(start.stop_tokens)
        integers = [
            [start.token, n, start.max_new_tokens, choice.top_k]
            for start, n, choice in zip(starts, rows, chosen, strict=True)
        ]
        index = upload(np.array([start.slot for start in starts], np.int64))
        self.integers[:, index] = upload(np.array(integers, np.int32)).T
        self.floats[:, index] = upload(np.array([[c.temperature, c.top_p] for c in chosen], np.float32)).T
        self.seeds[index] = upload(np.array([c.seed for c in chosen], np.int64))
        self.stop_tokens[index] = upload(stops)


def bind_for(cache: KVCache, attention: AttentionBackend, graphs: str) -> AttentionBackend:
    """The decode half of a backend, ready to be launched; ConfigError where it cannot be over this cache."""
    attention = bind(attention)
    require_fit(attention, cache)
    for group in cache.layout.groups:
        if reason := attention.supports(cache.device, cache.layout.dtype, group.head_dim):
            raise ConfigError(f"attention {attention.name!r} {reason}")
    if graphs != "never" and attention.name in ("sdpa", "reference"):
        raise ConfigError(f"attention {attention.name!r} reads lengths on the host; pass graphs='never' or another one")
    return attention
