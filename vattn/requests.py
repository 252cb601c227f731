"""What goes into the engine and what comes out of it, and what a request has to be: plain data and its checks.

Whoever is given a request checks it here: the result is a copy in plain Python values, which its caller cannot change.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .errors import ConfigError

__all__ = [
    "Completion",
    "EngineStats",
    "Request",
    "Sampling",
    "StepToken",
    "checked_int",
    "checked_request",
    "checked_sampling",
    "checked_tokens",
]

_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence's tokens are chosen. Of equal logits, top-k and top-p keep all or none.

    A logit of NaN is never chosen unless all are (then token 0 is); one of -inf is never drawn unless all are.

    Attributes:
        temperature: what logits are divided by, as float32; 0, and what float32 rounds to 0, takes the largest logit,
            of equal ones that of the lowest token id.
        top_k: then keep the so many largest logits, and those equal to the last of them; 0 for all, 1 is greedy.
        top_p: then keep the fewest largest logits that hold this share of the rest's mass; 1 for all.
        seed: with the position it determines what is drawn, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it. ``submit`` copies it: later changes to what it was given have no effect.

    Token ids may be any integers, of Python, numpy or torch.

    Attributes:
        prompt_tokens: at least one token id; a 1-D array or tensor is fine.
        max_new_tokens: at least 1; the request ends with finish reason ``"length"`` when it has that many.
        temperature, top_p, seed: see ``Sampling``.
        stop_tokens: ids that end the request with finish reason ``"stop"``; the stop token is its last token.
        top_k: see ``Sampling``.
    """

    prompt_tokens: Sequence[int]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: Collection[int] = frozenset()
    top_k: int = 0

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


@dataclass(frozen=True)
class StepToken:
    """One new token; ``finish_reason`` is ``"stop"`` or ``"length"`` on a request's last, else None."""

    request_id: int
    token: int
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """What a request came to: its new tokens, and why it ended (``"stop"``, ``"length"`` or ``"cancelled"``)."""

    request_id: int
    tokens: tuple[int, ...]
    finish_reason: str


@dataclass
class EngineStats:
    """Counts and wall-clock seconds since the engine was made; a step counts until its tokens are on the host.

    Attributes:
        num_prefill_tokens: tokens computed in prefill steps, those recomputed after a preemption included.
        num_decode_tokens: tokens produced by decode steps (a request's first comes from its prefill).
        prefill_s, decode_s: seconds in those steps, mapping and sampling included.
        num_prefill_steps, num_decode_steps: steps of either kind.
        num_decode_rows: K and V rows that decode steps read, each once a step.
        num_preemptions: how often a running sequence gave its memory back to be recomputed later.
    """

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    num_decode_rows: int = 0
    num_preemptions: int = 0


def checked_request(request: Request, *, vocab_size: int) -> Request:
    """The request in plain values: ints, floats, a tuple of prompt tokens and a frozenset of stop tokens.

    Raises:
        ConfigError: it is no request, or a value of it is wrong whatever runs it.
    """
    if not isinstance(request, Request):
        raise ConfigError(f"expected a Request, as Request(prompt_tokens), got {request!r}")
    sampling = checked_sampling(request.sampling)
    if isinstance(request.prompt_tokens, Set):
        raise ConfigError(f"prompt_tokens must have an order, got {request.prompt_tokens!r}")
    prompt_tokens = checked_tokens("prompt_tokens", request.prompt_tokens, vocab_size)
    if not prompt_tokens:
        raise ConfigError("the prompt is empty; expected at least one token")
    return replace(
        request,
        prompt_tokens=prompt_tokens,
        max_new_tokens=checked_int("max_new_tokens", request.max_new_tokens, 1),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop_tokens=frozenset(checked_tokens("stop_tokens", request.stop_tokens, vocab_size)),
    )


def checked_sampling(sampling: Sampling) -> Sampling:
    """The same in plain values; ConfigError unless the temperature is finite in float32 and the rest in range."""
    if not isinstance(sampling, Sampling):
        raise ConfigError(f"sampling must be a vattn.decode.Sampling or None, got {sampling!r}")
    temperature, top_p = sampling.temperature, sampling.top_p
    if not _is_number(temperature) or not 0 <= temperature <= _FLOAT32_MAX:
        raise ConfigError(f"temperature must be a finite number >= 0 (0 is greedy), got {temperature!r}")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be in (0, 1] (1 keeps every token), got {top_p!r}")
    return Sampling(
        float(temperature),
        checked_int("top_k", sampling.top_k, 0, 2**31 - 1),
        float(top_p),
        checked_int("seed", sampling.seed, 0, 2**63 - 1),
    )


def checked_tokens(name: str, given: Iterable[Any], vocab_size: int) -> tuple[int, ...]:
    """Token ids as plain ints, from any collection of integers, a 1-D array or a 1-D tensor.

    Raises:
        ConfigError: these are no token ids, or one is not in the vocabulary.
    """
    wanted = f"{name} must be token ids, as [1, 2, 3]"
    if isinstance(given, (torch.Tensor, np.ndarray)):
        if given.ndim != 1:
            raise ConfigError(f"{wanted}, got a {type(given).__name__} of shape {tuple(given.shape)}")
        try:
            given = given.tolist()
        except (RuntimeError, NotImplementedError) as error:  # sparse, quantised, or without data
            raise ConfigError(f"{wanted}, got a tensor that has no plain values: {error}") from error
    elif isinstance(given, (str, bytes, bytearray)):
        raise ConfigError(f"{wanted}, got text: encode it with the model's tokenizer: {given!r}")
    elif isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ConfigError(f"{wanted}, got {given!r}")
    tokens = []
    for value in given:
        token = _as_int(value)
        if token is None:
            raise ConfigError(f"{wanted}, got {value!r} among them, a {type(value).__name__}")
        if not 0 <= token < vocab_size:
            raise ConfigError(f"{name}: {value!r} is not in the model's vocabulary of {vocab_size}")
        tokens.append(token)
    return tuple(tokens)


def checked_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """``value``, any integer but a boolean, as a plain int; ConfigError unless it is in range."""
    number = _as_int(value)
    if number is None or number < minimum or (maximum is not None and number > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise ConfigError(f"{name} must be an int of at least {minimum}{upper}, got {value!r}")
    return number


def _as_int(value: Any) -> int | None:
    """What is an integer of Python, numpy, torch, or says that it is one; None for anything else, booleans too."""
    if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)
    except Exception:  # whatever an object of the caller's raises
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
