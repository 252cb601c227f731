"""The text of an answer as its tokens come, up to the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models import Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """New text for each token of one choice. Nothing that may become a stop string is handed out before it is sure.

    Where the answer holds a stop string, its text ends before it, wherever tokens begin and end: at the string that is
    complete first, of those that end together the longest.

    Args:
        tokenizer: of the model.
        stops: strings that end the text, none of them empty.
        skip_special: leave special tokens out; else their names are text, but for those that end an answer.

    Attributes:
        stopped: the stop string that was met; None so far. After it there is no more text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), skip_special: bool = True) -> None:
        self.stopped: str | None = None
        self._tokens = tokenizer.stream(skip_special)
        self._unseen = frozenset() if skip_special else tokenizer.stop_tokens
        self._stops = [_Search(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._held = ""  # a beginning of a stop string

    def push(self, token: int) -> str:
        """Text that is certain now; empty while a character or a stop string may be incomplete."""
        if self.stopped is not None or token in self._unseen:
            return ""
        return self._passed(self._tokens.push(token))

    def finish(self) -> str:
        """The rest of the text; U+FFFD stands for an incomplete character."""
        if self.stopped is not None:
            return ""
        piece = self._passed(self._tokens.finish())
        if self.stopped is None:
            piece, self._held = piece + self._held, ""
        return piece

    def _passed(self, piece: str) -> str:
        text = self._held + piece
        if not self._stops:
            return text
        for end, character in enumerate(piece, len(self._held) + 1):
            for stop in self._stops:
                if stop.push(character):
                    self.stopped, self._held = stop.text, ""
                    return text[: end - len(stop.text)]
        cut = len(text) - max(stop.num_matched for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]


class _Search:
    """Finds a string in characters that come one by one, in constant time for each (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.num_matched = text, 0
        # For each beginning of the text, how long the longest shorter beginning is that it ends with.
        self._shorter = [0] * len(text)
        for i in range(1, len(text)):
            self._shorter[i] = self._longer(self._shorter[i - 1], text[i])

    def push(self, character: str) -> bool:
        """True when it completes the string, after which nothing is to be pushed."""
        self.num_matched = self._longer(self.num_matched, character)
        return self.num_matched == len(self.text)

    def _longer(self, num_matched: int, character: str) -> int:
        while num_matched and self.text[num_matched] != character:
            num_matched = self._shorter[num_matched - 1]
        return num_matched + (self.text[num_matched] == character)
