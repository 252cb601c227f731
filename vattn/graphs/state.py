"""What a graph of a module has taken for granted: its parameters' places, its attributes, its submodules."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, call, getitem, is_, itemgetter
from typing import Any

import torch
from torch import nn

from .trees import PLAIN, is_tensor

__all__ = ["Buffers", "State", "place", "same_bits"]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same, NaN included. Waits for a device."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.device != other.device:
        other = other.to(one.device)
    pair = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*pair)


class State:
    """A module as it was when this was made.

    Tensors are remembered by identity and place, so that writing to one in place is no change: a graph reads what is
    there. Tensors of the CPU are remembered by their contents too, as a graph holds a copy. Attributes of plain types
    are compared. Of dicts (a module keeps its parameters, submodules and hooks in such) the entries' identities are.

    It is looked at before each replay, so each kind of look is one pass in C over all modules. Which of them changed is
    asked only where something did.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._tensors: dict[int, tuple[str, torch.Tensor, tuple[Any, ...]]] = {}
        self._copies: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._plain: list[tuple[str, dict[str, Any], tuple[str, ...]]] = []
        self._same: list[tuple[str, dict[str, Any], str, Any]] = []
        self._dicts: list[tuple[str, dict[Any, Any], list[tuple[Any, Any]]]] = []
        self._empty: list[dict[Any, Any]] = []
        for path, part in module.named_modules():
            prefix, attributes = f"{path}." if path else "", vars(part)
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor):
                    self._same.append((prefix + name, attributes, name, value))
                    self._add_tensor(prefix + name, value, device)
                elif isinstance(value, dict) and value:
                    self._same.append((prefix + name, attributes, name, value))
                    self._dicts.append((prefix, value, list(value.items())))
                elif isinstance(value, dict):
                    self._empty.append(value)
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                self._add_tensor(prefix + name, tensor, device)
            names = tuple(name for name, value in attributes.items() if type(value) in PLAIN)
            if names:
                self._plain.append((prefix, attributes, names))
        self._flatten()

    def _add_tensor(self, path: str, tensor: torch.Tensor, device: torch.device) -> None:
        if id(tensor) not in self._tensors and tensor.device.type == "cpu" and device.type != "cpu":
            self._copies.append((path, tensor, tensor.detach().clone()))
        self._tensors.setdefault(id(tensor), (path, tensor, place(tensor)))

    def _flatten(self) -> None:
        """The same in lists of one kind, as they are compared."""
        self._owners = [attributes for _, attributes, _, _ in self._same]
        self._names = [name for _, _, name, _ in self._same]
        self._values = [value for _, _, _, value in self._same]
        self._entries = [entries for _, entries, _ in self._dicts]
        self._held, self._lengths = [*_held(self._entries)], [*map(len, self._entries)]
        self._attributes = [attributes for _, attributes, _ in self._plain]
        self._getters = [itemgetter(*names) for _, _, names in self._plain]
        self._then = [*map(call, self._getters, self._attributes)]
        tensors = [tensor for _, tensor, _ in self._tensors.values()]
        # An address tells the device too, but for that of a tensor without elements.
        self._usual = [tensor for tensor in tensors if is_tensor(tensor) and tensor.data_ptr()]
        self._unusual = [tensor for tensor in tensors if not (is_tensor(tensor) and tensor.data_ptr())]
        self._places = _places(self._usual), [*map(place, self._unusual)]

    def tensors(self) -> list[torch.Tensor]:
        """Those that the module had, parameters and buffers among them."""
        return [tensor for _, tensor, _ in self._tensors.values()]

    def change(self) -> str | None:
        """The first thing that is no longer as it was, in words, or None."""
        try:
            same = (
                all(map(is_, map(getitem, self._owners, self._names), self._values))
                and [*map(len, self._entries)] == self._lengths
                and all(map(is_, _held(self._entries), self._held))
                and not any(self._empty)
                and [*map(call, self._getters, self._attributes)] == self._then
                and _places(self._usual) == self._places[0]
                and [*map(place, self._unusual)] == self._places[1]
            )
        except (KeyError, RuntimeError):  # an attribute is gone; a tensor has no address any more
            same = False
        if not same:
            return self._what_changed()
        for path, tensor, copy in self._copies:
            if not same_bits(tensor, copy):
                return f"{path}, a tensor of the CPU, was written to"
        return None

    def _what_changed(self) -> str:
        for prefix, entries, items in self._dicts:
            if [*map(id, entries.values())] != [id(value) for _, value in items]:
                return f"{prefix}{_replaced(items, entries)} was replaced"
        if any(self._empty):
            return "a hook or a first entry of a dict was added"
        for path, attributes, name, value in self._same:
            if attributes.get(name) is not value:
                return f"{path} was replaced"
        for path, tensor, then in self._tensors.values():
            if place(tensor) != then:
                return f"{path} was moved"
        for (prefix, attributes, names), then in zip(self._plain, self._then, strict=True):
            values = then if len(names) > 1 else (then,)
            for name, value in zip(names, values, strict=True):
                if attributes.get(name, ...) != value:
                    return f"{prefix}{name} was changed"
        return "something was changed and changed back meanwhile"


def _held(dicts: list[dict[Any, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def _places(tensors: list[torch.Tensor]) -> tuple[list[Any], ...]:
    """As ``place``, of many plain tensors that have elements."""
    return (
        [*map(torch.Tensor.data_ptr, tensors)],
        [*map(torch.Tensor.stride, tensors)],
        [*map(torch.Tensor.size, tensors)],
        [*map(_dtype, tensors)],
    )


_dtype = attrgetter("dtype")


def _replaced(items: list[tuple[Any, Any]], now: Any) -> Any:
    """The name of an entry of a dict that is another one now."""
    now = now if isinstance(now, dict) else {}
    gone = [name for name, value in items if now.get(name) is not value]
    return next(iter([*gone, *(name for name in now if name not in dict(items))]), "an entry")


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers are, and how they are read. A subclass that wraps others, as those of quantised weights
    do, has no address of its own: theirs count."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return type(tensor), tensor.dtype, tensor.shape, *(place(getattr(tensor, name)) for name in names)
    if tensor.layout is not torch.strided:
        return id(tensor), tensor.dtype, tensor.device, tensor.shape
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


class Buffers:
    """The buffers of a module, to be put back after runs that must not count."""

    def __init__(self, module: nn.Module) -> None:
        self._saved = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]

    def restore(self) -> None:
        for buffer, saved in self._saved:
            if same_bits(buffer, saved):
                continue
            with torch.inference_mode(buffer.is_inference()):
                buffer.copy_(saved)

    def values(self) -> list[torch.Tensor]:
        """Copies of what they hold now."""
        return [buffer.detach().clone() for buffer, _ in self._saved]
