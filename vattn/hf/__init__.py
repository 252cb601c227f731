"""A drop-in KV cache for Hugging Face transformers: ``model.generate(..., cache=VirtualCache(...))``."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "vattn.hf needs transformers, which is not installed: pip install 'transformers>=5.17'"
    ) from error

from . import attention
from .cache import VirtualCache

__all__ = ["VirtualCache"]

attention.register()
