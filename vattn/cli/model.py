"""From the options of ``generate`` and ``chat`` to a model, its tokenizer and a cache; and from a name to a config."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..attention import choose
from ..decode.state import features_of
from ..driver import Driver, open_driver
from ..engine import RuntimeModel
from ..engine.opening import opened_cache as cache_for
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..memory.backing import choose_memory_limit
from ..models import LlamaConfig
from ..tuning import default_attention
from .threads import use_all_cores

__all__ = ["Place", "loaded_model", "opened_cache", "opened_driver", "place_for", "read_config"]

_USUAL_HEAD_DIM = 128  # which every backend has a kernel for


@dataclass(frozen=True)
class Place:
    """Where a model is, and where and as what it is to run. Made before it is loaded, which takes long."""

    path: Path
    device: torch.device
    dtype: torch.dtype
    memory_limit: int | None
    attention: str | None


def place_for(args: argparse.Namespace) -> Place:
    """What the options of ``generate`` and ``chat`` say; sets how many threads the CPU uses.

    Raises:
        ConfigError: no such model, device or attention, or one that cannot run there, or a limit below one page.
    """
    from ..models.loader import find

    if not args.model:
        raise ConfigError("--model is empty; expected smollm2, a folder or a .gguf file")
    with opened_driver(args.device) as driver:
        device = driver.device
        if args.memory_limit is not None:
            choose_memory_limit(driver, args.memory_limit, driver.default_page_bytes)
    dtype = dtype_for(args.dtype, device)
    if args.attention is not None:
        choose(device, dtype, _USUAL_HEAD_DIM, name=args.attention)
    path = find(args.model)
    if device.type == "cpu":
        use_all_cores()
    # Errors come as exceptions; a tokenizer's advice on a long text is none of the user's business here.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return Place(path, device, dtype, args.memory_limit, args.attention)


@contextmanager
def opened_driver(name: str | None) -> Iterator[Driver]:
    """The driver of the device asked for, or of the best there is; ConfigError when it cannot be used."""
    driver = open_driver(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        yield driver
    finally:
        driver.close()


def dtype_for(name: str | None, device: torch.device) -> torch.dtype:
    """The one asked for, or what suits the device."""
    chosen: torch.dtype = getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))
    return chosen


@contextmanager
def loaded_model(place: Place) -> Iterator[RuntimeModel]:
    """vattn's own model where it computes this architecture, else transformers'.

    Raises:
        ConfigError: neither knows the architecture, or the weights do not fit.
    """
    from ..models.config_files import OtherArithmetic
    from ..models.loader import load_model

    try:
        own = load_model(place.path, place.device, place.dtype)
    except OtherArithmetic as error:
        if not place.path.is_dir():
            raise
        refused = error
    else:
        yield own.runtime()
        return
    from ..hf.loader import load

    with load(place.path, place.device, place.dtype, refused) as model:
        yield model


@contextmanager
def opened_cache(place: Place, model: RuntimeModel, max_batch: int) -> Iterator[KVCache]:
    """For an engine that runs so many sequences together, of the model's whole context.

    Raises:
        ConfigError: the backend asked for cannot run this model.
    """
    backend = None
    if place.attention is not None:
        case = (model.kv_layout(), place.device, model.num_heads)
        backend = default_attention(*case, name=place.attention, features=features_of(model))
    with cache_for(model, backend, max_batch, place.memory_limit) as cache:
        yield cache


def read_config(name: str) -> LlamaConfig:
    """The config of a model by name, of a folder with ``config.json``, of such a file or a GGUF file. Reads no weights.

    Raises:
        ConfigError: there is none, or it is not one of a model that runs here.
    """
    from ..models.files import read_json
    from ..models.gguf import config_of, open_file
    from ..models.loader import find

    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return LlamaConfig.from_hf(read_json(path / "config.json"))
    if path.is_file() and path.suffix == ".json":
        return LlamaConfig.from_hf(read_json(path))
    try:
        found = find(name)
    except ConfigError as error:
        raise ConfigError(f"{error}; here a folder needs config.json only") from error
    return config_of(open_file(found))
