"""Parts of transformers' models that a CUDA graph cannot capture, as they read results on the host, and what stands in.

Rotary embeddings of the kinds ``dynamic`` and ``longrope`` look for the longest text of a pass, and change the
frequencies of all its texts by it. Passes here have texts of many lengths, so they keep to the frequencies of texts
within the model's first context, and texts end there.

Mixtures of experts are computed by transformers' ``ExpertsInterface``. Of its implementations ``eager`` waits for the
GPU, and ``grouped_mm`` does unless torch has a kernel for it: for bfloat16 on GPUs of compute capability 9 and 10.

Some, as Gemma 3n, make a tensor of a number of Python's in every pass, or keep a number in a tensor of the CPU. PyTorch
copies it from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from ..attention import DecodeBatch
from .passes import current

__all__ = ["FilledNumbers", "FixedRopes", "capturable_experts"]


# -- numbers ---------------------------------------------------------------------------------------------------------
_BUILDERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
_MOVERS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.cuda}
# Given a number in a tensor of the CPU, these move it to the device of the others. All else takes it as a parameter. By
# function, the arguments before the first that can be one: what is written to is none, nor is an index.
_TAKERS = {
    torch.where: 0,
    torch.Tensor.where: 0,
    torch.Tensor.copy_: 1,
    torch.Tensor.__setitem__: 2,
    torch.Tensor.index_put_: 2,
    torch.Tensor.index_put: 2,
    torch.index_put_: 2,
    torch.index_put: 2,
}


class FilledNumbers(TorchFunctionMode):
    """Inside, a number that comes to the device is filled by it, and not copied from the CPU: Python's, NumPy's or that
    in a tensor of the CPU without dimensions; made there, as by ``torch.tensor(0.5, device=...)``, moved there, or
    taken by an operation there.

    Attributes:
        count: how many were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _BUILDERS:
            of, device = func is torch.Tensor.new_tensor, given.get("device")
            is_told = of or device is not None
            if device is None:
                device = args[0].device if of else torch.get_default_device()
            data = args[of] if len(args) > of else given.get("obj" if func is torch.asarray else "data")
            if _is_number(data) and (is_told or device.type != "cpu"):
                return self._filled(func(*args, **{**given, "device": "cpu"}), device)
        elif func in _MOVERS and _is_number(args[0]):
            device, dtype = _target(func, [*args[1:], *given.values()])
            if device is not None and device.type != "cpu":
                return self._filled(args[0] if dtype is None else args[0].to(dtype), device)
        elif func in _TAKERS:
            tensors = [each for each in (*args, *given.values()) if isinstance(each, torch.Tensor)]
            there = next((each.device for each in tensors if each.device.type != "cpu"), None)
            if there is not None:
                first = _TAKERS[func]
                args = (*args[:first], *(self._taken(each, there) for each in args[first:]))
                given = {name: self._taken(each, there) for name, each in given.items()}
        return func(*args, **given)

    def _taken(self, value: Any, device: torch.device) -> Any:
        return self._filled(value, device) if isinstance(value, torch.Tensor) and _is_number(value) else value

    def _filled(self, number: torch.Tensor, device: Any) -> torch.Tensor:
        self.count += 1
        return torch.full((), number.item(), dtype=number.dtype, device=device)


def _is_number(data: Any) -> bool:
    """Whether it is a single one, and the host has it."""
    if isinstance(data, torch.Tensor):
        return data.dim() == 0 and data.device.type == "cpu"
    return isinstance(data, (bool, int, float, np.generic)) or (isinstance(data, np.ndarray) and not data.ndim)


def _target(func: Any, given: list[Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """Where a tensor is moved by these arguments, and as which type; None where it stays what it is."""
    device = torch.device("cuda") if func is torch.Tensor.cuda else None
    dtype: torch.dtype | None = None
    for each in given:
        if isinstance(each, torch.Tensor):
            device, dtype = each.device, each.dtype
        elif isinstance(each, (str, torch.device)) or type(each) is int:
            device = torch.device(each)
        elif isinstance(each, torch.dtype):
            dtype = each
    return device, dtype


# -- rotary embeddings -----------------------------------------------------------------------------------------------
class FixedRopes:
    """The rotary embeddings of a model that change with the text. To be made when the last text was a short one.

    Attributes:
        limit: tokens of a text up to which their frequencies stay; None where there are none of this kind.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._values: list[tuple[torch.nn.Module, str, Any]] = []
        limits = []
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            found = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
            if not any(isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) for kind in found):
                continue
            fixed = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
            self._values.append((module, "rope_type", fixed))
            with torch.inference_mode(False):  # transformers may write to them in place, outside of it
                self._values += [
                    (module, name, buffer.clone())
                    for name, buffer in module.named_buffers(recurse=False)
                    if name.endswith("inv_freq")
                ]
            limits.append(_first_context(module))
        self.limit: int | None = min(limits, default=None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, they stay as they are for short texts, without looking."""
        before = [(module, name, getattr(module, name)) for module, name, _ in self._values]
        try:
            for module, name, value in self._values:
                setattr(module, name, value)
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


def _first_context(module: Any) -> int:
    """Tokens up to which a rotary embedding keeps its frequencies."""
    parameters = module.config.rope_parameters
    found = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    given = [each["original_max_position_embeddings"] for each in found if "original_max_position_embeddings" in each]
    return int(min([*given, module.config.max_position_embeddings]))


# -- experts ---------------------------------------------------------------------------------------------------------
_NAME = "vattn-runtime"


def capturable_experts(model: PreTrainedModel) -> bool:
    """Let decode steps compute experts without the host, where the model's own way would not; whether that was needed.

    Passes with prompts, and whoever else runs the model meanwhile, get ``grouped_mm``.
    """
    kinds = {name for name in model.get_experts_implementation().values() if name is not None}
    if model.device.type != "cuda" or not kinds <= {"eager", "grouped_mm"}:
        return False
    if kinds == {"grouped_mm"} and _has_grouped_kernel(model):
        return False
    if _NAME not in ALL_EXPERTS_FUNCTIONS:
        ExpertsInterface.register(_NAME, _experts)
    model.set_experts_implementation(_NAME)
    return True


def _has_grouped_kernel(model: PreTrainedModel) -> bool:
    return model.dtype == torch.bfloat16 and torch.cuda.get_device_capability(model.device)[0] in (9, 10)


def _experts(module: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """transformers' experts interface."""
    this = current()
    decodes = this is not None and all(isinstance(batch, DecodeBatch) for batch, _ in this.parts)
    function = ALL_EXPERTS_FUNCTIONS["batched_mm" if decodes else "grouped_mm"]
    out: torch.Tensor = function(module, hidden_states, *args, **kwargs)
    return out
