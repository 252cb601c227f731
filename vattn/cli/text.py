"""Text of a user, a file or a model on its way to a terminal, without what a terminal would obey."""

from __future__ import annotations

import unicodedata

__all__ = ["one_line", "printable"]

# Control and format characters, halves of surrogate pairs, separators of lines and paragraphs: escape sequences,
# characters that reorder text, invisible tags.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Harmless ones: new lines, tabs, the soft hyphen, joiners of letters and emoji, visible number signs and verse ends.
_WANTED = frozenset("\n\t\u00ad\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")


def printable(text: str) -> str:
    """``text`` with U+FFFD for each character that acts on a terminal or cannot be seen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in _WANTED or unicodedata.category(char) not in _UNSEEN else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def one_line(text: object, width: int | None = None, tail: bool = False) -> str:
    """``printable`` text on one line, with single spaces for white space, cut to ``width`` characters.

    Args:
        tail: keep the end rather than the beginning.
    """
    flat = printable(" ".join(str(text).split()))
    if width is None or len(flat) <= width:
        return flat
    return "…" + flat[-width + 1 :] if tail else flat[: width - 1] + "…"
