"""Completions in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..requests import Completion, StepToken

__all__ = ["Answer"]


@dataclass
class Answer:
    """What a sample has come to so far."""

    tokens: list[StepToken] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None

    def add(self, token: StepToken) -> None:
        """One more token, or its end."""
        if token.token is not None:
            self.tokens.append(token)
        self.finish_reason, self.error = token.finish_reason, token.error

    def completion(self, request_id: int, index: int) -> Completion:
        """Of a sample that has ended, by itself or cancelled."""
        logprobs = [token for token in self.tokens if token.logprob is not None]
        return Completion(
            request_id,
            index,
            tuple(token.token for token in self.tokens if token.token is not None),
            self.finish_reason or "cancelled",
            tuple(token.logprob for token in logprobs if token.logprob is not None),
            tuple(token.top_logprobs for token in logprobs),
            self.error,
        )
