"""The measured choice: a step of each batch size is run in the way that is fastest on this GPU, timed once and kept.

The ways are launching the kernels of ``decode`` one by one, a graph of each compute that the model offers, and no
others: which of them wins changes with the GPU, the shape and the batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from ..errors import DriverError, OutOfPages
from ..kv_cache import KVCache
from ..tuning.choices import EAGER, Choice, Choices, time_in_turns
from .state import Compute, DecodeModel

__all__ = ["GRAPH", "Chosen", "OffersWays", "choose_ways", "measured", "step_key", "ways_of", "why"]

GRAPH = "graph"  # of what the model offers as "kernels"

Launch = Callable[[], object]
_PASSING = (torch.OutOfMemoryError, MemoryError, DriverError, OSError, ImportError)  # why a way may run next time


@runtime_checkable
class OffersWays(Protocol):
    """A ``DecodeModel`` that can compute a step in several ways, of which a loop with ``graphs="measure"`` takes the
    fastest."""

    def ways(self, batch: int, cache: KVCache) -> Mapping[str, Compute]:
        """How steps of so many rows can be computed over this cache.

        Called once for each batch size when a loop opens, of which it neither launches anything nor takes memory that
        outlives it: the first call of a compute does, on the stream of the steps. Each is captured in a graph, so that
        it allocates nothing that outlives a call after its first, and never waits for the device. The loop keeps a
        compute as long as its graph. What raises is left out.

        Returns:
            By name, in the order in which a tie is decided: ``"kernels"`` of one launch after another, and what else
            there is. Each computes the logits of ``decode`` and appends the same K and V.
        """
        ...


@dataclass(frozen=True)
class Chosen:
    """How the steps of a batch size are run.

    Attributes:
        choice: what was measured.
        launch: launches a step in the chosen way; takes what ``run`` takes by name.
        rows: that the sequences had when it was measured.
        drop: lets it be measured again next time.
    """

    choice: Choice
    launch: Callable[..., None]
    rows: int
    drop: Callable[[], None]


def ways_of(model: DecodeModel, cache: KVCache, batch: int) -> dict[str, Compute | None]:
    """By the name of each way, what computes the step; None: the model's ``decode``."""
    ways: dict[str, Compute | None] = {EAGER: None}
    if not isinstance(model, OffersWays):
        return ways | {GRAPH: None}
    named = {GRAPH if name == "kernels" else f"{GRAPH} + {name}": way for name, way in model.ways(batch, cache).items()}
    return ways | named


def step_key(model: DecodeModel, cache: KVCache, attention: str, batch: int, rows: int) -> dict[str, str | int]:
    """What a step's choice is kept under.

    Args:
        attention: the backend's name.
        batch: rows of the step.
        rows: of each sequence.
    """
    config, layout = model.config, cache.layout
    heads = dict.fromkeys(f"{group.num_kv_heads} KV heads of {group.head_dim}" for group in layout.groups)
    hidden = getattr(config, "hidden_size", model.embedding.shape[1])
    shape = (
        f"{type(model).__name__} of {type(config).__name__}",
        f"{len(layout.layers)} layers of {hidden}",
        f"{model.num_heads} heads",
        *heads,
        f"intermediate {getattr(config, 'intermediate_size', 'unknown')}",
        f"vocabulary {config.vocab_size}",
        str(getattr(model, "dtype", layout.dtype)).removeprefix("torch."),
    )
    kernels = {"operations": model.ops.name, "attention": attention}
    return {"kind": "decode step", "model": ", ".join(shape), **kernels, "rows": rows, "batch": batch}


def choose_ways(
    model: DecodeModel,
    cache: KVCache,
    scratch: int,
    lengths: torch.Tensor,
    *,
    batches: Sequence[int],
    typical_len: int,
    attention: Callable[[int], str],
    run: Callable[..., None],
    measure: Callable[[Mapping[str, Launch]], tuple[Choice, bool]],
    store: Choices,
) -> dict[int, Chosen]:
    """The way of each batch size: as the store has it, else measured now and kept there.

    A kept choice counts if each way that the model offers was timed for it, or failed.

    Args:
        model, cache: of the step.
        scratch: the slot whose rows the steps compute meanwhile; it has rows, and as many afterwards.
        lengths: ``[max_slots]`` int32 on the device, of which the entry of ``scratch`` is 0.
        batches: rows of steps, rising.
        typical_len: rows of a sequence to measure with. Where the cache has no pages for them it is measured with the
            rows that ``scratch`` has.
        attention: rows of a step -> name of its backend.
        run: launches a step of so many rows with a compute, None for the model's ``decode``.
        measure: the ways of a step -> the choice, and whether it holds for other processes, as ``measured`` gives them.
        store: where choices are kept.
    """
    offered = {batch: ways_of(model, cache, batch) for batch in batches}

    def chosen(batch: int, rows: int, choice: Choice | None) -> Chosen | None:
        ways = offered[batch]
        if choice is None or choice.way not in ways or not ways.keys() <= {*choice.us, *choice.failed}:
            return None
        return Chosen(choice, partial(run, batch, ways[choice.way]), rows, partial(store.forget, key(batch, rows)))

    def key(batch: int, rows: int) -> dict[str, str | int]:
        return step_key(model, cache, attention(batch), batch, rows)

    found = {batch: chosen(batch, typical_len, store.find(key(batch, typical_len))) for batch in batches}
    if missing := [batch for batch in reversed(batches) if found[batch] is None]:
        with _sequence_of(cache, scratch, lengths, typical_len) as rows:
            for batch in missing:
                kept = None if rows == typical_len else store.find(key(batch, rows))
                found[batch] = chosen(batch, rows, kept)
                if found[batch] is None:
                    choice, lasts = measure({way: partial(run, batch, how) for way, how in offered[batch].items()})
                    found[batch] = chosen(batch, rows, choice)
                    if lasts:
                        store.keep(key(batch, rows), choice)
    return {batch: each for batch, each in found.items() if each is not None}


def measured(
    ways: Mapping[str, Launch], capture: Callable[[Launch], Launch], wait: Callable[[], object]
) -> tuple[Choice, bool]:
    """Time each way, and choose the fastest; one that cannot be captured or raises is left out.

    Args:
        ways: launches of a step by name, ``EAGER`` first; all but that are timed as graphs.
        capture: a launch -> what replays it.
        wait: returns when the device is done.

    Returns:
        The choice, and whether it is worth keeping: not where a way failed for what may not last, as memory that was
        short.

    Raises:
        Exception: what the launch of ``EAGER`` raises.
    """
    timed, failed, lasts = {EAGER: ways[EAGER]}, {}, True
    ways[EAGER]()  # compiles kernels and makes workspaces
    wait()
    for way, launch in ways.items():
        if way == EAGER:
            continue
        try:
            launch()
            wait()
            replay = capture(launch)
            replay()  # the first one uploads it
            wait()
        except Exception as error:
            failed[way] = why(error)
            lasts &= not isinstance(error, _PASSING)
        else:
            timed[way] = replay
    return Choice.of(time_in_turns(timed, wait), failed), lasts


def why(error: Exception) -> str:
    """Its type and the beginning of its first line: errors of compilers are long."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


@contextmanager
def _sequence_of(cache: KVCache, slot: int, lengths: torch.Tensor, rows: int) -> Iterator[int]:
    """Inside, a slot has so many rows, the last of which is computed next; gives the rows that it has.

    They are zeros: what lay in that memory might hold NaN. Where the cache has no pages for them, the slot stays as it
    is, and a warning says so.
    """
    before = cache.seq_len(slot)
    try:
        cache.ensure(slot, rows)
    except OutOfPages:
        warnings.warn(
            f"the ways to run a step are timed on sequences of {before} rows, as the cache has no pages for one of "
            f"{rows}: raise its memory_limit, or pass the typical_len that you expect",
            RuntimeWarning,
            stacklevel=2,
        )
        rows = before
    try:
        for layer in cache.layout.layers:
            for part in cache.rows(slot, layer):
                part.zero_()
        lengths[slot] = rows - 1
        yield rows
    finally:
        lengths[slot] = 0
        if lengths.is_cuda:
            torch.cuda.synchronize(lengths.device)
        cache.truncate(slot, before)
