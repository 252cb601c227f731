"""vattn's attention and mask functions for transformers, and how a model's config is switched to them and back.

transformers looks the attention of a model up by name, ``config._attn_implementation``, in two registries: one for
attention, one for masks. vattn's names say what they stand in front of: ``vattn_sdpa`` passes on to ``sdpa`` whatever
it does not handle itself, another cache's tensors above all.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import LEFT_PADDING, SINKS, SOFTCAP, AttentionBatch
from ..errors import ConfigError
from .backends import build_batch, choose_backend
from .layer import MaskLength, VirtualLayer
from .model_code import looks_attention_up, reader_of

__all__ = ["is_switched", "restore_attention", "switch_attention"]

_PREFIX = "vattn_"
# FlashAttention's own functions read config._attn_implementation, so what vattn passes on goes to the others.
_STANDS_FOR = {"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "sdpa", "flash_attention_3": "sdpa"}


# What attention is called with besides Q, K and V that vattn's backends know, or may overlook. With anything else the
# call is passed on.
_KNOWN = {"sliding_window", "softcap", "s_aux", "is_causal"}
_OVERLOOKED = {
    *("position_ids", "cache_position", "position_embeddings", "past_key_values", "use_cache", "layer_idx"),
    *("output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
}


@dataclass
class _Mask:
    """What stands for a mask of a ``VirtualCache``, as an attribute of the tensor that models pass along.

    Attributes:
        starts: left padding of each sequence, or None where there is none.
        make_dense: makes the mask that the attention passed on to would have had.
        handles: whether vattn's attention may stand in for what this pass would call; None before the first layer.
        batch: of the pass, with its (storage's version, new, tokens): made by the first layer, for all of them.
    """

    starts: tuple[int, ...] | None
    make_dense: Callable[[], torch.Tensor | None]
    handles: bool | None = None
    batch: tuple[tuple[int, int, int], AttentionBatch, torch.Tensor | None] | None = None

    @cached_property
    def dense(self) -> torch.Tensor | None:
        """That mask, made once for all layers that pass on."""
        return self.make_dense()


@torch.compiler.disable  # see _attend_uncompiled
def mask_for(
    passes_on_to: str,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: a tensor that carries a ``_Mask`` where that says it all, else the mask itself."""
    dense = partial(
        ALL_MASK_ATTENTION_FUNCTIONS[passes_on_to],
        batch_size=batch_size,
        q_length=q_length,
        kv_length=int(kv_length),
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **others,
    )
    layer = kv_length.layer if isinstance(kv_length, MaskLength) else None
    # Masks of a model's own making (images, prefixes) may not be skipped; layers that share K and V cut their masks.
    shares = getattr(others.get("config"), "num_kv_shared_layers", None)
    if layer is None or layer.chunked or layer.window != local_size or not allow_is_causal_skip or shares:
        return dense(allow_is_causal_skip=allow_is_causal_skip)
    starts = None
    if attention_mask is not None:
        padding = _left_padding(attention_mask, batch_size, layer.length + q_length)
        if padding is None:
            return dense(allow_is_causal_skip=allow_is_causal_skip)
        starts = padding if any(padding) else None
    # Of four dimensions, for models that look whether a mask is one already.
    tensor = torch.empty((batch_size, 1, q_length, 0), dtype=torch.bool)
    mask = _Mask(starts, partial(dense, allow_is_causal_skip=allow_is_causal_skip))
    tensor._vattn_mask = mask  # type: ignore[attr-defined]
    layer.storage.stand_in_for = layer.length + q_length
    return tensor


def _left_padding(attention_mask: torch.Tensor, batch_size: int, num_tokens: int) -> tuple[int, ...] | None:
    """Zeros before the first one of each row of a ``[batch, tokens]`` mask; None if there are others, or no ones."""
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


def attend(
    passes_on_to: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: q ``[batch, heads, new, head_dim]`` -> ``[batch, new, heads, v_head_dim]``.

    K and V that a ``VirtualCache`` returned are read where they lie; everything else is passed on.
    """
    if torch.compiler.is_compiling():
        return _attend_uncompiled(
            passes_on_to, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    layer: VirtualLayer | None = getattr(key, "_vattn_layer", None)
    mask: _Mask | None = getattr(attention_mask, "_vattn_mask", None)
    if layer is not None:
        if mask is not None and mask.handles is None:
            mask.handles = _stands_in(passes_on_to, module)
        plain = mask is not None and mask.handles and _is_plain(layer, module, query, key, value, dropout, options)
        if plain and layer.reader is None and getattr(module, "config", None) is layer.storage.config:
            layer.reader = reader_of(type(module).forward)
        if plain:
            assert mask is not None
            out = _attend(layer, mask, query, key, value, scaling, options)
            if out is not None:
                return out, None
        layer.storage.write_pending()
    if mask is not None:
        attention_mask = mask.dense
    elif layer is not None and attention_mask is not None and attention_mask.numel() == 0:
        raise ConfigError(
            "the attention mask was copied on its way through the model (to another device?) and lost what it stands "
            "for; make the VirtualCache with attention=None"
        )
    function = _function(passes_on_to, module)
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)


@torch.compiler.disable  # attend finds a tensor's layer and mask by attributes, which traced tensors do not have
def _attend_uncompiled(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return attend(*args, **kwargs)


def _is_plain(
    layer: VirtualLayer,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    options: dict[str, Any],
) -> bool:
    """Whether vattn's backends compute what was asked for: of K and V as they were returned, with options they know."""
    for name, given in options.items():
        if given is not None and given is not False and name not in _KNOWN and name not in _OVERLOOKED:
            return False
    return (
        getattr(value, "_vattn_layer", None) is layer
        and query.shape[2] == layer.num_new
        and query.dtype == key.dtype
        and not (dropout and module.training)
        and options.get("sliding_window") in (None, layer.window)
        and options.get("is_causal") is not False
        and getattr(module, "is_causal", True)
    )


def _attend(
    layer: VirtualLayer,
    mask: _Mask,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """``[batch, new, heads, v_head_dim]``, or None where the model's own attention is as good."""
    softcap, sinks, starts = options.get("softcap"), options.get("s_aux"), mask.starts
    wanted = (softcap is not None, sinks is not None, starts is not None)
    size, num_heads, new, head_dim = query.shape
    if starts is not None and layer.storage.is_hybrid and max(starts) > layer.length - new:
        return None  # of a query that is padding, recurrent layers see what attention makes of it
    if new == 1:
        # All sequences are equally long, and the one query of each sees just what update returned, window or not.
        out = layer.attend_step(query, scaling, softcap=softcap, sinks=sinks, starts=starts)
        if out is not None:
            return out
    if new == 1 and layer.uniform_decode is not None and wanted == (False, False, False):
        return layer.uniform_decode(query, key, value, scaling).transpose(1, 2)
    backend = layer.backends.get(wanted)
    if backend is None:
        assert layer.shape is not None
        features = frozenset(
            name for name, needed in zip((SOFTCAP, SINKS, LEFT_PADDING), wanted, strict=True) if needed
        )
        backend = layer.backends[wanted] = choose_backend(layer.storage, layer.shape, features)
    if backend.name == "reference" and query.is_cuda:
        return None
    stamp = (layer.storage.version, new, layer.length)
    if mask.batch is None or mask.batch[0] != stamp:
        mask.batch = (stamp, *build_batch(layer.storage, new, layer.length, starts))
    _, batch, tokens = mask.batch
    packed = query.squeeze(2) if new == 1 else query.transpose(1, 2).reshape(size * new, num_heads, head_dim)
    if tokens is not None:
        packed = packed[tokens]
    extras = {"softcap": softcap, "sinks": sinks} if wanted[0] or wanted[1] else {}
    scale = head_dim**-0.5 if scaling is None else scaling
    out = backend(packed, layer.full_k, layer.full_v, batch, scale=scale, window=layer.window, **extras)
    if tokens is not None:
        # What padding computes is seen by nothing: its K and V are masked wherever it could be.
        out = out.new_zeros(size * new, *out.shape[1:]).index_copy_(0, tokens, out)
    return out.unsqueeze(1) if new == 1 else out.view(size, new, num_heads, -1)


def _stands_in(name: str, module: torch.nn.Module) -> bool:
    """Whether the attention of that name is transformers' own, or the model's, and its result is all that is wanted.

    Who puts a function of his in its place (to steer heads, or watch them) wants that called.
    """
    function = _function(name, module)
    homes = ("transformers", *(kind.__module__ for kind in type(module).__mro__))
    home = getattr(function, "__module__", None) or ""
    replaced = hasattr(function, "__wrapped__") or not (home in homes or home.startswith("transformers."))
    return not replaced and not getattr(getattr(module, "config", None), "output_attentions", False)


def _function(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    """transformers' attention of that name; eager attention is a function of each model's own."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ConfigError(f"{type(module).__name__} has no eager attention; load the model with attn_implementation='sdpa'")


# -- switching -------------------------------------------------------------------------------------------------------
for _name in sorted(set(_STANDS_FOR.values())):
    AttentionInterface.register(_PREFIX + _name, partial(attend, _name))
    AttentionMaskInterface.register(_PREFIX + _name, partial(mask_for, _name))


@dataclass
class _Switched:
    config: weakref.ref[PreTrainedConfig]
    previous: str
    num_users: int


_LOCK = threading.RLock()  # a collection that starts in here may end caches, and come back
_SWITCHED: dict[int, _Switched] = {}


def switch_attention(config: PreTrainedConfig) -> str | None:
    """Set vattn's attention in a decoder's config; each call is undone by one ``restore_attention``.

    Returns:
        The name that was set before; None, and nothing changed, where the model does not look its attention up.
    """
    looks_it_up = looks_attention_up(config)  # imports the model's module: not while holding the lock
    with _LOCK:
        current = config._attn_implementation or ""
        entry = _SWITCHED.get(id(config))
        if entry is not None and entry.config() is config and current.startswith(_PREFIX):
            entry.num_users += 1
            return entry.previous
        previous = current.removeprefix(_PREFIX)  # of a config copied while it was switched
        if previous not in _STANDS_FOR or not looks_it_up:
            return None
        _SWITCHED[id(config)] = _Switched(weakref.ref(config), previous, 1)
        config._attn_implementation = _PREFIX + _STANDS_FOR[previous]
        return previous


def is_switched(config: PreTrainedConfig) -> bool:
    """Whether models of this config call vattn's attention at present."""
    return (config._attn_implementation or "").startswith(_PREFIX)


def restore_attention(config: PreTrainedConfig) -> None:
    """Set what was there before the first ``switch_attention``, when the last user is gone."""
    with _LOCK:
        entry = _SWITCHED.get(id(config))
        if entry is None or entry.config() is not config:
            return
        entry.num_users -= 1
        if not entry.num_users:
            del _SWITCHED[id(config)]
            if config._attn_implementation == _PREFIX + _STANDS_FOR[entry.previous]:
                config._attn_implementation = entry.previous
