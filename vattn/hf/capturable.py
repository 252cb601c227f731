"""Parts of transformers' models that a CUDA graph cannot capture, as they read results on the host, and what stands in.

Rotary embeddings of the kinds ``dynamic`` and ``longrope`` look for the longest text of a pass, and change the
frequencies of all its texts by it. Passes here have texts of many lengths, so they keep to the frequencies of texts
within the model's first context, and texts end there.

Mixtures of experts are computed by transformers' ``ExpertsInterface``. Of its implementations ``eager`` waits for the
GPU, and ``grouped_mm`` does unless torch has a kernel for it: for bfloat16 on GPUs of compute capability 9 and 10.

Some, as Gemma 3n, make a tensor of a number of Python's in every pass, which PyTorch copies from the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from ..attention import DecodeBatch
from .passes import current

__all__ = ["FilledNumbers", "FixedRopes", "capturable_experts"]


# -- numbers ---------------------------------------------------------------------------------------------------------
class FilledNumbers(TorchFunctionMode):
    """Inside, ``torch.tensor(0.5, device=...)`` is filled by its device, and no copy from the CPU. So is what ``to``
    makes of a single number of the CPU.

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
        is_number = len(args) == 1 and type(args[0]) in (bool, int, float)
        if func in (torch.tensor, torch.as_tensor) and is_number and given.get("device") is not None:
            self.count += 1
            return torch.full((), args[0], **given)
        if func is torch.Tensor.to and args[0].dim() == 0 and args[0].device.type == "cpu":
            where = [each for each in (*args[1:], given.get("device")) if isinstance(each, (str, torch.device))]
            kind = [each for each in (*args[1:], given.get("dtype")) if isinstance(each, torch.dtype)]
            if where and torch.device(where[0]).type != "cpu":
                self.count += 1
                return torch.full((), args[0].item(), dtype=(kind or [args[0].dtype])[0], device=where[0])
        return func(*args, **given)


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
