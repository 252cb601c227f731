"""What goes into the engine and what comes out of it, and what a request has to be: plain data and its checks.

Whoever is given a request checks it here: the result is a copy in plain Python values, which its caller cannot change.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .arguments import shown
from .errors import ConfigError

__all__ = [
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "Completion",
    "Request",
    "Sampling",
    "StepToken",
    "checked_int",
    "checked_number",
    "checked_request",
    "checked_sampling",
    "checked_tokens",
]

_FLOAT32_MAX = 3.4028234663852886e38
MAX_LOGIT_BIAS = 300  # tokens of a request
MAX_LOGPROBS = 20
MAX_SAMPLES = 1024  # of a request


@dataclass(frozen=True)
class Sampling:
    """How a sequence's tokens are chosen: penalties and biases, then temperature, then the filters, then a draw.

    The filters keep or drop equal logits together. A logit of NaN is never chosen, and one of -inf only where nothing
    else is left. Where every logit is NaN or forbidden, the sequence ends with finish reason ``"error"``.

    Attributes:
        temperature: divides the logits, as float32. 0, and what float32 rounds to 0, takes the largest logit, of equal
            ones that of the lowest token id.
        top_k: keeps the so many largest logits; 0 keeps all, 1 is greedy.
        min_p: keeps the tokens that are at least this share as likely as the likeliest; 0 keeps all.
        top_p: keeps the fewest largest logits that hold this share of the probability that is left then; 1 keeps all.
        seed: determines, with the position, what is drawn, whatever else is in the batch. Equal requests of equal
            seeds get equal answers: draw a seed of your own for variety.
        repetition_penalty: divides positive logits of tokens of prompt and answer, and multiplies negative ones; 1 for
            none (Keskar et al. 2019).
        presence_penalty: is subtracted once from the logit of every token of the answer so far.
        frequency_penalty: is subtracted from a token's logit for each time that the answer so far has it.
        logit_bias: token id -> what is added to its logit, -inf to forbid it; at most 300 tokens.
        min_new_tokens: stop tokens are not chosen before the answer has so many tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_new_tokens: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes what comes."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def for_sample(self, index: int) -> Sampling:
        """Of sample ``index`` of a request: the first draws from the seed, every other from a seed derived from it."""
        if index == 0:
            return self
        # SplitMix64 (Steele et al., OOPSLA 2014): neighbouring seeds and indices come apart.
        mixed = (self.seed + index * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return replace(self, seed=(mixed ^ (mixed >> 31)) >> 1)


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it. ``submit`` copies it: later changes to what it was given have no effect.

    Token ids may be any integers, of Python, numpy or torch.

    Attributes:
        prompt_tokens: at least one token id; a 1-D array or tensor is fine.
        max_new_tokens: at least 1; the request ends with finish reason ``"length"`` when it has that many.
        sampling: how its tokens are chosen; None for greedy.
        stop_tokens: ids that end the request with finish reason ``"stop"``; the stop token is its last token.
        num_logprobs: report each token's log-probability and those of so many likeliest tokens, 0 to 20; None for
            neither. They are of the model's own distribution, before penalties, temperature and filters.
        n: independent samples of the same prompt, which is computed once; at most 1,024. The first draws from the seed,
            each other one from a seed derived from it.
        priority: a higher one gets a slot first; it does not interrupt those that run. Ten seconds of waiting count as
            one level.
        deadline_s: seconds after ``submit`` at which it ends with finish reason ``"deadline"``; None for never.
        allowed_tokens: for grammars; called before each token with the answer so far, it returns which tokens may
            come: booleans ``[vocab_size]``, or 32 of them to an int32, the first lowest, ``[ceil(vocab_size / 32)]``;
            None for all.
            Its sequence then decodes every other step: the next token waits for the last one to be known.
        cache_salt: whose prompts the request may share computed rows with: those of requests with the same salt, and of
            no others. A secret one for each tenant hides from the others, in time too, what it has asked before.
    """

    prompt_tokens: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling | None = None
    stop_tokens: Collection[int] = ()
    num_logprobs: int | None = None
    n: int = 1
    priority: int = 0
    deadline_s: float | None = None
    allowed_tokens: Callable[[Sequence[int]], Any] | None = None
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class StepToken:
    """One new token of one sample of a request, or its end without one.

    Attributes:
        request_id: what ``submit`` returned.
        index: which of the request's ``n`` samples.
        token: its id; None where the sample ended without one (``"deadline"``, ``"error"``).
        logprob: its log-probability, where ``num_logprobs`` asked for it.
        top_logprobs: (token, log-probability) of the likeliest tokens, likeliest first.
        finish_reason: None while the sample goes on; ``"stop"``, ``"length"``, ``"deadline"`` or ``"error"``.
        error: what was raised, with ``"error"``.
        num_cached: tokens of the prompt that the sample did not compute, as their rows were there: stored, of another
            request, or of the first of its own request's samples.
    """

    request_id: int
    index: int
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    error: BaseException | None = None
    num_cached: int = 0


@dataclass(frozen=True)
class Completion:
    """What a sample of a request came to.

    Attributes:
        request_id, index: which request, and which of its samples.
        tokens: the new ones, a stop token included.
        finish_reason: ``"stop"``, ``"length"``, ``"cancelled"``, ``"deadline"`` or ``"error"``.
        logprobs, top_logprobs: of each token, where ``num_logprobs`` asked for them.
        error: what was raised, with ``"error"``.
    """

    request_id: int
    index: int
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    error: BaseException | None = None


def checked_request(request: Request, *, vocab_size: int, max_stop_tokens: int | None = None) -> Request:
    """The request in plain values: ints, floats, tuples and a ``Sampling``.

    Raises:
        ConfigError: it is no request, or a value of it is wrong whatever runs it.
    """
    if not isinstance(request, Request):
        raise ConfigError(f"expected a Request, as Request(prompt_tokens), got {shown(request)}")
    if isinstance(request.prompt_tokens, Set):
        raise ConfigError(f"prompt_tokens must have an order, got {shown(request.prompt_tokens)}")
    prompt_tokens = checked_tokens("prompt_tokens", request.prompt_tokens, vocab_size)
    if not prompt_tokens:
        raise ConfigError("the prompt is empty; expected at least one token")
    sampling = checked_sampling(request.sampling, vocab_size=vocab_size)
    max_new_tokens = checked_int("max_new_tokens", request.max_new_tokens, 1, 2**31 - 1)
    if sampling.min_new_tokens > max_new_tokens:
        raise ConfigError(f"min_new_tokens {sampling.min_new_tokens} exceeds max_new_tokens {max_new_tokens}")
    allowed = request.allowed_tokens
    if allowed is not None and not callable(allowed):
        raise ConfigError(f"allowed_tokens must be a function of the answer so far, got {shown(allowed)}")
    stop_tokens = tuple(dict.fromkeys(checked_tokens("stop_tokens", request.stop_tokens, vocab_size)))
    if max_stop_tokens is not None and len(stop_tokens) > max_stop_tokens:
        raise ConfigError(f"{len(stop_tokens)} stop tokens are more than the {max_stop_tokens} accepted")
    salt = request.cache_salt
    if salt is not None and not isinstance(salt, str):
        raise ConfigError(f"cache_salt must be a string or None, got {shown(salt)}")
    logprobs = request.num_logprobs
    deadline = request.deadline_s
    return replace(
        request,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        num_logprobs=None
        if logprobs is None
        else checked_int("num_logprobs", logprobs, 0, min(MAX_LOGPROBS, vocab_size)),
        n=checked_int("n", request.n, 1, MAX_SAMPLES),
        priority=checked_int("priority", request.priority, -(2**31), 2**31 - 1),
        deadline_s=None if deadline is None else checked_number("deadline_s", deadline, 0),
        cache_salt=None if salt is None else str(salt),
    )


def checked_sampling(sampling: Sampling | None, *, vocab_size: int) -> Sampling:
    """The same in plain values, greedy for None.

    Raises:
        ConfigError: a value is out of range; names it and what would be accepted.
    """
    if sampling is None:
        return Sampling()
    if not isinstance(sampling, Sampling):
        raise ConfigError(f"sampling must be a vattn.Sampling or None, got {shown(sampling)}")
    if not isinstance(sampling.logit_bias, Mapping):
        raise ConfigError(f"logit_bias must map token ids to numbers, as {{5: -1.0}}, got {shown(sampling.logit_bias)}")
    try:
        given = dict(sampling.logit_bias)
    except Exception as error:  # whatever a mapping of the caller's raises
        raise ConfigError(f"reading logit_bias raised {type(error).__name__}: {error}") from error
    biased = checked_tokens("the keys of logit_bias", list(given), vocab_size)
    if len(biased) > MAX_LOGIT_BIAS:
        raise ConfigError(f"logit_bias has {len(biased)} tokens; at most {MAX_LOGIT_BIAS} are accepted")
    if len(set(biased)) < len(biased):
        raise ConfigError(f"logit_bias names a token twice: {shown(biased)}")
    bias = {}
    for token, value in zip(biased, given.values(), strict=True):
        forbidden = _is_number(value) and value == -math.inf
        bias[token] = (
            -math.inf if forbidden else checked_number(f"logit_bias of token {token} (-inf forbids it)", value)
        )
    return Sampling(
        temperature=checked_number("temperature", sampling.temperature, 0),
        top_k=checked_int("top_k", sampling.top_k, 0, 2**31 - 1),
        top_p=checked_number("top_p", sampling.top_p, 0, 1, excluded=0),
        min_p=checked_number("min_p", sampling.min_p, 0, 1),
        seed=checked_int("seed", sampling.seed, 0, 2**63 - 1),
        repetition_penalty=checked_number("repetition_penalty", sampling.repetition_penalty, 0, excluded=0),
        presence_penalty=checked_number("presence_penalty", sampling.presence_penalty),
        frequency_penalty=checked_number("frequency_penalty", sampling.frequency_penalty),
        logit_bias=bias,
        min_new_tokens=checked_int("min_new_tokens", sampling.min_new_tokens, 0),
    )


def checked_number(
    name: str,
    value: Any,
    minimum: float = -_FLOAT32_MAX,
    maximum: float = _FLOAT32_MAX,
    *,
    excluded: float | None = None,
) -> float:
    """``value`` as a float; ConfigError unless it is a number in that range, and not the excluded one."""
    if not _is_number(value) or not minimum <= value <= maximum or value == excluded:
        wanted = f"above {minimum:g}" if excluded == minimum else f"of at least {minimum:g}"
        upper = "" if maximum == _FLOAT32_MAX else f" and at most {maximum:g}"
        plain = "a finite number" if minimum == -_FLOAT32_MAX else f"a finite number {wanted}{upper}"
        raise ConfigError(f"{name} must be {plain}, got {shown(value)}")
    return float(value)


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
        raise ConfigError(f"{wanted}, got text: encode it with the model's tokenizer: {shown(given)}")
    elif isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ConfigError(f"{wanted}, got {shown(given)}")
    tokens = []
    try:
        given = list(given)
    except Exception as error:  # whatever an iterator of the caller's raises
        raise ConfigError(f"{wanted}; reading them raised {type(error).__name__}: {error}") from error
    if set(map(type, given)) == {int} and min(given) >= 0 and max(given) < vocab_size:  # as most are
        return tuple(given)
    for value in given:
        token = _as_int(value)
        if token is None:
            raise ConfigError(f"{wanted}, got {shown(value)} among them, a {type(value).__name__}")
        if not 0 <= token < vocab_size:
            raise ConfigError(f"{name}: {shown(value)} is not in the model's vocabulary of {vocab_size}")
        tokens.append(token)
    return tuple(tokens)


def checked_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """``value``, any integer but a boolean, as a plain int; ConfigError unless it is in range."""
    number = _as_int(value)
    if number is None or number < minimum or (maximum is not None and number > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise ConfigError(f"{name} must be an int of at least {minimum}{upper}, got {shown(value)}")
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
