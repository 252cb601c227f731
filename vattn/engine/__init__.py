"""Requests in, tokens out."""

from .engine import Completion, Engine, EngineStats, LanguageModel, Request, StepToken, bytes_for

__all__ = ["Completion", "Engine", "EngineStats", "LanguageModel", "Request", "StepToken", "bytes_for"]
