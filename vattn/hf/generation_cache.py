"""The cache that an accelerated ``generate`` hands to transformers' loop: no tensors, but which slots hold its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from ..arguments import require_int
from ..errors import ConfigError
from .captured_steps import CapturedSteps

__all__ = ["GenerationCache"]


class GenerationCache(Cache):
    """Sequences of one batch. Padding is counted and not kept.

    ``generate(..., return_dict_in_generate=True)`` returns it, and a later ``generate`` may go on with it. It is for
    the accelerated model, which computes its rows.

    Attributes:
        steps: compute its rows; None once these were given up.
        slots: of each row of the batch.
        padding: tokens on the left of each row that are no tokens.
        num_columns: tokens of each row, padding included.
    """

    def __init__(self, steps: CapturedSteps) -> None:
        super().__init__(layers=[])
        self.use(steps)
        self.slots: list[int] = []
        self.padding: list[int] = []
        self.num_columns = 0

    # -- vattn's own ---------------------------------------------------------------------------------------------
    def require_steps(self) -> CapturedSteps:
        """What computes its rows.

        Raises:
            ConfigError: they were given up.
        """
        if self.steps is None:
            raise ConfigError(
                "this cache's sequences are gone: accelerate() was restored, the model changed, or later calls needed "
                "the room (raise max_batch); generate from the whole text again"
            )
        return self.steps

    def use(self, steps: CapturedSteps) -> None:
        """Have these compute its rows, before there are any."""
        self.steps: CapturedSteps | None = steps
        steps.add(self)

    def begin(self, prompts: Sequence[Sequence[int]], padding: list[int]) -> torch.Tensor:
        """Take slots for a batch, as ``CapturedSteps.begin``, of prompts without their padding."""
        steps = self.require_steps()
        steps.make_room(len(prompts))
        self.slots, logits = steps.begin(prompts)
        self.padding, self.num_columns = padding, padding[0] + len(prompts[0])
        return logits

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append ``[batch, new]`` tokens to every row; returns the logits ``[batch, vocab_size]`` behind them."""
        steps = self.require_steps()
        with self._whole():
            if tokens.shape[1] == 1:
                logits = steps.step(self.slots, tokens[:, 0])
            else:
                logits = steps.extend(self.slots, tokens.tolist())
            self.num_columns += tokens.shape[1]
        return logits

    def give_up(self) -> None:
        """Free the slots; the cache cannot be used afterwards. Idempotent."""
        steps, slots = self.steps, self.slots
        self.steps, self.slots = None, []
        if steps is not None:
            steps.release(slots)

    def dynamic(self, config: Any) -> DynamicCache:
        """The same in a cache of transformers', for the model's own forward; the slots are freed.

        Args:
            config: of the model's decoder.
        """
        steps, other = self.require_steps(), DynamicCache(config=config)
        with torch.no_grad():
            for layer in steps.cache.layout.layers if self.num_columns else ():
                rows = [steps.kept(slot, layer) for slot in self.slots]
                k, v = (
                    torch.stack([_padded(row[which], self.num_columns) for row in rows]).transpose(1, 2)
                    for which in (0, 1)
                )
                other.update(k.contiguous(), v.contiguous(), layer)
        self.give_up()
        return other

    # -- transformers' interface ---------------------------------------------------------------------------------
    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Always ConfigError: the accelerated model does not call it."""
        raise ConfigError("a cache of accelerate() is for the accelerated model alone, within accelerate()")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row, padding included."""
        return self.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(tokens with the new ones, 0)."""
        return self.num_columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, no maximum: what is longer than ``accelerate``'s goes on in the model's own forward."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences in the batch, -1 before the first use."""
        return len(self.slots) or -1

    @property
    def is_compileable(self) -> bool:
        """Always False."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether it holds a batch."""
        return bool(self.slots)

    @property
    def is_linear(self) -> list[bool]:
        """False for one layer, as for all."""
        return [False]

    @property
    def is_sliding(self) -> list[bool]:
        """False for one layer, as for all: rows outside of a window are kept."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        """Always True."""
        return True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row ``i`` continue row ``beam_idx[i]``; rows with a common beginning share its whole pages."""
        self._regroup(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make every row ``repeats`` rows, neighbours in the batch."""
        repeats = require_int("repeats", repeats, 1)
        self._regroup([i for i in range(len(self.slots)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order: indices, or a mask over the batch."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._regroup(indices.tolist())

    def crop(self, tokens_to_remove: int = 0, max_length: int | None = None) -> None:
        """Remove the newest tokens of every row.

        Args:
            tokens_to_remove: minus their number. A positive number is the length to keep, where the installed
                transformers takes one.
            max_length: another name for the same.
        """
        number = int(tokens_to_remove if max_length is None else max_length)
        if number > 0:
            DynamicLayer().crop(number)  # transformers says whether a positive number is allowed
        columns = max(0, self.num_columns + number) if number <= 0 else min(self.num_columns, number)
        if self.slots and columns <= max(self.padding):
            raise ConfigError(
                f"cropped to {columns} tokens, a row would have none but its padding of {max(self.padding)}"
            )
        steps = self.require_steps()
        with self._whole():
            for slot, padding in zip(self.slots, self.padding, strict=True):
                if steps.rows(slot) > columns - padding:
                    steps.truncate(slot, columns - padding)
            self.num_columns = columns

    def reset(self) -> None:
        """Forget every token. Afterwards the batch may be of another size."""
        self.require_steps().release(self.slots)
        self.slots, self.padding, self.num_columns = [], [], 0

    def activate_past_recording(self) -> None:
        """Nothing: every row is kept in any case."""

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerationCache:
        """The same tokens in other slots, as for continuing one prompt in several ways; whole pages are shared."""
        steps = self.require_steps()
        steps.make_room(len(self.slots), keep=self)
        other = GenerationCache(steps)
        for slot in self.slots:
            other.slots.append(steps.fork(slot))
        other.padding, other.num_columns = list(self.padding), self.num_columns
        return other

    def __copy__(self) -> GenerationCache:
        return self.__deepcopy__({})

    def __reduce__(self) -> Any:
        raise ConfigError("a cache of accelerate() cannot be pickled; copy.deepcopy copies it within the process")

    def __repr__(self) -> str:
        return f"GenerationCache(batch_size={self.batch_size}, tokens={self.num_columns})"

    def _regroup(self, sources: list[int]) -> None:
        if not self.slots:
            return
        if not sources or any(not -len(self.slots) <= each < len(self.slots) for each in sources):
            raise ConfigError(f"expected rows of a batch of {len(self.slots)}, got {sources}")
        sources = [each % len(self.slots) for each in sources]
        if len(sources) > len(self.slots):
            self.require_steps().make_room(len(sources) - len(self.slots), keep=self)
        with self._whole():
            slots, self.slots = self.slots, []  # of which some are going to be others'
            self.slots = self.require_steps().regroup(slots, sources)
            self.padding = [self.padding[source] for source in sources]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is not done to the end leaves nothing to go on with."""
        try:
            yield
        except BaseException:
            self.give_up()
            raise


def _padded(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """``[rows, heads, head_dim]`` -> ``[columns, heads, head_dim]``, with zeros in front."""
    return torch.cat((rows.new_zeros(columns - len(rows), *rows.shape[1:]), rows))
