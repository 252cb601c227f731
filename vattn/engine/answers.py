"""Completions in the making."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..requests import Completion, StepToken

__all__ = ["Answer", "Answers"]


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


class Answers:
    """To some requests, until each has ended.

    Attributes:
        pending: by request, samples that go on.
    """

    def __init__(self) -> None:
        self.pending: dict[int, int] = {}
        self._answers: dict[tuple[int, int], Answer] = {}  # by request and sample, in the order of the requests

    def expect(self, request_id: int, num_samples: int) -> None:
        """One more request."""
        self.pending[request_id] = num_samples
        self._answers.update(((request_id, index), Answer()) for index in range(num_samples))

    @property
    def request_ids(self) -> set[int]:
        """Of all these requests."""
        return {request_id for request_id, _ in self._answers}

    def expect_no_more(self, request_ids: Iterable[int]) -> None:
        """These were cancelled, whoever's they are."""
        for request_id in request_ids:
            self.pending.pop(request_id, None)

    def add(self, tokens: list[StepToken]) -> list[StepToken]:
        """Take the tokens of these requests. Returns those of others."""
        others = []
        for token in tokens:
            answer = self._answers.get((token.request_id, token.index))
            if answer is None:
                others.append(token)
                continue
            answer.add(token)
            self.pending[token.request_id] -= token.finish_reason is not None
            if not self.pending[token.request_id]:
                del self.pending[token.request_id]
        return others

    def completions(self) -> list[Completion]:
        """One of each sample, in the order of the requests."""
        return [answer.completion(*key) for key, answer in self._answers.items()]
