"""Reading a model's own files, which come from anyone: plain values of the right kind, or a ConfigError."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vattn.arguments import escaped, is_int
from vattn.errors import ConfigError

__all__ = ["Fields", "lacks_package", "listed", "read_json"]

_REQUIRED: Any = object()
_MAX_JSON_BYTES = 64 << 20  # ten times the index of a model of a hundred thousand tensors


class Fields:
    """The keys and values of a file. A key that is absent or null has its default; without a default it is refused.

    Args:
        where: the file's name for error messages.
        prefix: of every key.
    """

    def __init__(self, mapping: Mapping[str, Any], where: str, prefix: str = "") -> None:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{where} must hold keys and values, got {escaped(mapping)}")
        self.mapping, self.where, self.prefix = mapping, where, prefix

    def raw(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands."""
        value = self.mapping.get(self.prefix + key)
        if value is None and default is _REQUIRED:
            raise ConfigError(f"{self.where} lacks {self.prefix + key!r}")
        return default if value is None else value

    def checked(self, key: str, default: Any, wanted: str, is_accepted: Callable[[Any], bool]) -> Any:
        """The default, or a value that ``is_accepted``."""
        value = self.raw(key, default)
        if value is not default and not is_accepted(value):
            raise self.refused(key, value, wanted)
        return value

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = 2**31 - 1) -> Any:
        """An int within the bounds; no float, boolean or string."""
        wanted = f"an integer from {minimum} to {maximum}"
        return self.checked(key, default, wanted, lambda value: is_int(value) and minimum <= value <= maximum)

    def number(self, key: str, default: Any = _REQUIRED, *, zero: bool = False) -> Any:
        """A finite float above 0, or 0 where ``zero``."""

        def is_accepted(value: Any) -> bool:
            is_number = is_int(value) or isinstance(value, float)
            return is_number and (value > 0 or (zero and value == 0)) and value <= sys.float_info.max

        value = self.checked(key, default, "a finite number " + ("of at least 0" if zero else "above 0"), is_accepted)
        return value if value is default else float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self.checked(key, default, "true or false", lambda value: isinstance(value, bool)))

    def refused(self, key: str, value: object, wanted: str) -> ConfigError:
        """The error for a value that is not ``wanted``."""
        return ConfigError(f"{self.where}: {self.prefix + key} must be {wanted}, got {escaped(repr(value))}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError where there is none."""
    try:
        is_file = path.is_file()  # a pipe is none, and opening it would wait
        if is_file and path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8")) if is_file else None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {escaped(str(error))}") from error
    if not is_file:
        raise ConfigError(f"{path.parent} has no {path.name}")
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return value


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(escaped(name) for name in every[:limit]) + more


def lacks_package(what: str, package: str) -> ConfigError:
    """The error for ``what``, which needs a package that is not installed."""
    return ConfigError(
        f"{what} the package {package}: pip install {package}, or pip install '.[hf]' in a clone of vattn"
    )
