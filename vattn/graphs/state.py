"""What a graph of a module has taken for granted: its parameters' places, its attributes, its submodules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .trees import PLAIN

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

    It is looked at before each replay, so none of it goes through the slow attributes of ``nn.Module``.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._places: list[tuple[str, torch.Tensor, tuple[Any, ...]]] = []
        self._copies: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._plain: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._same: list[tuple[str, dict[str, Any], str, Any]] = []
        self._dicts: list[tuple[str, dict[str, Any], str, dict[Any, Any], list[Any], list[int]]] = []
        self._empty: list[dict[Any, Any]] = []
        for path, part in module.named_modules():
            prefix, attributes = f"{path}." if path else "", vars(part)
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor):
                    self._same.append((prefix + name, attributes, name, value))
                    self._add_tensor(prefix + name, value, device)
                elif isinstance(value, dict) and value:
                    self._dicts.append(
                        (prefix, attributes, name, value, list(value.items()), [*map(id, value.values())])
                    )
                elif isinstance(value, dict):
                    self._empty.append(value)
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                self._add_tensor(prefix + name, tensor, device)
            plain = {name: value for name, value in attributes.items() if type(value) in PLAIN}
            self._plain.append((prefix, attributes, plain))

    def _add_tensor(self, path: str, tensor: torch.Tensor, device: torch.device) -> None:
        self._places.append((path, tensor, place(tensor)))
        if tensor.device.type == "cpu" and device.type != "cpu":
            self._copies.append((path, tensor, tensor.detach().clone()))

    def change(self) -> str | None:
        """The first thing that is no longer as it was, in words, or None."""
        for prefix, attributes, name, known, items, ids in self._dicts:
            now = attributes.get(name)
            if now is not known or [*map(id, now.values())] != ids:
                return f"{prefix}{_replaced(items, now)} was replaced"
        if any(self._empty):
            return "a hook or a first entry of a dict was added"
        for path, attributes, name, tensor in self._same:
            if attributes.get(name) is not tensor:
                return f"{path} was replaced"
        for path, tensor, then in self._places:
            if place(tensor) != then:
                return f"{path} was moved"
        for prefix, attributes, plain in self._plain:
            if not plain.items() <= attributes.items():
                name = next(name for name, value in plain.items() if attributes.get(name, ...) != value)
                return f"{prefix}{name} was changed"
        for path, tensor, copy in self._copies:
            if not same_bits(tensor, copy):
                return f"{path}, a tensor of the CPU, was written to"
        return None


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
