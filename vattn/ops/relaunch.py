"""Repeated launches of a Triton kernel, without most of what a launch costs the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["Relaunch"]


class Relaunch:
    """One launch of a Triton kernel, repeated with other tensors of the same dtypes.

    Triton's front end inspects every argument of every launch to find the compiled code that fits. An eager decode
    step spends most of its time on that. Here only the first launch goes through the front end, which compiles. Later
    launches call the compiled kernel's own launcher. They pass pointers as numbers, which the driver does not check.

    A launch still goes through the front end where that launcher is missing (Triton's interpreter), where it takes
    other arguments (another release of Triton), and where a pointer is not a multiple of 16.

    Args:
        kernel: a ``triton.jit`` function.
        arguments: the kernel's arguments by name, all but the varying ones.
        varying: names of the arguments that each launch brings: tensors whose dtype never changes.
        device: where the tensors are.
        options: of the compilation, such as ``num_warps``.
    """

    def __init__(
        self,
        kernel: Any,
        arguments: Mapping[str, Any],
        varying: Sequence[str],
        device: torch.device,
        options: Mapping[str, Any],
    ) -> None:
        self._kernel = kernel
        self._arguments = dict(arguments)
        self._varying = tuple(varying)
        self._device = device
        self._options = dict(options)
        # The compiled kernel's launch, and what it is called with: grid, stream, what Triton wants, the arguments.
        self._run: Any = None
        self._compiled: Any = None
        self._values: list[Any] = []
        self._places = [_NUM_BEFORE + kernel.arg_names.index(name) for name in varying]

    def __call__(self, grid: tuple[int, int, int], *values: torch.Tensor) -> None:
        """Launch on the device's current stream.

        Args:
            grid: programs along each axis.
            values: the varying arguments, in order.
        """
        if self._run is None or torch._C._cuda_getDevice() != self._device.index:
            return self._through_the_front_end(grid, values)
        prepared = self._values
        for place, value in zip(self._places, values):  # noqa: B905  (checked the first time; it takes time)
            address = value.data_ptr()
            if address & 15:
                return self._through_the_front_end(grid, values)
            prepared[place] = address
        prepared[0], prepared[1], prepared[2] = grid
        prepared[3] = torch._C._cuda_getCurrentRawStream(self._device.index)
        try:
            self._run(*prepared)
        except (TypeError, AttributeError):  # before anything is launched: this Triton's launchers take other arguments
            self._run, self._places = None, []
            self._through_the_front_end(grid, values)

    def _through_the_front_end(self, grid: tuple[int, int, int], values: tuple[torch.Tensor, ...]) -> None:
        arguments = {**self._arguments, **dict(zip(self._varying, values, strict=True))}
        if self._device.type != "cuda":
            self._kernel[grid](**arguments, **self._options)
            return
        with torch.cuda.device(self._device):
            compiled = self._kernel[grid](**arguments, **self._options)
        if self._run is not None or not self._places or any(value.data_ptr() & 15 for value in values):
            return
        if compiled is None or not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
            return
        rest = (arguments[name] for name in self._kernel.arg_names)
        self._values = [
            *(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None),
            *(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in rest),
        ]
        self._run, self._compiled = compiled.run, compiled  # which has to live as long


_NUM_BEFORE = 9  # grid (3), stream, function, packed metadata, launch metadata, hooks (2)
