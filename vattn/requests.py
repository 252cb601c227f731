"""What goes into the engine and what comes out of it: plain data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Completion", "EngineStats", "Request", "StepToken"]


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        prompt_tokens: at least one token id.
        max_new_tokens: at least 1; the request ends with finish reason ``"length"`` when it has that many.
        temperature: 0 takes the most likely token, anything above samples.
        top_p: nucleus sampling; 1 keeps every token.
        seed: of this request's own random numbers, so its tokens do not depend on what else is in the batch.
        stop_tokens: ids that end the request with finish reason ``"stop"``; the stop token is its last token.
    """

    prompt_tokens: Sequence[int]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: Collection[int] = frozenset()


@dataclass(frozen=True)
class StepToken:
    """One new token; ``finish_reason`` is ``"stop"`` or ``"length"`` on a request's last, else None."""

    request_id: int
    token: int
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """What a request came to: its new tokens, and why it ended (``"stop"`` or ``"length"``)."""

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
