"""Attention backends: one file each, behind one Protocol, best first in the registry."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .base import AttentionBackend, AttentionBatch
from .reference import ReferenceAttention
from .sdpa import SdpaAttention

__all__ = ["AttentionBackend", "AttentionBatch", "backends", "choose", "get"]

# In order of preference: `choose` takes the first that supports what it is asked for.
_BACKENDS: tuple[AttentionBackend, ...] = (SdpaAttention(), ReferenceAttention())


def backends() -> tuple[AttentionBackend, ...]:
    """All backends, preferred first, whether or not they can run on this machine (ask ``supports``)."""
    return _BACKENDS


def get(name: str) -> AttentionBackend:
    """The backend of that name.

    Raises:
        ConfigError: no such backend; names those there are.
    """
    for backend in _BACKENDS:
        if backend.name == name:
            return backend
    raise ConfigError(f"unknown attention backend {name!r}, expected one of {', '.join(b.name for b in _BACKENDS)}")


def choose(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """The preferred backend that can run there.

    Raises:
        ConfigError: none can; gives each one's reason.
    """
    reasons = []
    for backend in _BACKENDS:
        reason = backend.supports(torch.device(device), dtype, head_dim)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ConfigError(f"no attention backend for {dtype}, head_dim {head_dim} on {device}: {'; '.join(reasons)}")
