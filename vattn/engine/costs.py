"""What a sequence takes of memory, in whole pages. Pure arithmetic."""

from __future__ import annotations

from collections import Counter

from ..errors import ConfigError
from ..layout import KVLayout
from ..memory.page_sizes import PageSizes
from ..requests import Request

__all__ = ["SequenceCosts"]


class SequenceCosts:
    """Physical bytes of sequences by their rows.

    Args:
        layout: of the cache.
        page_bytes: size of its pages.
        over_read_tokens: rows past the end of a sequence that have pages too.
        max_page_bytes: size of its largest pages; None: all are of one size.
    """

    def __init__(
        self, layout: KVLayout, page_bytes: int, over_read_tokens: int = 0, max_page_bytes: int | None = None
    ) -> None:
        lanes = (lane for group in layout.groups for lane in layout.plan(group, 1, page_bytes).lanes)
        self._lanes = tuple(Counter(lane.row_bytes for lane in lanes).items())  # those alike are counted together
        self._page_bytes = page_bytes
        self._over_read_tokens = over_read_tokens
        self._sizes = PageSizes((max_page_bytes or page_bytes) // page_bytes)

    def bytes(self, rows: int) -> int:
        """Of a sequence of that many rows, the margin past its end included; 0 of one without rows."""
        if not rows:
            return 0
        rows, page_bytes = rows + self._over_read_tokens, self._page_bytes
        return sum(-(-rows * row_bytes // page_bytes) * num for row_bytes, num in self._lanes) * page_bytes

    def shared_bytes(self, rows: int) -> int:
        """Of pages that are full of the first so many rows, which forks share; the least that it may be, as a fork
        copies the rows of a large page that it cuts."""
        units = ((rows * row_bytes // self._page_bytes, num) for row_bytes, num in self._lanes)
        return sum((full - self._sizes.most_cut(full)) * num for full, num in units) * self._page_bytes

    def rows_within(self, num_bytes: int, most: int) -> int:
        """The longest sequence that fits, of ``most`` rows at most."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes(middle) <= num_bytes else (low, middle - 1)
        return low

    def require_room(self, request: Request, context: int, room_bytes: int, memory_limit: int) -> None:
        """Refuse what could not be held even alone.

        Args:
            request: checked.
            context: rows of a sequence at most.
            room_bytes: what sequences may take of ``memory_limit``.

        Raises:
            ConfigError: says what is too much.
        """
        num_prompt, num_new = len(request.prompt_tokens), request.max_new_tokens
        asked = f"a prompt of {num_prompt} tokens and {num_new} new ones"
        rows = num_prompt + num_new - 1  # the last new token is reported and never read
        if rows > context:
            raise ConfigError(f"{asked} exceed the context of {context} tokens")
        if (needed := self.bytes(rows)) > room_bytes:
            raise ConfigError(
                f"{asked} need {needed} bytes of memory, the limit is {memory_limit} bytes, of which the engine itself "
                f"takes {memory_limit - room_bytes}"
            )
