"""Text out of tokens that arrive one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection

__all__ = ["TextStream"]

# What a tokenizer puts in place of bytes that are not, or not yet, a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Pending tokens beyond which an incomplete character is none: it has four bytes at most, and a token has one or more.
_GARBAGE_TOKENS = 16
_KEPT_TOKENS = 8


class TextStream:
    """Incremental detokenisation in whole characters: the pieces joined equal ``decode`` of all tokens.

    A token may end in the middle of a character, and some tokenizers treat a text's first token differently, so each
    piece is the difference between decoding the latest tokens with and without the new ones. The work for a token is
    bounded, whatever comes: also for special tokens, which have no text, and for bytes that never become a character.

    Args:
        decode: token ids to text, without special tokens.
        special: ids that ``decode`` may leave out.
    """

    def __init__(self, decode: Callable[[list[int]], str], special: Collection[int] = ()) -> None:
        self._decode = decode
        self._special = special
        self._tokens: list[int] = []  # the latest: some as context for what follows, and those not shown yet
        self._num_context = 0
        self._num_shown = 0  # characters of the latest tokens' text

    def push(self, token: int) -> str:
        """Text that ``token`` completes; empty while a character is incomplete."""
        if token in self._special and not self._decode([token]):
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not text.endswith(_REPLACEMENT):
            piece = text[self._num_shown :]
            self._keep(self._tokens[self._num_context :])
            self._num_shown = len(self._decode(self._tokens))
            return piece
        if len(self._tokens) - self._num_context <= _GARBAGE_TOKENS:
            return ""
        # All but the last is no beginning of a character. The first of it stay as context, for decoders that replace a
        # run of bytes as a whole.
        piece = text[self._num_shown : -1]
        tokens = self._tokens
        self._tokens = tokens[: self._num_context + _KEPT_TOKENS] + tokens[-_KEPT_TOKENS:]
        self._num_shown = len(self._decode(self._tokens)) - 1
        return piece

    def finish(self) -> str:
        """What is left, an incomplete character as U+FFFD."""
        piece = self._decode(self._tokens)[self._num_shown :]
        self._keep([])
        self._num_shown = 0
        return piece

    def _keep(self, context: list[int]) -> None:
        self._tokens, self._num_context = context, len(context)
