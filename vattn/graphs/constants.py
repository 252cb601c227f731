"""What a forward brings from the CPU in every call, kept on the device."""

from __future__ import annotations

import torch

from .state import same_bits

__all__ = ["Constants"]


class Constants:
    """Copies on the device of tensors of the CPU that a forward brings there in every call, found by contents."""

    def __init__(self) -> None:
        self._found: dict[tuple[torch.dtype, torch.Size], list[tuple[int, torch.Tensor]]] = {}
        self.copies: list[torch.Tensor] = []

    def find(self, host: torch.Tensor) -> int | None:
        """The number of its copy."""
        known = self._found.get((host.dtype, host.shape), ())
        return next((number for number, tensor in known if same_bits(tensor, host)), None)

    def add(self, host: torch.Tensor, copy: torch.Tensor) -> int:
        self._found.setdefault((host.dtype, host.shape), []).append((len(self.copies), host.detach().clone()))
        self.copies.append(copy)
        return len(self.copies) - 1
