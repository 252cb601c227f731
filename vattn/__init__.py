"""vattn: a KV cache for PyTorch language models, plain tensors at fixed addresses, mapped page by page."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DriverError, OutOfPages, OutOfSlots, QueueFull, VattnError
from .stats import CacheStats

if TYPE_CHECKING:
    from .engine import AsyncEngine, Engine, EngineStats
    from .kv_cache import KVCache
    from .layout import KVLayout, LayerGroup
    from .requests import Completion, Request, Sampling, StepToken

__all__ = [
    "AsyncEngine",
    "CacheStats",
    "Completion",
    "ConfigError",
    "DriverError",
    "Engine",
    "EngineStats",
    "KVCache",
    "KVLayout",
    "LayerGroup",
    "OutOfPages",
    "OutOfSlots",
    "QueueFull",
    "Request",
    "Sampling",
    "StepToken",
    "VattnError",
]
__version__ = "0.1.0"

# What needs torch is imported when it is first asked for: the command line has something to say before (cli.threads).
_LATER = {
    "AsyncEngine": "engine",
    "Completion": "requests",
    "Engine": "engine",
    "EngineStats": "engine",
    "KVCache": "kv_cache",
    "KVLayout": "layout",
    "LayerGroup": "layout",
    "Request": "requests",
    "Sampling": "requests",
    "StepToken": "requests",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    if _LATER[name] == "engine":
        from .engine.opening import FOREIGN

        if _of_transformers not in FOREIGN:
            FOREIGN.append(_of_transformers)
    return value


def _of_transformers(model: Any) -> Any:
    """A ``TransformersModel`` for a model of transformers; None for any other. Imports neither for others."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    from .hf import TransformersModel

    return TransformersModel(model)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
