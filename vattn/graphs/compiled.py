"""Modules that ``torch.compile`` made, while they are watched."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["as_written"]


def as_written() -> AbstractContextManager[object]:
    """Inside, compiled modules run as they were written.

    PyTorch compiles nothing under a ``TorchDispatchMode``. A compiled module that runs under one without this runs as
    it was written ever after (torch 2.11 to 2.13).
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
