"""Nested inputs and outputs: tensors and plain values in tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from ..errors import ConfigError

__all__ = ["flatten", "map_tensors", "tensors_in"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def is_tensor(value: object) -> bool:
    """Whether it is a plain tensor or a parameter. Subclasses have ways of their own."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided  # type: ignore[attr-defined]


def flatten(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """What two inputs of one signature have in common; their tensors are appended to ``tensors``.

    Raises:
        ConfigError: something else than plain strided tensors, plain values, tuples, lists and dicts.
    """
    if is_tensor(value):
        tensors.append(value)
        return value.shape, value.dtype, value.device
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind is dict:
        return kind, tuple((key, flatten(item, tensors)) for key, item in value.items())
    if kind in (tuple, list) or _is_named_tuple(value):
        return kind, tuple(flatten(item, tensors) for item in value)
    raise ConfigError(f"an argument must be of tensors, plain values, tuples, lists and dicts, got a {kind.__name__}")


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with other tensors.

    Raises:
        ConfigError: something in it can be neither walked through nor left as it is.
    """
    if is_tensor(value):
        return change(value)
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind in (tuple, list):
        return kind(map_tensors(item, change) for item in value)
    if _is_named_tuple(value):
        return kind(*(map_tensors(item, change) for item in value))
    if kind in (dict, OrderedDict):
        return kind((key, map_tensors(item, change)) for key, item in value.items())
    if dataclasses.is_dataclass(value) and all(field.init for field in dataclasses.fields(value)):
        names = [field.name for field in dataclasses.fields(value)]
        return kind(**{name: map_tensors(getattr(value, name), change) for name in names})
    raise ConfigError(f"a {kind.__name__} in the output")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in lists, tuples and dicts, as operations take them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _is_named_tuple(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
