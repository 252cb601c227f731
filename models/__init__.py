"""Model definitions and weights. They take a cache and an attention backend; they never open a cache themselves."""

from __future__ import annotations

from .config import LlamaConfig
from .llama import Llama
from .loader import load
from .tokenizer import Tokenizer

__all__ = ["Llama", "LlamaConfig", "Tokenizer", "load"]
