"""Pieces of text as OpenAI's answers and chunks: of a chat, and of plain completions."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..requests import StepToken
from .generation import Choice, Generation, Piece

if TYPE_CHECKING:
    from ..models import Tokenizer

__all__ = ["ChatFormat", "CompletionFormat", "usage_of"]

_LEAST_LOGPROB = -9999.0  # in place of -inf, which JSON lacks


def usage_of(generation: Generation) -> dict[str, Any]:
    """So far."""
    num_prompt_tokens, num_tokens = generation.num_prompt_tokens, generation.num_tokens
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


def _number(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else _LEAST_LOGPROB


class _Format:
    """One response: its frame, and what its choices have become.

    Args:
        model: its name, as clients know it.
        tokenizer: for the texts of tokens.
        with_logprobs: whether the client wants those.
    """

    prefix, name, chunk_name = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer, with_logprobs: bool) -> None:
        self.tokenizer, self.with_logprobs = tokenizer, with_logprobs
        self.began_s = time.monotonic()
        self._frame = {"id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._pieces: dict[int, list[Piece]] = {}

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks that a piece is sent as."""
        raise NotImplementedError

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._frame | {"object": self.chunk_name, "choices": [], "usage": usage}

    def add(self, piece: Piece) -> None:
        """Keep a piece for ``answer``."""
        self._pieces.setdefault(piece.index, []).append(piece)

    def answer(self, choices: Iterable[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response."""
        found = [self._choice(choice, self._pieces.get(choice.index, [])) for choice in choices]
        return self._frame | {"object": self.name, "choices": found, "usage": usage}

    def _choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _text(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode(errors="replace")


class ChatFormat(_Format):
    prefix, name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer, with_logprobs: bool) -> None:
        super().__init__(model, tokenizer, with_logprobs)
        self._begun: set[int] = set()

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        deltas = piece.deltas or [{}]
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            deltas = [{"role": "assistant", "content": ""} | deltas[0], *deltas[1:]]
        chunks = []
        for number, delta in enumerate(deltas, 1):
            is_last = number == len(deltas)
            choice = {
                "index": piece.index,
                "delta": delta,
                "logprobs": self._logprobs(piece.tokens) if is_last else None,
                "finish_reason": piece.finish_reason if is_last else None,
            }
            chunks.append(self._frame | {"object": self.chunk_name, "choices": [choice]})
        return chunks

    def _choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, Any]:
        deltas = [delta for piece in pieces for delta in piece.deltas]
        text = "".join(delta.get("content") or "" for delta in deltas)
        calls: dict[int, dict[str, Any]] = {}
        for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
            call = calls.setdefault(part["index"], {"type": "function", "function": {"name": "", "arguments": ""}})
            if "id" in part:
                call["id"] = part["id"]
            for key, value in part.get("function", {}).items():
                call["function"][key] += value or ""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [calls[index] for index in sorted(calls)]}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs([token for piece in pieces for token in piece.tokens]),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: list[StepToken]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            self._entry(new.token, new.logprob) | {"top_logprobs": [self._entry(*each) for each in new.top_logprobs]}
            for new in tokens
            if new.token is not None
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        spelled = self.tokenizer.token_bytes(token)
        return {"token": spelled.decode(errors="replace"), "logprob": _number(logprob), "bytes": list(spelled)}


class CompletionFormat(_Format):
    prefix, name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, with_logprobs: bool) -> None:
        super().__init__(model, tokenizer, with_logprobs)
        self._offsets: dict[int, int] = {}

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        return [self._frame | {"object": self.chunk_name, "choices": [self._one(piece.index, [piece])]}]

    def _choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, Any]:
        return self._one(choice.index, pieces)

    def _one(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(delta["content"] for piece in pieces for delta in piece.deltas),
            "logprobs": self._logprobs(index, [token for piece in pieces for token in piece.tokens]),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, index: int, tokens: list[StepToken]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        texts = [self._text(new.token) for new in tokens if new.token is not None]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_number(new.logprob) for new in tokens],
            "top_logprobs": [
                {self._text(token): _number(logprob) for token, logprob in new.top_logprobs} for new in tokens
            ],
            "text_offset": offsets,
        }
