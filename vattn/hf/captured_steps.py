"""A model's sequences for transformers' generate loop: prompts in packed passes, then one captured step after another.

transformers chooses every token itself, from the logits that a step returns. On a GPU the next step need not wait for
that. Mostly the next token is going to be the likeliest one, which the device knows first. So a step with it is
launched at once, and runs while transformers looks at the logits of the step before. When transformers comes with its
tokens they are compared. Where they differ, the step ahead is taken back and another one launched.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..decode import Start
from ..decode.graphs import GraphReport
from ..engine.opening import BUDGETS, attention_for_prompts, decode_loop, opened_cache
from ..engine.prefill import Chunk, PrefillPasses, RuntimeModel
from ..errors import OutOfPages, OutOfSlots
from ..interrupts import Uninterrupted
from ..memory.tensors import upload
from .guesses import Guesses

__all__ = ["CapturedSteps"]

_PASS_TOKENS = 4096  # of prompts; more make a pass hardly faster, and its intermediate results take memory


@dataclass(frozen=True)
class _Launched:
    """A step: its slots, its logits ``[sequences, vocab_size]``, and an event behind them (None on the CPU)."""

    slots: list[int]
    logits: torch.Tensor
    event: torch.cuda.Event | None
    tokens: Sequence[int | None] = ()  # that it was given, where it was launched ahead


class SlotOwner(Protocol):
    """Who has sequences here."""

    slots: list[int]

    def give_up(self) -> None:
        """Release them, for good."""
        ...


class CapturedSteps:
    """Opens a cache and a decode loop for a model. For one thread at a time.

    Args:
        model: computes passes and steps.
        max_batch: sequences of a step.
        memory_limit: bytes, of the cache.
        run_ahead: whether steps may be launched before their tokens are known.

    Attributes:
        cache: with a slot for each sequence of two batches, so that the sequences of one may outlast the next.
        guesses: which steps may be launched ahead, and how that went.

    Raises:
        ConfigError: the model does not fit.
    """

    def __init__(self, model: RuntimeModel, max_batch: int, memory_limit: int | None, run_ahead: bool) -> None:
        self.model, self.max_batch = model, max_batch
        # A margin behind every sequence would take more memory than faster attention over prompts is worth here.
        self.cache = opened_cache(model, None, 2 * max_batch, memory_limit, max_over_read=0)
        try:
            graphs = "first use" if model.device.type == "cuda" else "never"
            self._loop = decode_loop(model, self.cache, None, max_batch, graphs)
        except BaseException:
            self.cache.close()
            raise
        self._budget = min(BUDGETS[model.device.type][1], _PASS_TOKENS)
        prompts = attention_for_prompts(model, self.cache, self._budget)
        self._passes = PrefillPasses(model, self.cache, prompts, self._loop.stream, self._loop.own_slot)
        self._owners: weakref.WeakValueDictionary[int, SlotOwner] = weakref.WeakValueDictionary()  # oldest first
        self._numbers = itertools.count()
        self._rows: dict[int, int] = {}  # of each slot, the step ahead not counted
        self.guesses = Guesses(run_ahead)
        self._ahead: _Launched | None = None

    @property
    def max_seq_len(self) -> int:
        """Rows of a sequence."""
        return self._loop.max_seq_len

    @property
    def graphs(self) -> tuple[GraphReport, ...]:
        """What was captured so far, by batch size."""
        return tuple(report for report in self._loop.graphs if report.captured)

    def rows(self, slot: int) -> int:
        """Tokens of a slot whose K and V are computed."""
        return self._rows[slot]

    # -- tokens --------------------------------------------------------------------------------------------------
    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], torch.Tensor]:
        """Slots for new sequences, and the logits ``[sequences, vocab_size]`` behind their last tokens.

        Prompts that are equal are computed once.

        Raises:
            OutOfSlots, OutOfPages: there is no room; nothing has changed.
        """
        slots: list[int] = []
        first: dict[tuple[int, ...], int] = {}
        try:
            for prompt in prompts:
                first.setdefault(tuple(prompt), len(slots))
                with Uninterrupted():
                    slots.append(self.cache.acquire())
                    self._rows[slots[-1]] = 0
            unique = list(first.values())
            self._compute([slots[i] for i in unique], [prompts[i][:-1] for i in unique])
            with torch.cuda.stream(self._loop.stream):
                for i, prompt in enumerate(prompts):
                    if (source := slots[first[tuple(prompt)]]) != slots[i]:
                        with Uninterrupted():
                            del self._rows[slots[i]]
                            self.cache.release(slots[i])
                            self.cache.fork(source, into=slots[i])
                            self._rows[slots[i]] = self._rows[source]
            return slots, self._decode(slots, [prompt[-1] for prompt in prompts])
        except BaseException:
            self.release(slots)
            raise

    def extend(self, slots: list[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append several tokens to each sequence; returns the logits behind the last ones."""
        self._stop(slots)
        self._compute(slots, [each[:-1] for each in tokens])
        return self._decode(slots, [each[-1] for each in tokens])

    def step(self, slots: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to each sequence.

        Args:
            slots: at most ``max_batch``, each with fewer than ``max_seq_len`` rows.
            tokens: ``[sequences]`` on the device.

        Returns:
            ``[sequences, vocab_size]``, a tensor of its own, ready on the current stream.
        """
        given: list[int] | None = tokens.tolist() if self.guesses.are_worth_it or self._ahead is not None else None
        ahead = self._ahead
        if ahead is not None and given is not None:
            if ahead.slots == slots and self.guesses.compare(slots, ahead.tokens, given):
                self._ahead = None
                self._count(slots)
                self._run_ahead(slots, given)
                return self._handed_over(ahead)
            self._stop(slots)
        self._loop.drain()  # what ends a sequence there, a NaN, is to be known before its next step
        if set(self._loop.slots).issuperset(slots):
            self._loop.feed(slots, tokens)
            return self._launch_and_more(slots, given)
        return self._decode(slots, tokens.tolist() if given is None else given)

    # -- sequences -----------------------------------------------------------------------------------------------
    def regroup(self, slots: list[int], sources: Sequence[int]) -> list[int]:
        """Sequence ``i`` becomes what sequence ``sources[i]`` was; there may be more of them, or fewer.

        Those that go on keep their slots. Further copies of one share its whole pages.

        Returns:
            The slots of the new sequences.

        Raises:
            OutOfSlots, OutOfPages: there is no room. Sequences that do not go on are released already.
        """
        self._stop([slots[i] for i in set(sources) if sources.count(i) > 1])
        self.release([slot for i, slot in enumerate(slots) if i not in set(sources)])
        taken: set[int] = set()
        found: list[int] = []
        for source in sources:
            found.append(self.fork(slots[source]) if source in taken else slots[source])
            taken.add(source)
        return found

    def fork(self, slot: int) -> int:
        """Another sequence of the same tokens."""
        self._stop([slot])
        with Uninterrupted(), torch.cuda.stream(self._loop.stream):
            try:
                child = self.cache.fork(slot)
            except OutOfSlots as error:
                raise OutOfSlots("no room for another sequence: raise accelerate's max_batch") from error
            self._rows[child] = self._rows[slot]
        return child

    def truncate(self, slot: int, rows: int) -> None:
        """Forget a sequence's newest tokens."""
        self._stop([slot])
        with torch.cuda.stream(self._loop.stream):
            self.cache.truncate(slot, rows)
        self._rows[slot] = rows

    def release(self, slots: Sequence[int]) -> None:
        """End sequences; work that may still be under way keeps their pages."""
        if self._ahead is not None and set(slots) & set(self._ahead.slots):
            self._take_back()
        for slot in slots:
            with Uninterrupted():
                if self._rows.pop(slot, None) is not None:
                    self._loop.release(slot)

    def add(self, owner: SlotOwner) -> None:
        """Note who has slots: once nobody has the owner any more, they are free."""
        self._owners[next(self._numbers)] = owner

    def make_room(self, count: int, keep: SlotOwner | None = None) -> None:
        """Have so many free slots; where that takes slots of owners, those that came first give theirs up.

        Args:
            keep: an owner that does not.
        """
        owners = list(self._owners.values())
        owned = {slot for owner in owners for slot in owner.slots}
        self.release([slot for slot in self._rows if slot not in owned])
        for owner in owners:
            if self.cache.max_slots - 1 - len(self._rows) >= count:
                break
            if owner.slots and owner is not keep:
                owner.give_up()

    def kept(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, ``[rows, num_kv_heads, head_dim]``, views that are ready on the current stream."""
        self._stop([slot])
        if self._loop.stream is not None:
            torch.cuda.current_stream(self.cache.device).wait_stream(self._loop.stream)
        return self.cache.rows(slot, layer)

    def close(self) -> None:
        """Free everything, and have every owner give up its slots. Idempotent."""
        for owner in list(self._owners.values()):
            owner.give_up()
        self._loop.close()
        self._rows.clear()
        self.cache.close()

    # -- inside --------------------------------------------------------------------------------------------------
    def _stop(self, slots: Sequence[int]) -> None:
        """Leave these slots with exactly the rows of their tokens, out of the loop's hands."""
        if self._ahead is not None:
            self._take_back()
        self._loop.drain()  # what is not reported would be cut off
        for slot in slots:
            self._loop.cancel(slot)

    def _take_back(self) -> None:
        """Undo the step that was launched ahead: its tokens are not reported, so their rows go."""
        ahead, self._ahead = self._ahead, None
        for slot in () if ahead is None else ahead.slots:
            self._loop.cancel(slot)

    def _compute(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """K and V of these tokens, in passes of at most ``_budget``."""
        chunks: list[Chunk] = []
        room = self._budget
        for slot, new in zip(slots, tokens, strict=True):
            version, start, done = int(self.cache.versions([slot])[0]), self._rows[slot], 0
            while done < len(new):
                part = new[done : done + room]
                done, room = done + len(part), room - len(part)
                chunks.append(Chunk(slot, version, part, start + done))
                if not room:
                    self._passes.launch(self._passes.prepare(chunks))
                    chunks, room = [], self._budget
            self._rows[slot] = start + len(new)
        if chunks:
            self._passes.launch(self._passes.prepare(chunks))

    def _decode(self, slots: list[int], tokens: Sequence[int]) -> torch.Tensor:
        """A step of these slots, with tokens that the host knows."""
        if others := [slot for slot in self._loop.slots if slot not in slots]:  # of an earlier batch
            self._stop(others)
        live, known = set(self._loop.slots), dict(zip(slots, tokens, strict=True))
        self._loop.start_batch(
            Start(slot, known[slot], self.max_seq_len - self._rows[slot]) for slot in slots if slot not in live
        )
        if fed := {slot: known[slot] for slot in slots if slot in live}:
            self._feed(fed)
        return self._launch_and_more(slots, tokens)

    def _feed(self, tokens: dict[int, int]) -> None:
        self._loop.feed(list(tokens), upload(list(tokens.values()), self.cache.device, torch.int64))

    def _launch_and_more(self, slots: list[int], tokens: Sequence[int] | None) -> torch.Tensor:
        """A step, and another one ahead; ``tokens``, which it was given, where that may be."""
        launched, _ = self._launch(slots)
        self._count(slots)
        if tokens is not None:
            self._run_ahead(slots, tokens)
        return self._handed_over(launched)

    def _count(self, slots: Sequence[int]) -> None:
        self._rows.update({slot: self._rows[slot] + 1 for slot in slots})

    def _launch(self, slots: list[int]) -> tuple[_Launched, dict[int, Any]]:
        """A step, and what the step before it sampled."""
        reported = {each.slot: each for each in self._loop.step(slots)}
        # A copy: the next step overwrites them, and whoever gets them may keep them.
        with torch.cuda.stream(self._loop.stream), torch.inference_mode(False), torch.no_grad():
            logits = self._loop.logits().clone()
            event = None
            if logits.is_cuda:
                event = torch.cuda.Event()
                event.record()
        return _Launched(slots, logits, event), reported

    def _handed_over(self, launched: _Launched) -> torch.Tensor:
        if launched.event is not None:
            stream = torch.cuda.current_stream(self.cache.device)
            stream.wait_event(launched.event)
            launched.logits.record_stream(stream)
        return launched.logits

    # -- ahead ---------------------------------------------------------------------------------------------------
    def _run_ahead(self, slots: list[int], given: Sequence[int]) -> None:
        """Launch the step after the one just launched, which was given these tokens."""
        if not self.guesses.are_worth_it or any(self._rows[slot] >= self.max_seq_len for slot in slots):
            return
        fixed = self.guesses.padded(slots, given)
        if fixed:
            self._feed(fixed)
        try:
            launched, sampled = self._launch(slots)
        except OutOfPages:  # of a row that may not be needed
            self.guesses.stop()
            return
        if any(sampled[slot].finish_reason is not None for slot in slots):  # a NaN
            for slot in slots:
                self._loop.cancel(slot)
            return
        tokens = [fixed.get(slot, sampled[slot].token) for slot in slots]
        self._ahead = _Launched(slots, launched.logits, launched.event, tokens)
