"""The arguments of a call, as a graph sees them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from .state import same_bits
from .trees import flatten, map_tensors

__all__ = ["Inputs"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Inputs:
    """The arguments of a call: tensors of the device, and all else, which a graph fixes.

    Attributes:
        key: equal for calls that differ in the contents of tensors only.
        on_device, on_host: their tensors. Without a GPU all are ``on_host``.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, dict(sorted(kwargs.items()))
        self.tensors: list[torch.Tensor] = []
        self.key: Hashable = flatten([self.args, self.kwargs], self.tensors)
        self.on_device = [tensor for tensor in self.tensors if tensor.device.type != "cpu"]
        self.on_host = [tensor for tensor in self.tensors if tensor.device.type == "cpu"]

    def same_on_host(self, other: Inputs) -> bool:
        return all(same_bits(*pair) for pair in zip(self.on_host, other.on_host, strict=True))

    def copied(self) -> Inputs:
        return self._mapped(lambda tensor: tensor.detach().clone())

    def shuffled(self, device: torch.device) -> Inputs:
        """The values of each tensor of the device in another order; numbers of floating point are scaled too.

        Integers in ascending order stay, as they may be offsets or positions, which have to be.
        """
        generator = torch.Generator().manual_seed(0)

        def shuffle(tensor: torch.Tensor) -> torch.Tensor:
            tensor, floats = tensor.detach(), tensor.dtype in FLOATS
            if tensor.device != device or not tensor.dim():
                return tensor
            if not floats and not tensor.is_complex() and bool((tensor[..., 1:] >= tensor[..., :-1]).all()):
                return tensor
            order = torch.randperm(tensor.numel(), generator=generator).to(device)
            values = tensor.reshape(-1)[order].reshape(tensor.shape)
            return values * 0.75 if floats else values

        return self._mapped(shuffle)

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        return Inputs(map_tensors(self.args, change), map_tensors(self.kwargs, change))
