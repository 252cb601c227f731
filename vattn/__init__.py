"""vattn: a KV cache for PyTorch language models, plain tensors at fixed addresses, mapped page by page."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DriverError, OutOfPages, OutOfSlots, VattnError
from .stats import CacheStats

if TYPE_CHECKING:
    from .kv_cache import KVCache
    from .layout import KVLayout, LayerGroup

__all__ = [
    "CacheStats",
    "ConfigError",
    "DriverError",
    "KVCache",
    "KVLayout",
    "LayerGroup",
    "OutOfPages",
    "OutOfSlots",
    "VattnError",
]
__version__ = "0.1.0"

# What needs torch is imported when it is first asked for: the command line has something to say before (cli.threads).
_LATER = {"KVCache": "kv_cache", "KVLayout": "layout", "LayerGroup": "layout"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
