"""Checks of arguments: a plain value, or a ConfigError that says what would be accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .errors import ConfigError

_INT64_END = 1 << 63


def is_int(value: object) -> bool:
    """Whether ``value`` is an integer of Python or numpy. Booleans are not, nor tensors, which may lie on a device."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def shown(value: object, limit: int = 120) -> str:
    """``repr(value)`` for an error, cut to so many characters; its type where it has no such text."""
    try:
        text = repr(value)
    except Exception:  # an int of thousands of digits, or whatever an object of the caller's raises
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def require_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """``value`` as a plain int, or a ConfigError that says which range is accepted."""
    upper = "" if maximum is None else f" and at most {maximum}"
    if not is_int(value):
        raise ConfigError(f"{name} must be an int of at least {minimum}{upper}, got {shown(value)}")
    number = int(value)  # type: ignore[call-overload]
    if number < minimum or (maximum is not None and number > maximum):
        raise ConfigError(f"{name} must be at least {minimum}{upper}, got {shown(number)}")
    return number


def optional_int(name: str, value: object, minimum: int) -> int | None:
    """As ``require_int``; None stays None."""
    return None if value is None else require_int(name, value, minimum)


def require_bool(name: str, value: object) -> bool:
    """``value``, or a ConfigError where it is anything but True or False: ``"no"`` and ``0`` are not what they seem."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {shown(value)}")
    return value


def escaped(value: object, limit: int = 120) -> str:
    """``value`` for a line of an error: nothing in it that a terminal would obey or hide, and not much of it.

    Strings of a model's files (names of tensors, keys, templates' own words) may hold escape sequences, newlines and
    characters that turn the direction of text or cannot be seen.
    """
    text = value if isinstance(value, str) else shown(value, limit)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def int_array(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    """``values`` as a 1-D int64 array; floats, booleans, tensors and other shapes are refused."""
    wanted = f"{name} must be a flat sequence of ints or a 1-D int64 numpy array"
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise ConfigError(f"{wanted}, got an array of shape {values.shape} and dtype {values.dtype}")
        if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
            raise ConfigError(f"{wanted}, got {values.max()}, which does not fit")
        return values.astype(np.int64, copy=False)
    if isinstance(values, (torch.Tensor, str, bytes)) or not isinstance(values, (Sequence, range)):
        raise ConfigError(f"{wanted}, got {shown(values)}")
    for value in values:
        if not is_int(value) or not -_INT64_END <= value < _INT64_END:
            raise ConfigError(f"{wanted}, got {shown(value)} in it")
    return np.array(values, np.int64)
