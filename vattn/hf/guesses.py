"""Whether the next tokens of a batch can be guessed, before transformers has chosen them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["Guesses"]

# A miss costs up to a step; a hit gains what the host takes between two steps, a tenth of a large model's step.
_MISS, _FIRST_CREDIT, _MOST_CREDIT = 8, 12, 32


class Guesses:
    """The likeliest tokens, but padding after the end of a sequence; worth it as long as few are wrong.

    Args:
        allowed: whether to guess at all.

    Attributes:
        num_hits, num_misses: steps whose tokens were guessed right, and wrong.
    """

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self.num_hits = self.num_misses = 0
        self.expect(False)

    def expect(self, greedy: bool, ends: Collection[int] = (), padding: int | None = None) -> None:
        """Say what the next tokens are like.

        Args:
            greedy: they are mostly the likeliest ones.
            ends, padding: tokens that end a sequence, and what it is fed afterwards.
        """
        self._credit = _FIRST_CREDIT if greedy and self._allowed else 0
        self._ends, self._padding = frozenset(ends), padding
        self._repeats: dict[int, int] = {}  # slots that are fed one token for ever, which is padding

    @property
    def are_worth_it(self) -> bool:
        """Whether a step should be launched with guessed tokens."""
        return self._credit > 0

    def stop(self) -> None:
        """No more of them until ``expect`` is called."""
        self._credit = 0

    def padded(self, slots: Sequence[int], given: Sequence[int]) -> dict[int, int]:
        """By slot, the next token of sequences that have ended; ``given`` are the newest tokens of all."""
        if self._padding is not None:
            self._repeats.update(
                {slot: self._padding for slot, each in zip(slots, given, strict=True) if each in self._ends}
            )
        return {slot: self._repeats[slot] for slot in slots if slot in self._repeats}

    def compare(self, slots: Sequence[int], guessed: Sequence[int | None], given: Sequence[int]) -> bool:
        """Whether the guessed tokens are those that transformers has chosen."""
        if list(guessed) == list(given):
            self.num_hits += 1
            self._credit = min(self._credit + 1, _MOST_CREDIT)
            return True
        self.num_misses += 1
        self._credit -= _MISS
        for slot, expected, token in zip(slots, guessed, given, strict=True):
            if expected != token:
                self._repeats.pop(slot, None)
        return False
