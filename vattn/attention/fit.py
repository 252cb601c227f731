"""Does an attention backend fit a cache: what it reads past the end must be mapped, and clean unless it masks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError
from .base import AttentionBackend

if TYPE_CHECKING:
    from ..kv_cache import KVCache

__all__ = ["require_fit"]


def require_fit(attention: AttentionBackend, cache: KVCache) -> None:
    """Refuse a backend that could fault on this cache, or see what another sequence left.

    Raises:
        ConfigError: it reads further past the end than the cache keeps rows mapped, or does not mask what it reads
            there in a cache that was told so; says how to open the cache.
    """
    rows = attention.over_read_tokens
    if rows > cache.over_read_tokens:
        raise ConfigError(
            f"attention {attention.name!r} reads up to {rows} rows past the end of a sequence, this cache keeps "
            f"{cache.over_read_tokens} mapped; open it with over_read_tokens={rows}"
        )
    if rows and not attention.masks_over_read and cache.over_read_masked:
        raise ConfigError(
            f"attention {attention.name!r} does not mask what it reads past the end of a sequence; open the cache with "
            f"over_read_masked=False"
        )
