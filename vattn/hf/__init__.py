"""vattn for Hugging Face transformers: a KV cache for ``generate``, and any decoder as a model of the runtime."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "vattn.hf needs transformers, which is not installed: pip install 'transformers>=5.17'"
    ) from error

from . import attention
from .cache import VirtualCache
from .model import TransformersModel

__all__ = ["TransformersModel", "VirtualCache"]

attention.register()
