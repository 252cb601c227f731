"""Whether captured steps can serve a call of ``generate``, or of the model inside of it; if not, why not."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Container, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..graphs.state import place

__all__ = ["call_reason", "fingerprint", "kept_tensors", "model_reason", "padding_of", "result_class"]

_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}
_PLAIN = {bool, int, float, str, type(None), torch.dtype}
# What a forward pass may be given.
_KNOWN = {
    *("input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep"),
    *("cache", "past_key_values", "tokenizer"),
}


def call_reason(config: GenerationConfig, call: dict[str, Any], own_cache: Any) -> str | None:
    """Why captured steps cannot serve a call of ``generate``, by its arguments alone.

    Args:
        config: all options together.
        call: the arguments.
        own_cache: that the user gave.
    """
    if call.get("custom_generate") is not None:
        return "custom_generate brings a loop of its own"
    mode = config.get_generation_mode(call.get("assistant_model"))
    if mode not in _MODES:
        return f"{mode.value.replace('_', ' ')} asks for the logits of several tokens at once, or for hidden states"
    if own_cache is not None:
        return f"generate() was given a {type(own_cache).__name__}"
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r} asks for another cache"
    if config.use_cache is False:
        return "use_cache=False asks for no cache"
    if getattr(config, "is_assistant", False):
        return "the model assists another one"
    if call.get("synced_gpus"):
        return "synced_gpus spreads the loop over several processes"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            return f"{name} asks for more than a captured step returns"
    if call.get("inputs_embeds") is not None:
        return "inputs_embeds are no tokens"
    return None


def model_reason(model: PreTrainedModel) -> str | None:
    """Why captured steps cannot compute this model as it is now."""
    if model.training:
        return "the model is in training mode (call model.eval())"
    kind = model.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # not of weights on ``meta``
        return "autocast is on"
    if _has_hooks(register_module_forward_hook, register_module_forward_pre_hook):
        return "torch has forward hooks of all modules, which a captured step would not call"
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            return f"{name} is of PEFT, which may switch adapters (merge them: merge_and_unload())"
        if _has_hooks(module.register_forward_hook, module.register_forward_pre_hook):
            return f"{name or 'the model'} has a forward hook, which a captured step would not call"
    return None


def _has_hooks(*registers: Callable[[Callable[..., None]], RemovableHandle]) -> bool:
    """Whether hooks were registered by these, other than those with which transformers collects outputs."""
    for register in registers:
        handle = register(_nothing)  # what it returns knows the others
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in (hooks or {}).values()):
            return True
    return False


def _nothing(*args: Any) -> None:
    """A hook that finds the others."""


def kept_tensors(model: PreTrainedModel) -> dict[tuple[int, str], Any]:
    """Where tensors are that are plain attributes of modules, by (id of the module, name)."""
    return {
        (id(module), name): place(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def fingerprint(model: PreTrainedModel, left_out: Container[tuple[int, str]] = ()) -> tuple[Any, ...]:
    """What differs where a model was moved, converted, or given other modules, weights or settings; not where weights
    changed their values. Fused parts and captured steps keep settings as they were.

    Args:
        left_out: keys of ``kept_tensors`` that do not count: what a forward itself keeps on its module.
    """
    codes = {kind: inspect.getattr_static(kind, "forward", None) for kind in set(map(type, model.modules()))}
    modules = tuple((id(module), id(codes[type(module)]), *_settings(module, left_out)) for module in model.modules())
    places = tuple(map(place, (*model.parameters(), *model.buffers())))
    return modules, places, str(model.config.to_dict())


def _settings(module: torch.nn.Module, left_out: Container[tuple[int, str]]) -> Iterator[Any]:
    """Plain attributes and tensors of a module, and its own forward if it has one."""
    for name, value in vars(module).items():
        if name == "forward":
            yield id(value)
        elif type(value) in _PLAIN:
            yield name, value
        elif isinstance(value, torch.Tensor):
            if (id(module), name) not in left_out:
                yield name, place(value)
        elif type(value) in (tuple, list, dict) and not name.startswith("_") and _is_plain(value):
            yield name, str(value)


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in (tuple, list, dict):
        return all(map(_is_plain, value.values() if kind is dict else value))
    return kind in _PLAIN


def padding_of(call: dict[str, Any], columns: int, known: list[int]) -> list[int] | str:
    """The tokens of padding on the left of each row, or why a forward pass cannot be served.

    Args:
        call: its arguments.
        columns: tokens of each row that the cache has.
        known: the padding of those.
    """
    for name, value in call.items():
        if name not in _KNOWN and value is not None and value is not False:
            return f"the forward pass was given {name}"
    tokens, mask, positions = (call.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if tokens is None or tokens.ndim != 2 or not tokens.numel():
        return "the forward pass was given no tokens [batch, new]"
    if call.get("use_cache") is False:
        return "use_cache=False asks for no cache"
    batch, new = tokens.shape
    keep = call.get("logits_to_keep")
    if new > 1 and not (isinstance(keep, int) and keep == 1):
        return "the forward pass was asked for the logits of several tokens"
    padding = known or [0] * batch
    if mask is not None:
        if mask.shape != (batch, columns + new):
            return f"attention_mask is not [batch, tokens], but {[*mask.shape]}"
        real = mask.cpu().numpy() != 0
        padding = real.argmax(1).tolist()
        if (np.arange(columns + new) >= np.array(padding)[:, None]).tolist() != real.tolist():
            return "attention_mask has holes, or padding that is not on the left"
    if (known and padding != known) or len(padding) != batch:
        return "attention_mask has another padding than the tokens before"
    if max(padding) >= columns + new:
        return "a row is nothing but padding"
    if positions is not None:
        wanted = np.arange(columns, columns + new) - np.array(padding)[:, None]
        given = positions.cpu().numpy()
        if given.ndim != 2 or given.shape[1] != new or (np.where(wanted < 0, wanted, given) != wanted).any():
            return "position_ids are not those of consecutive tokens"
    return padding


def result_class(model: type[torch.nn.Module]) -> type[ModelOutput]:
    """What a model's forward says that it returns, if that can hold logits; else what most do."""
    try:
        found = typing.get_type_hints(model.forward).get("return")
    except Exception:  # an annotation that only a type checker can read
        found = None
    for kind in (found, *typing.get_args(found)):
        if isinstance(kind, type) and issubclass(kind, ModelOutput) and "logits" in inspect.signature(kind).parameters:
            return kind
    return CausalLMOutputWithPast
