"""Text from tokens that arrive one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

__all__ = ["TextStream"]

# What a tokenizer puts in place of bytes that are not, or not yet, a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one: so many pending tokens are not an incomplete character.
_GARBAGE_TOKENS = 16
_KEPT_TOKENS = 8


class TextStream:
    """Incremental detokenisation in whole characters: the pieces joined equal ``decode`` of all tokens.

    A token may end in the middle of a character, and some tokenizers treat the first token of a text differently. So
    each piece is the difference between the latest tokens' text with and without the new ones. The work for a token is
    bounded, also for special tokens, which have no text, and for bytes that never become a character.

    Where the tokenizer is one of the package ``tokenizers``, its ``DecodeStream`` finds the pieces. It keeps all tokens
    since the last piece and decodes them again for every new one. So it gets no special tokens, and it is replaced by a
    new one when those tokens become many, or when a byte changes the text of bytes before it, which it refuses.

    Args:
        decode: token ids to text, without special tokens.
        special: ids that ``decode`` may leave out.
        backend: the ``tokenizers.Tokenizer`` that ``decode`` asks, if there is one.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], special: Collection[int] = (), backend: Any | None = None
    ) -> None:
        self._decode = decode
        self._special = special
        self._backend = backend
        self._fast: Any = None  # finds the pieces; None: ``decode`` does
        self._tokens: list[int] = []  # those of the last piece, which the next ones follow, and those not shown yet
        self._num_context = 0
        self._num_shown: int | None = None  # characters of these tokens' text; None: those of the context
        self._keep([])

    def push(self, token: int) -> str:
        """Text that ``token`` completes; empty while a character is incomplete."""
        if token in self._special and not self._decode([token]):
            return ""
        self._tokens.append(token)
        if piece := self._step(token):
            self._keep(self._tokens[self._num_context :])
            return piece
        if len(self._tokens) - self._num_context <= _GARBAGE_TOKENS:
            return ""
        # Only the last of these bytes can begin a character. Some of the first stay as context, because some decoders
        # replace a run of bytes as a whole.
        piece, tokens = self._rest().removesuffix(_REPLACEMENT), self._tokens
        self._tokens = tokens[: self._num_context + _KEPT_TOKENS] + tokens[-_KEPT_TOKENS:]
        self._num_shown = len(self._decode(self._tokens).removesuffix(_REPLACEMENT))
        self._fast = None
        return piece

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for an incomplete character."""
        piece, self._fast = self._rest(), None
        self._keep([])
        return piece

    def _step(self, token: int) -> str:
        if self._fast is not None:
            try:
                return self._fast.step(self._backend, token) or ""
            except Exception:  # tokenizers has no class for it
                self._fast = None
        piece = self._rest()
        return "" if piece.endswith(_REPLACEMENT) else piece

    def _rest(self) -> str:
        """The latest tokens' text that has not been shown."""
        if self._num_shown is None:
            self._num_shown = len(self._decode(self._tokens[: self._num_context]))
        return self._decode(self._tokens)[self._num_shown :]

    def _keep(self, context: list[int]) -> None:
        """All text is shown."""
        self._tokens, self._num_context, self._num_shown = context, len(context), None
        if self._backend is not None and self._fast is None:
            from tokenizers.decoders import DecodeStream

            self._fast = DecodeStream(ids=context, skip_special_tokens=True)
