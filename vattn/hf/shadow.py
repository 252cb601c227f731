"""A method that is overridden on one object, and on no copy of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError

__all__ = ["Shadow"]


class Shadow:
    """Calls something else in place of a method.

    A closure would be copied with the object as it is, and compute with what the object has, not its copy.

    Args:
        method: that it stands for, with its signature. A copy of the object gets the copy's own.
        call: is called while ``on``; else the method is.
    """

    def __init__(self, method: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self.on = True
        self._method, self._call = method, call

    @functools.partial(torch.compiler.disable, recursive=False)  # what is compiled inside stays so
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._call if self.on else self._method)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._method, memo)

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a model with overridden methods cannot be pickled: restore() or close() what overrides them, or use "
            "save_pretrained"
        )
