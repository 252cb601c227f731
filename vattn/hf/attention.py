"""vattn's attention in models of transformers, for the K and V that a ``VirtualCache`` returned and for nothing else.

A model looks its attention up by name (``config._attn_implementation``) in transformers' registry, or by its own
function where that name is ``"eager"``. vattn registers functions under transformers' own names, when ``vattn.hf`` is
imported and for good, that call what was there before unless K and V are those that a ``VirtualCache`` just returned.
So no config and no model knows of vattn: what others read, save, copy, compile or check is what it would be without,
and there is nothing to restore. Names of vattn's own in the config would be seen by all of them.

The eager functions are in no registry, and a registered ``"eager"`` would not be told which model's it stands for. But
the registry's ``get_interface`` is, so vattn's answers in front of it: only to the lookup that follows an ``update``.

Whatever vattn does not compute itself goes to the function that it stands for, with K, V and the mask as any cache
would give them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import LEFT_PADDING, SINKS, SOFTCAP, AttentionBackend, AttentionBatch, choose, declared
from ..errors import ConfigError
from ..memory.tensors import upload
from .layer import VirtualLayer, take_note
from .masks import LazyMask, register_masks
from .passes import implementation
from .storage import Storage
from .usual import is_usual

__all__ = ["register"]

# What attention is called with besides Q, K, V and the mask that vattn's backends know, or may overlook. With anything
# else the call is passed on; so it is where sdpa is given what it would leave out or refuse.
KNOWN = {"sliding_window", "softcap", "s_aux", "is_causal"}
_NOT_OF_SDPA = {"softcap", "s_aux"}
OVERLOOKED = {
    *("position_ids", "cache_position", "position_embeddings", "past_key_values", "cache", "use_cache", "layer_idx"),
    *("output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
}


def attend(
    function: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> Any:
    """transformers' attention interface in front of ``function``: q ``[batch, heads, new, head_dim]`` and K and V
    ``[batch, num_kv_heads, tokens, head_dim]`` -> ``[batch, new, heads, v_head_dim]``.

    K and V that a ``VirtualCache`` returned are read where they lie; everything else is passed on.
    """
    layer = getattr(key, "_vattn_layer", None)
    if not isinstance(layer, VirtualLayer):
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
    if torch.compiler.is_compiling():
        return _attend_uncompiled(
            function, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    layer.storage.awaits_attention = False
    if _is_known(layer, module, query, key, value, attention_mask, dropout, options) and _stands_for(
        function, module, query, key, value, attention_mask, scaling, options
    ):
        starts = attention_mask.starts if isinstance(attention_mask, LazyMask) else None
        out = _attend(layer, starts, query, key, value, scaling, options)
        if out is not None:
            return out, None
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.dense
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)


@torch.compiler.disable  # vattn's launches are not the compiler's business
def _attend_uncompiled(*args: Any, **kwargs: Any) -> Any:
    return attend(*args, **kwargs)


def _is_known(
    layer: VirtualLayer,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    dropout: float,
    options: dict[str, Any],
) -> bool:
    """Whether vattn's backends compute what is asked for: of K and V as they were returned, with a mask that is as the
    layer's, and with options that they know."""
    for name, given in options.items():
        if given is not None and given is not False and name not in KNOWN and name not in OVERLOOKED:
            return False
    if isinstance(mask, LazyMask):
        one, end = mask.layer, mask.end
        if one.storage is not layer.storage or one.window != layer.window or end != layer.length:
            return False
    elif mask is not None or not (query.shape[2] == 1 or query.shape[2] == key.shape[2]):
        return False  # sdpa would attend to the first keys
    return (
        getattr(value, "_vattn_layer", None) is layer
        and query.shape[2] == layer.num_new
        and query.dtype == key.dtype
        and not (dropout and module.training)
        and options.get("sliding_window") in (None, layer.window)
        and options.get("is_causal") is not False
        and getattr(module, "is_causal", True)
        and not getattr(getattr(module, "config", None), "output_attentions", False)
    )


def _stands_for(
    function: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: LazyMask | None,
    scaling: float | None,
    options: dict[str, Any],
) -> bool:
    """Whether vattn computes what ``function`` would: transformers' own, or one of a model that does as usual."""
    if function is sdpa_attention_forward:
        return all(options.get(name) is None for name in _NOT_OF_SDPA)
    if function is flash_attention_forward:
        return True
    if mask is None and query.shape[2] > 1:
        return False  # which is not causal without one
    return is_usual(function, module, query, key, value, scaling, options)


def _attend(
    layer: VirtualLayer,
    starts: tuple[int, ...] | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """``[batch, new, heads, v_head_dim]``, or None where the model's own attention is as good."""
    softcap, sinks, storage = options.get("softcap"), options.get("s_aux"), layer.storage
    wanted = (softcap is not None, sinks is not None, starts is not None)
    size, num_heads, new, head_dim = query.shape
    if starts is not None and storage.is_hybrid and max(starts) > layer.length - new:
        return None  # of a query that is padding, recurrent layers see what attention makes of it
    if new == 1:
        # All sequences are equally long, and the one query of each sees just what update returned, window or not.
        out = layer.attend_step(query, scaling, softcap=softcap, sinks=sinks, starts=starts)
        if out is not None:
            return out
    backend = layer.backends.get(wanted)
    if backend is None:
        features = frozenset(
            name for name, needed in zip((SOFTCAP, SINKS, LEFT_PADDING), wanted, strict=True) if needed
        )
        backend = layer.backends[wanted] = _backend(layer, features)
    if query.is_cuda and not declared(backend, "optimised"):
        return None
    stamp = (storage.version, new, layer.length, starts)
    if storage.batch is None or storage.batch[0] != stamp:
        storage.batch = (stamp, *_build_batch(storage, new, layer.length, starts))
    _, batch, tokens = storage.batch
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


def _backend(layer: VirtualLayer, features: frozenset[str]) -> AttentionBackend:
    """The one that the user asked for, or the best that reads nothing past the end of a sequence."""
    k, v, asked = layer.full_k, layer.full_v, layer.storage.options.attention
    name = None if asked == "auto" else asked
    try:
        return choose(
            *(k.device, k.dtype, k.shape[3]), v_head_dim=v.shape[3], max_over_read=0, features=features, name=name
        )
    except ConfigError as error:
        raise ConfigError(f'{error}; use attention="auto"') from error


def _build_batch(
    storage: Storage, new: int, end: int, starts: Sequence[int] | None
) -> tuple[AttentionBatch, torch.Tensor | None]:
    """The batch of a forward pass.

    Args:
        new: tokens that the pass computes, of each sequence.
        end: tokens that each sequence then has, padding included.
        starts: left padding of each sequence, or None.

    Returns:
        The batch without the padding, and where its packed tokens lie among the ``batch * new`` of the pass (None:
        they are all of them).
    """
    assert storage.kv_cache is not None
    size, device = storage.batch_size, storage.kv_cache.device
    if starts is None:
        return AttentionBatch.build(range(size), [new] * size, [end] * size, device), None
    live = [i for i in range(size) if starts[i] < end]  # a chunk of a prompt may be nothing but padding
    query_lens = [min(new, end - starts[i]) for i in live]
    lengths, firsts = tuple(end - starts[i] for i in live), tuple(starts[i] for i in live)
    batch = AttentionBatch(tuple(live), tuple(query_lens), lengths, device, firsts)
    if batch.num_tokens == size * new:
        return batch, None
    tokens = [i * new + j for i, n in zip(live, query_lens, strict=True) for j in range(new - n, new)]
    return batch, upload(tokens, device, torch.int64)


# -- in front of transformers' functions -----------------------------------------------------------------------------
def register() -> None:
    """Stand in front of transformers' functions, under their names; not of what a user has put in their place."""
    register_masks()
    own: dict[str, Callable[..., Any]] = {"sdpa": sdpa_attention_forward}
    own |= dict.fromkeys(("flash_attention_2", "flash_attention_3"), flash_attention_forward)
    for name, function in own.items():
        if ALL_ATTENTION_FUNCTIONS.get(name) is function:
            AttentionInterface.register(name, partial(attend, function))
    look_up = ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """As transformers'; what a model computes itself, right after its K and V went into a ``VirtualCache``, goes by
        way of ``attend``."""
        function = look_up(implementation(attn_implementation), default)
        if torch.compiler.is_compiling() or function is not default or not take_note():
            return function
        return partial(attend, function)

    ALL_ATTENTION_FUNCTIONS.get_interface = get_interface  # type: ignore[method-assign]
