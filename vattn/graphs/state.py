"""What a graph of a module has taken for granted: its parameters' places, its attributes, its submodules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .trees import PLAIN

__all__ = ["Buffers", "State", "same_bits"]


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
    there. Tensors of the CPU are remembered by their contents too, as a graph holds a copy. Of the other attributes,
    those of plain types are remembered.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._children: list[tuple[nn.Module, str, nn.Module]] = []
        self._tensors: list[tuple[str, nn.Module, str, torch.Tensor, tuple[Any, ...]]] = []
        self._copies: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._plain: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        for path, part in module.named_modules():
            prefix = f"{path}." if path else ""
            self._children += [(part, name, child) for name, child in part.named_children()]
            attributes = vars(part)
            held = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            held += [(name, value) for name, value in attributes.items() if isinstance(value, torch.Tensor)]
            for name, tensor in held:
                self._tensors.append((prefix + name, part, name, tensor, _place(tensor)))
                if tensor.device.type == "cpu" and device.type != "cpu":
                    self._copies.append((prefix + name, tensor, tensor.detach().clone()))
            plain = {name: value for name, value in attributes.items() if type(value) in PLAIN}
            self._plain.append((prefix, attributes, plain))

    def change(self) -> str | None:
        """The first thing that is no longer as it was, in words, or None."""
        for part, name, child in self._children:
            if getattr(part, name, None) is not child:
                return f"submodule {name} was replaced"
        for path, part, name, tensor, place in self._tensors:
            if getattr(part, name, None) is not tensor:
                return f"{path} was replaced"
            if _place(tensor) != place:
                return f"{path} was moved"
        for prefix, now, then in self._plain:
            if not then.items() <= now.items():
                name = next(name for name, value in then.items() if name not in now or now[name] != value)
                return f"{prefix}{name} was changed"
        for path, tensor, copy in self._copies:
            if not same_bits(tensor, copy):
                return f"{path}, a tensor of the CPU, was written to"
        return None


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


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
