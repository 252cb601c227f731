"""The status page at ``/``, and the figures that it shows."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..engine import Engine
    from ..engine.stats import Histogram

__all__ = ["CONTENT_SECURITY_POLICY", "page", "snapshot"]

# The page has its style and script in itself, and asks this server only.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def page() -> bytes:
    """The page as HTML in UTF-8. It needs no other file, and asks ``status.json`` each second."""
    return files(__package__).joinpath("status.html").read_bytes()


def snapshot(engine: Engine, model_name: str = "") -> dict[str, Any]:
    """What the page shows now, as plain data for JSON. Sizes in bytes, durations in seconds, no text of any request.

    From any thread; it takes time by the number of slots, less than a millisecond.
    """
    stats, kv = engine.stats(), engine.cache
    memory = kv.stats()
    slots = []
    for slot in range(kv.max_slots):
        with suppress(ConfigError):  # it owns no sequence
            slots.append({"slot": slot, "tokens": kv.seq_len(slot)})
    return {
        "model": model_name,
        "device": str(kv.device),
        "max_slots": kv.max_slots,
        "max_seq_len": kv.layout.max_seq_len,
        "bytes_per_token": kv.layout.bytes_per_token,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "tokens_per_s": stats.tokens_per_s,
        "generation_tokens": stats.num_decode_tokens,
        "prefill_tokens": stats.num_prefill_tokens,
        "preemptions": stats.num_preemptions,
        "prefix_queries": stats.num_prefix_queries,
        "prefix_hits": stats.num_prefix_hits,
        "first_token_s": _quantiles(stats.first_token_s),
        "between_tokens_s": _quantiles(stats.between_tokens_s),
        "queue_s": _quantiles(stats.queue_s),
        "memory": memory.as_dict(),
        "slots": slots,
    }


def _quantiles(durations: Histogram) -> dict[str, float | int]:
    return {"count": durations.count, "p50": durations.quantile(0.5), "p99": durations.quantile(0.99)}
