"""Which words of a graph's nodes are addresses within its inputs: told by two captures with the inputs elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Pointer", "Span", "compare"]


@dataclass(frozen=True, slots=True)
class Span:
    """Memory of an input: its first address, and its bytes."""

    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Pointer:
    """A word that is an address within an input.

    Attributes:
        offset: of the word in its node's values, in bytes.
        number: of the input.
        distance: bytes from the input's first address. None: the word lies in the input in the later capture, and is
            another one in the earlier capture, but not by the distance that the input moved. What it is is unknown.
    """

    offset: int
    number: int
    distance: int | None


def compare(earlier: bytes, later: bytes, before: Sequence[Span], after: Sequence[Span]) -> list[Pointer]:
    """The pointers among the words of one node, which are 8 bytes long and begin at multiples of 4.

    A word that is the same in both captures is no pointer, wherever it would point to: the inputs have moved.

    Args:
        earlier, later: what the node holds in each capture, equally long.
        before, after: where each input was in each capture. No two of these overlap, and none is where it was.
    """
    found: dict[int, Pointer] = {}
    for first in (0, 4):
        for at, one, other in _changed(earlier, later, first):
            if at - 4 in found or at + 4 in found:
                continue
            for number, (old, new) in enumerate(zip(before, after, strict=True)):
                if new.start <= other < new.start + new.nbytes:
                    moved = one - old.start == other - new.start
                    found[at] = Pointer(at, number, other - new.start if moved else None)
    return [found[at] for at in sorted(found)]


def _changed(earlier: bytes, later: bytes, first: int) -> Iterator[tuple[int, int, int]]:
    """Offset, earlier and later value of each word that differs."""
    count = (len(later) - first) // 8
    if count < 1:
        return
    one, other = (np.frombuffer(values, "<u8", count, first) for values in (earlier, later))
    for place in np.flatnonzero(one != other):
        yield first + 8 * int(place), int(one[place]), int(other[place])
