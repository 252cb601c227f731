"""A drop-in KV cache for Hugging Face transformers: ``model.generate(..., past_key_values=VirtualCache(...))``."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError('vattn.hf needs transformers: pip install "vattn[hf]"') from error

from .cache import VirtualCache

__all__ = ["VirtualCache"]
