"""Values of a model's own files, read one by one: a plain value of the right kind, or a ConfigError that names it.

And the error for a package that reads such files and is not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vattn.arguments import escaped, is_int
from vattn.errors import ConfigError

__all__ = ["Fields", "lacks_package"]

_REQUIRED: Any = object()


class Fields:
    """A mapping out of a file.

    A key that is absent, or null, has its default; without one it is refused.

    Args:
        where: the mapping's name for error messages.
        prefix: of every key.
    """

    def __init__(self, mapping: Mapping[str, Any], where: str, prefix: str = "") -> None:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{where} must hold keys and values, got {escaped(mapping)}")
        self.mapping, self.where, self.prefix = mapping, where, prefix

    def raw(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands."""
        value = self.mapping.get(self.prefix + key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where} lacks {self.prefix + key!r}")
            return default
        return value

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = 2**31 - 1) -> Any:
        """An int within the bounds. Floats, booleans and strings are none."""
        value = self.raw(key, default)
        if value is not default and not (is_int(value) and minimum <= value <= maximum):
            raise self.refused(key, value, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, zero: bool = False) -> Any:
        """A finite float above 0, or 0 where ``zero``."""
        value = self.raw(key, default)
        if value is default:
            return value
        wanted = "a finite number " + ("of at least 0" if zero else "above 0")
        if not (is_int(value) or isinstance(value, float)):
            raise self.refused(key, value, wanted)
        try:
            number = float(value)
        except OverflowError:
            raise self.refused(key, value, wanted) from None
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            raise self.refused(key, value, wanted)
        return number

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.refused(key, value, "true or false")
        return value

    def refused(self, key: str, value: object, wanted: str) -> ConfigError:
        return ConfigError(f"{self.where}: {self.prefix + key} must be {wanted}, got {escaped(repr(value))}")


def lacks_package(what: str, package: str) -> ConfigError:
    """``what`` needs ``package``, which is not installed."""
    return ConfigError(
        f"{what} the package {package}: pip install {package}, or pip install '.[hf]' in a clone of vattn"
    )
