"""Requests in, tokens out: used by the Python API, ``vattn generate`` and ``vattn chat``."""

from ..requests import Completion, Request, Sampling, StepToken
from .aio import AsyncEngine
from .engine import Engine
from .prefill import RuntimeModel
from .stats import EngineStats, Histogram

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineStats",
    "Histogram",
    "Request",
    "RuntimeModel",
    "Sampling",
    "StepToken",
]
