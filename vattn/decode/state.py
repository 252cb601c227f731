"""What a decode loop keeps for each slot on the device, and what it asks of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ..attention import AttentionBackend, DecodeBatch, bind, require_fit
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..ops.ops_table import Ops
from ..ops.process_logits import ALLOWED, BIAS, IN_PROMPT, PENALTIES, STOPS, SamplerState
from ..ops.sample_tokens import MAX_TEMPERATURE
from ..requests import MAX_LOGIT_BIAS, MAX_LOGPROBS, Sampling, checked_int, checked_sampling, checked_tokens

__all__ = [
    "CheckedStart",
    "Compute",
    "DecodeModel",
    "DecodeState",
    "DecodedToken",
    "Sampling",
    "Start",
    "bind_for",
    "checked_mask",
    "features_of",
]

_INT32_MAX = 2**31 - 1

# (embeddings, batch, attention) -> logits, as a model's ``decode`` over the cache.
Compute = Callable[[torch.Tensor, DecodeBatch, AttentionBackend], torch.Tensor]


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
        token: its id; None where every token was forbidden or had a logit of NaN, or with an ``error``.
        finish_reason: ``"stop"``, ``"length"``, ``"error"`` without a token, or None while the sequence goes on.
        logprob: its log-probability, where ``num_logprobs`` asked for it.
        top_logprobs: (token, log-probability) of the likeliest tokens, likeliest first.
        error: what was raised where log-probabilities could not be computed, which ends a sequence that asked for them.
    """

    slot: int
    token: int | None
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: Exception | None = None


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
        array = given.detach().cpu().numpy().copy() if isinstance(given, torch.Tensor) else np.array(given)
    except Exception:  # what an object of the caller's raises, or lengths that differ: named below
        array = np.empty(0, object)
    if array.ndim == 1 and array.dtype.kind in "iu" and ((array >= 0) & (array < vocab_size)).all():
        return array.astype(np.int64)
    return np.array(checked_tokens(name, given, vocab_size), np.int64)


def checked_mask(mask: Any, vocab_size: int) -> np.ndarray:
    """Which tokens may come, as ``[ceil(vocab_size / 32)]`` int32, the first token in the lowest bit.

    Args:
        mask: that, or booleans ``[vocab_size]``, of numpy, torch, or in a list.

    Raises:
        ConfigError: it is neither, or allows nothing.
    """
    num_words = -(-vocab_size // 32)
    wanted = f"allowed tokens must be [{vocab_size}] booleans or [{num_words}] int32"
    try:
        array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    except Exception as error:  # what an object of the caller's raises
        raise ConfigError(f"{wanted}, got {mask!r}") from error
    bits = np.zeros(32 * num_words, bool)
    if array.dtype == bool and array.shape == (vocab_size,):
        bits[:vocab_size] = array
    elif array.dtype == np.int32 and array.shape == (num_words,):
        bits[:vocab_size] = np.unpackbits(array.astype("<i4").view(np.uint8), bitorder="little")[:vocab_size]
    else:
        raise ConfigError(f"{wanted}, got {array.dtype} of shape {list(array.shape)}")
    if not bits.any():
        raise ConfigError("allowed tokens allow nothing: end the sequence, or allow a stop token")
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


class DecodeState:
    """Per slot, on the device. Numbers of a type share one tensor, so that starting sequences is one small upload.

    Args:
        max_slots: of the cache.
        max_stop_tokens: of a sequence.
        vocab_size: of the model.
        device: of both.

    Attributes:
        tokens, lengths, remaining: ``[max_slots]`` int32: what each sequence feeds next, its rows in the cache, and how
            many tokens it may still get.
        sampler: how its tokens are chosen.
        num_logprobs: by slot, on the host, for those that asked.
        masked: slots of which ``allow`` lets only some tokens come.
    """

    def __init__(self, max_slots: int, max_stop_tokens: int, vocab_size: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.integers = zeros(6, max_slots, dtype=torch.int32)
        self.tokens, self.lengths, self.remaining, top_k, min_rows, flags = self.integers
        self.floats = zeros(6, max_slots, dtype=torch.float32)
        temperature, top_p, reach, repetition, presence, frequency = self.floats
        self.sampler = SamplerState(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            reach=reach,
            seeds=zeros(max_slots, dtype=torch.int64),
            flags=flags,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            counts=zeros(max_slots, vocab_size, dtype=torch.int16),
            bias_ids=torch.full((max_slots, MAX_LOGIT_BIAS), -1, dtype=torch.int32, device=device),
            bias_values=zeros(max_slots, MAX_LOGIT_BIAS, dtype=torch.float32),
            allowed=zeros(max_slots, -(-vocab_size // 32), dtype=torch.int32),
            stop_tokens=torch.full((max_slots, max_stop_tokens), -1, dtype=torch.int32, device=device),
            min_rows=min_rows,
        )
        self.num_logprobs: dict[int, int] = {}
        self.masked: set[int] = set()
        self._masks: dict[int, np.ndarray | None] = {}  # that the device is still to get

    @classmethod
    def bytes_per_slot(cls, max_stop_tokens: int, vocab_size: int) -> int:
        """What a slot takes of the device's memory."""
        one = cls(1, max_stop_tokens, vocab_size, torch.device("meta"))
        sampler = one.sampler
        tables = sampler.seeds, sampler.counts, sampler.bias_ids, sampler.bias_values, sampler.allowed
        return sum(each.nbytes for each in (one.integers, one.floats, *tables, sampler.stop_tokens))

    def start(
        self, upload: Callable[[np.ndarray], torch.Tensor], starts: Sequence[CheckedStart], rows: Sequence[int]
    ) -> None:
        """Write what new sequences begin with, on the current stream.

        Args:
            upload: brings an array to the device without waiting.
            starts: the sequences.
            rows: that each has in the cache.
        """
        sampler = self.sampler
        stops = np.full((len(starts), sampler.stop_tokens.shape[1]), -1, np.int32)
        integers = np.zeros((len(starts), len(self.integers)), np.int32)
        floats = np.zeros((len(starts), len(self.floats)), np.float32)
        for i, (start, n) in enumerate(zip(starts, rows, strict=True)):
            how = start.sampling
            stops[i, : len(start.stop_tokens)] = start.stop_tokens
            min_row = min(n + how.min_new_tokens - len(start.answer_tokens), _INT32_MAX)
            flags = PENALTIES * how.has_penalties + BIAS * bool(how.logit_bias)
            flags += STOPS * bool(min_row > n and start.stop_tokens)
            integers[i] = start.token, n, start.max_new_tokens, how.top_k, min_row, flags
            floats[i, :3] = how.temperature, how.top_p, _reach(how)
            floats[i, 3:] = how.repetition_penalty, how.presence_penalty, how.frequency_penalty
        index = upload(np.array([start.slot for start in starts], np.int64))
        self.integers[:, index] = upload(integers).T
        self.floats[:, index] = upload(floats).T
        sampler.seeds[index] = upload(np.array([start.sampling.seed for start in starts], np.int64))
        sampler.stop_tokens[index] = upload(stops)
        self._start_flagged(upload, starts)
        for start in starts:
            self._masks.pop(start.slot, None)
            self.masked.discard(start.slot)
            self.num_logprobs.pop(start.slot, None)
            if start.num_logprobs is not None:
                self.num_logprobs[start.slot] = start.num_logprobs

    def _start_flagged(self, upload: Callable[[np.ndarray], torch.Tensor], starts: Sequence[CheckedStart]) -> None:
        """The larger things, which few sequences have."""
        for start in starts:
            if start.sampling.has_penalties:
                answer = np.bincount(start.answer_tokens, minlength=self.vocab_size)
                counts = answer.clip(max=0x7FFF).astype(np.int16)
                counts[start.prompt_tokens] |= IN_PROMPT
                self.sampler.counts[start.slot] = upload(counts)
            if bias := start.sampling.logit_bias:
                ids = np.full(MAX_LOGIT_BIAS, -1, np.int32)
                values = np.zeros(MAX_LOGIT_BIAS, np.float32)
                ids[: len(bias)], values[: len(bias)] = list(bias), list(bias.values())
                self.sampler.bias_ids[start.slot] = upload(ids)
                self.sampler.bias_values[start.slot] = upload(values)

    def allow(self, slot: int, mask: Any) -> None:
        """Which tokens may come in the next steps of a sequence that was started; None for all.

        Raises:
            ConfigError: as ``checked_mask``.
        """
        self._masks[slot] = None if mask is None else checked_mask(mask, self.vocab_size)
        (self.masked.discard if mask is None else self.masked.add)(slot)

    def upload_allowed(self, upload: Callable[[np.ndarray], torch.Tensor]) -> None:
        """Write what ``allow`` was given, on the current stream."""
        masks, flags = self._masks, self.sampler.flags
        given = {slot: mask for slot, mask in masks.items() if mask is not None}
        if given:
            index = upload(np.array(list(given), np.int64))
            self.sampler.allowed[index] = upload(np.stack(list(given.values())))
            flags[index] |= ALLOWED
        if len(given) < len(masks):
            flags[upload(np.array([slot for slot in masks if masks[slot] is None], np.int64))] &= ~ALLOWED
        masks.clear()


def _reach(sampling: Sampling) -> float:
    """See ``SamplerState.reach``."""
    if sampling.min_p == 0:
        return math.inf
    return -min(sampling.temperature, MAX_TEMPERATURE) * math.log(sampling.min_p)


def features_of(model: Any) -> frozenset[str]:
    """What a model's attention needs beside windows: its ``attention_features``, where it has them."""
    return frozenset(getattr(model, "attention_features", ()))


def bind_for(model: DecodeModel, cache: KVCache, attention: AttentionBackend, graphs: str) -> AttentionBackend:
    """The decode half of a backend, ready to be launched; ConfigError where it cannot be over this cache."""
    attention = bind(attention)
    require_fit(attention, cache, captured=graphs != "never", features=features_of(model))
    return attention
