"""vattn: a KV cache for PyTorch language models, plain tensors at fixed addresses, mapped page by page."""

from .errors import ConfigError, DriverError, OutOfPages, OutOfSlots, VattnError
from .kv_cache import KVCache
from .layout import KVLayout, LayerGroup
from .stats import CacheStats

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
