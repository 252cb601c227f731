"""What a decode loop can be made with: checks, and what is chosen where nothing was said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..arguments import require_int
from ..attention import AttentionBackend
from ..attention.choice import backend_of
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..machine import available_and_total_bytes
from .graphs import default_buckets
from .state import DecodeModel, DecodeState, bind_for
from .step import MAX_STEPS_AHEAD, MAX_STEPS_PER_LAUNCH

__all__ = ["LoopOptions", "checked_options", "require_state_room"]

_MOST_STOP_TOKENS = 1 << 40  # memory refuses far fewer


@dataclass(frozen=True)
class LoopOptions:
    """The arguments of ``DecodeLoop``, each with a value; ``fills_up``: a batch may get rows that are no sequence's."""

    max_seq_len: int
    max_batch: int
    attention: AttentionBackend | None
    typical_len: int
    buckets: Sequence[int]
    graphs: str
    ahead_tokens: int
    max_stop_tokens: int
    fills_up: bool
    steps_ahead: int
    steps_per_launch: int


def checked_options(
    model: DecodeModel,
    cache: KVCache,
    max_batch: int | None,
    attention: AttentionBackend | str | None,
    typical_len: int | None,
    buckets: Sequence[int] | None,
    graphs: str | None,
    ahead_tokens: int | None,
    mapping: str,
    max_stop_tokens: int,
    steps_ahead: int,
    steps_per_launch: int,
) -> LoopOptions:
    """See ``DecodeLoop``.

    Raises:
        ConfigError: an argument is wrong, or model, attention and cache do not fit each other.
    """
    if not isinstance(model, DecodeModel):
        raise ConfigError(f"a decode loop takes a fused model, FusedLlama(model), not a {type(model).__name__}")
    if cache.max_slots < 2:
        raise ConfigError("the decode loop takes a slot for itself: open the cache with max_slots of at least 2")
    max_batch = (
        cache.max_slots - 1 if max_batch is None else require_int("max_batch", max_batch, 1, cache.max_slots - 1)
    )
    if attention is not None:
        attention = backend_of(attention)
    if mapping not in ("thread", "inline"):
        raise ConfigError(f"mapping must be 'thread' or 'inline', got {mapping!r}")
    if model.embedding.device != cache.device:
        raise ConfigError(f"the model is on {model.embedding.device}, the cache on {cache.device}")
    model.require_fit(cache)
    max_stop_tokens = require_int("max_stop_tokens", max_stop_tokens, 1, _MOST_STOP_TOKENS)
    require_state_room(max_batch, cache.max_slots, model.config.vocab_size, cache.device, max_stop_tokens)
    steps_ahead = require_int("steps_ahead", steps_ahead, 1, MAX_STEPS_AHEAD)
    steps_per_launch = require_int("steps_per_launch", steps_per_launch, 1, MAX_STEPS_PER_LAUNCH)
    if steps_per_launch > steps_ahead:
        raise ConfigError(
            f"steps_per_launch={steps_per_launch} leaves more steps under way than steps_ahead={steps_ahead}: "
            f"raise steps_ahead to at least {steps_per_launch}"
        )
    max_seq_len = min(cache.layout.max_seq_len, model.max_seq_len)
    if graphs is None:
        graphs = "always" if cache.device.type == "cuda" else "never"
    if buckets is None:
        buckets = range(1, max_batch + 1) if graphs == "never" else default_buckets(max_batch)
    if ahead_tokens is None:
        ahead_tokens = max(16, math.ceil(2 * cache.layout.tokens_per_page(cache.page_bytes)))
    return LoopOptions(
        max_seq_len,
        max_batch,
        None if attention is None else bind_for(model, cache, attention, graphs),
        max(1, max_seq_len // 2) if typical_len is None else require_int("typical_len", typical_len, 1),
        buckets,
        graphs,
        require_int("ahead_tokens", ahead_tokens, 0),
        max_stop_tokens,
        fills_up=graphs != "never" or len(set(buckets)) < max_batch,
        steps_ahead=steps_ahead,
        steps_per_launch=steps_per_launch,
    )


def require_state_room(
    max_batch: int, max_slots: int, vocab_size: int, device: torch.device, max_stop_tokens: int = 16
) -> None:
    """Refuse what a machine has no memory for, before any is taken: the system ends a process that takes too much.

    Args:
        max_batch: what the user asked for.
        max_slots: of the cache that it needs; a loop has tables with an entry for each.
        vocab_size: of the model.
        device: where the tables are going to be.
        max_stop_tokens: of a sequence.

    Raises:
        ConfigError: says what it takes and what is free.
    """
    needed = max_slots * DecodeState.bytes_per_slot(max_stop_tokens, vocab_size)
    if needed > (free := _free_bytes(device)):
        raise ConfigError(
            f"max_batch={max_batch} takes {needed} bytes for tables of {max_slots} slots, and {device} has {free} "
            f"bytes free: lower max_batch or max_stop_tokens={max_stop_tokens}, or give a cache that has fewer slots"
        )


def _free_bytes(device: torch.device) -> int:
    """What torch could allocate there now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return available_and_total_bytes()[0]
