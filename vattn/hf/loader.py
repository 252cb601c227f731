"""A folder that vattn's own models do not know, loaded by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from ..arguments import escaped
from ..errors import ConfigError
from .model import TransformersModel

__all__ = ["load"]


def load(folder: Path, device: torch.device, dtype: torch.dtype, refused: ConfigError) -> TransformersModel:
    """The model in a folder with ``config.json`` and ``*.safetensors``. Runs no code of the folder.

    Args:
        refused: why vattn's own models do not compute it; raised where transformers does not either.

    Raises:
        ConfigError: the weights cannot be loaded, or the model cannot be run over a cache.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    except Exception as error:  # a model_type that transformers does not know, too
        raise refused from error
    if not known:
        raise refused
    try:
        with _without_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        model, loading = loaded
        missing = sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"]))
    except Exception as error:
        raise ConfigError(f"transformers cannot load {folder}: {escaped(str(error), 500)}") from error
    if missing:  # transformers makes them up
        raise ConfigError(f"{folder}: the weights lack, or have in another shape, {escaped(', '.join(missing), 500)}")
    return TransformersModel(model.to(device).eval())


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """What a command prints is its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
