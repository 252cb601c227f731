"""What an engine opens: its model's runtime, its decode loop, and a cache where it is given none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from ..attention import AttentionBackend, declared
from ..decode import DecodeLoop
from ..decode.options import require_state_room
from ..decode.state import features_of
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..tuning import default_attention, default_decode
from .prefill import RuntimeModel

__all__ = ["BUDGETS", "FOREIGN", "attention_for_prompts", "decode_loop", "opened_cache", "runtime_of"]

# Prompt tokens of a step while somebody decodes, who waits for them, and while nobody does.
BUDGETS = {"cuda": (1024, 8192), "cpu": (64, 256)}
# Rows of a sequence, for the choice of a kernel for decode: most requests are far from the context.
_TYPICAL_LEN = 2048

# Slots for stored sequences, for each that may run. Of a model with 128,000 tokens in its vocabulary a slot takes 0.3
# MB of tables, so 64 sequences take 54 MB more.
_STORED_FOR_EACH = 3
# A page costs the driver as much whatever its size, and prompts are known ahead: 8,192 tokens of an 8B model take 2 to
# 3 ms of its calls, with pages of one size 20 to 25 (H100).
_LARGEST_PAGE_BYTES = 64 << 20
_MOST_ADDRESSES = 32 << 40  # bytes; there are 128 TiB for a process


# What makes a ``RuntimeModel``, to be closed, of another library's model, and None of one that it does not know. The
# rooms that know such libraries come after this one, and add to this list.
FOREIGN: list[Callable[[Any], AbstractContextManager[RuntimeModel] | None]] = []


def runtime_of(model: Any, made: ExitStack) -> RuntimeModel:
    """What an engine runs for a model.

    Args:
        made: gets what is to be closed with the engine.

    Raises:
        ConfigError: it is no model that can be run.
    """
    if isinstance(model, type):
        raise ConfigError(f"an engine takes a model, not the class {model.__name__}: make one of it first")
    if not isinstance(model, RuntimeModel) and callable(getattr(model, "runtime", None)):
        model = model.runtime()
    if isinstance(model, RuntimeModel):
        return model
    for make in FOREIGN:
        if (foreign := make(model)) is not None:
            return made.enter_context(foreign)
    raise ConfigError(
        "an engine takes a model, as transformers loads it or as vattn.models.load(...)[0] gives it, not a "
        f"{type(model).__name__}"
    )


def attention_for_prompts(model: RuntimeModel, cache: KVCache, new: int) -> AttentionBackend:
    """The one measured as fastest for passes of ``new`` tokens, of those that the cache has a margin for.

    Raises:
        ConfigError: none runs there.
    """
    margin = 0 if cache.over_read_masked else cache.over_read_tokens
    case = (cache.layout, cache.device, model.num_heads)
    return default_attention(*case, max_over_read=margin, new=new, features=features_of(model))


def decode_loop(
    model: RuntimeModel, cache: KVCache, attention: AttentionBackend | None, max_batch: int, graphs: str | None = None
) -> DecodeLoop:
    """With this attention where captured steps can use it; ``graphs`` as of ``DecodeLoop``."""
    on_gpu = model.device.type == "cuda"
    decodes = attention is not None and (not on_gpu or declared(attention, "capturable"))
    return DecodeLoop(
        model,
        cache,
        max_batch=max_batch,
        attention=attention if decodes else None,
        typical_len=min(_TYPICAL_LEN, cache.layout.max_seq_len),
        graphs=graphs,
        mapping="thread" if on_gpu else "inline",
    )


def opened_cache(
    model: RuntimeModel,
    attention: AttentionBackend | None,
    max_batch: int,
    memory_limit: int | None,
    max_over_read: int | None = None,
    stores: bool = False,
) -> KVCache:
    """For so many sequences of the model's whole context, and the slot that a decode loop takes; with the margin that
    ``attention`` wants, or what is fastest for prompts and for decode, of what reads ``max_over_read`` rows past the
    end at most. ``stores``: with further slots, for stored sequences.

    Raises:
        ConfigError: there is no memory for the tables of so many slots, or no such cache.
    """
    layout, device, features = model.kv_layout(), model.device, features_of(model)
    within = _MOST_ADDRESSES // (layout.bytes_per_token * layout.max_seq_len)
    num_stored = max(0, min(_STORED_FOR_EACH * max_batch, within - max_batch)) if stores else 0
    max_slots = max_batch + 1 + num_stored
    require_state_room(max_batch, max_slots, model.config.vocab_size, device)
    if attention is None:
        wanted = [
            default_attention(
                *(layout, device, model.num_heads),
                new=BUDGETS[device.type][1],
                max_over_read=max_over_read,
                features=features,
            ),
            default_decode(
                *(layout, device, max_batch, min(_TYPICAL_LEN, layout.max_seq_len), model.num_heads),
                max_over_read=max_over_read,
                features=features,
            ),
        ]
    else:
        wanted = [attention]
    return KVCache(
        layout,
        max_slots,
        device,
        memory_limit,
        max_page_bytes=_LARGEST_PAGE_BYTES,
        over_read_tokens=max(each.over_read_tokens for each in wanted),
        over_read_masked=all(each.masks_over_read for each in wanted if each.over_read_tokens),
    )
