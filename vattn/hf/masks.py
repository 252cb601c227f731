"""Masks of a ``VirtualCache``: tensors whose elements are made when somebody reads them.

transformers finds the function that makes a model's masks in a registry. vattn registers its own in front of
transformers' functions, and calls them for any other cache. For a ``VirtualCache`` a mask mostly says how long the
sequences are and how much of each is padding. vattn's attention needs just these numbers. So the mask is a
``LazyMask``: a tensor whose elements do not exist before an operation reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
)

from .layer import MaskLength, VirtualLayer

__all__ = ["LazyMask", "register_masks"]

# What describes a tensor without its elements: these functions, and all attributes but the tensors in _ELEMENTS. The
# compiler may be given a mask among a layer's arguments, and wants these to agree with one another.
_LOOKS = {
    getattr(torch.Tensor, name)
    for name in ("dim", "size", "stride", "storage_offset", "is_contiguous", "__len__", "is_floating_point")
}
_ELEMENTS = {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real", "imag")}


class LazyMask(torch.Tensor):
    """A mask whose elements are made when an operation reads them. A model can do with it what it does with any mask.

    Attributes:
        layer: one of the layers that it is for.
        end: tokens of each sequence after this pass.
        starts: left padding of each sequence, or None where there is none.
        dense: the mask that transformers would have made; None where it makes none.
    """

    layer: VirtualLayer
    end: int
    starts: tuple[int, ...] | None
    make: Callable[..., torch.Tensor | None]

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        layer: VirtualLayer,
        end: int,
        starts: tuple[int, ...] | None,
        make: Callable[..., torch.Tensor | None],
    ) -> LazyMask:
        """A tensor of one element that looks like one of this shape.

        Args:
            make: makes the elements; its argument ``allow_is_causal_skip`` is False where there has to be a mask.
        """
        mask = torch.zeros((), dtype=dtype, device=device).expand(shape).as_subclass(cls)
        mask.layer, mask.end, mask.starts, mask.make = layer, end, starts, make
        return mask

    @cached_property
    def dense(self) -> torch.Tensor | None:
        return self.make(allow_is_causal_skip=True)

    @cached_property
    def _elements(self) -> torch.Tensor | None:
        return self.make(allow_is_causal_skip=False) if self.dense is None else self.dense

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """PyTorch's hook of tensor subclasses: every operation on one comes here."""
        if func in _LOOKS or (getattr(func, "__name__", "") == "__get__" and func not in _ELEMENTS):
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*_made(args), **_made(kwargs or {}))


def _made(value: Any) -> Any:
    """The same, with every ``LazyMask`` in it made."""
    if isinstance(value, LazyMask):
        return value._elements
    if isinstance(value, dict):
        return {key: _made(each) for key, each in value.items()}
    return type(value)(map(_made, value)) if type(value) in (tuple, list) else value


def mask_for(
    function: Callable[..., Any],
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **others: Any,
) -> Any:
    """transformers' mask interface, in front of ``function``, which makes the masks of any other cache."""
    layer = kv_length.layer if isinstance(kv_length, MaskLength) else None
    if layer is not None and attention_mask is not None:
        layer.storage.note_mask(attention_mask)
    make = partial(
        function,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length if layer is None else int(kv_length),
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **others,
    )
    # What a model has added to the pattern (images, prefixes) may not be skipped.
    if layer is None or layer.chunked or layer.window != local_size or not allow_is_causal_skip:
        return make(allow_is_causal_skip=allow_is_causal_skip)
    starts = None
    if attention_mask is not None:
        starts = _left_padding(attention_mask, batch_size, layer.length + q_length)
        if starts is None:
            return make(allow_is_causal_skip=True)
        starts = starts if any(starts) else None
    if starts is None:
        make = partial(make, attention_mask=None)  # it masks nothing
        fits = local_size is None or layer.length + q_length < local_size
        if function is flash_attention_mask or (function is sdpa_mask and fits and (q_length == 1 or not layer.length)):
            return make(allow_is_causal_skip=True)  # no mask at all
    dtype = others.get("dtype", torch.float32) if function is eager_mask else torch.bool
    device = others.get("device", "cpu") if attention_mask is None else attention_mask.device
    between = () if function is flash_attention_mask else (1, q_length)
    shape = (batch_size, *between, int(kv_length))
    return LazyMask.of(shape, dtype, device, layer, layer.length + q_length, starts, make)


def _left_padding(attention_mask: torch.Tensor, batch_size: int, num_tokens: int) -> tuple[int, ...] | None:
    """How many zeros each row of a ``[batch, tokens]`` mask begins with; None if there are zeros later, or no ones."""
    if attention_mask.shape != (batch_size, num_tokens):
        return None
    # Here the host waits for the device; the usual answer takes one kernel.
    if attention_mask.all():
        return (0,) * batch_size
    ones = attention_mask.to(torch.bool)
    firsts, counts = torch.stack([ones.to(torch.int8).argmax(-1), ones.sum(-1)]).tolist()
    starts = tuple(first if count else num_tokens for first, count in zip(firsts, counts, strict=True))
    if any(start + count != num_tokens for start, count in zip(starts, counts, strict=True)):
        return None
    return starts if min(starts) < num_tokens else None


def register_masks() -> None:
    """Register in front of transformers' functions, under their names; a user's own functions stay."""
    own = {"sdpa": sdpa_mask, "eager": eager_mask}
    own |= dict.fromkeys(("flash_attention_2", "flash_attention_3"), flash_attention_mask)
    for name, function in own.items():
        if ALL_MASK_ATTENTION_FUNCTIONS.get(name) is function:
            AttentionMaskInterface.register(name, partial(mask_for, function))
