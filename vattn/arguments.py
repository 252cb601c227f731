"""Checks of arguments: a plain value, or a ConfigError that says what would be accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .errors import ConfigError


def require_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """``value`` as a plain int, or a ConfigError that says which range is accepted. Booleans and floats are refused."""
    upper = "" if maximum is None else f" and at most {maximum}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name} must be an int of at least {minimum}{upper}, got {value!r}")
    try:
        number = value.__index__()
    except TypeError as error:
        raise ConfigError(f"{name} must be an int of at least {minimum}{upper}, got {value!r}") from error
    if number < minimum or (maximum is not None and number > maximum):
        raise ConfigError(f"{name} must be at least {minimum}{upper}, got {number}")
    return number


def int_array(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    """``values`` as a 1-D int64 array; floats, booleans and other shapes are refused."""
    if isinstance(values, torch.Tensor):
        raise ConfigError(f"{name} must be a sequence of ints or an int64 numpy array, on the host; got a torch.Tensor")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ConfigError(f"{name} must be a flat sequence of ints: {error}") from error
    if array.ndim == 1 and not array.size:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(f"{name} must be a flat sequence of ints or an int64 array, got {values!r}")
    return array.astype(np.int64, copy=False)
