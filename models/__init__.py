"""Model definitions and weights. They take a cache and an attention backend; they never open a cache themselves."""

from __future__ import annotations

from .config import LlamaConfig
from .fused_llama import FusedLlama
from .llama import Llama
from .loader import load
from .tokenizer import Tokenizer

__all__ = ["FusedLlama", "Llama", "LlamaConfig", "Tokenizer", "load"]
