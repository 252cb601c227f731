"""Text of a user, a file or a model on its way to a terminal, which would obey some of it."""

from __future__ import annotations

import unicodedata

__all__ = ["one_line", "printable"]

# Control and format characters, halves of surrogate pairs, separators of lines and paragraphs. Among them are escape
# sequences, characters that reorder what is read, and tags that nobody sees.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Of those: new lines and tabs; the soft hyphen and the joiners of letters and emoji; number signs and verse ends, seen.
_WANTED = frozenset("\n\t\u00ad\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")


def printable(text: str) -> str:
    """``text`` with U+FFFD for each character that would act on a terminal, or hide, instead of being seen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in _WANTED or unicodedata.category(char) not in _UNSEEN else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def one_line(text: object, width: int | None = None, tail: bool = False) -> str:
    """The ``printable`` text of anything with single spaces for white space, cut to ``width`` characters.

    Args:
        tail: keep the end rather than the beginning.
    """
    flat = printable(" ".join(str(text).split()))
    if width is None or len(flat) <= width:
        return flat
    return "…" + flat[-width + 1 :] if tail else flat[: width - 1] + "…"
