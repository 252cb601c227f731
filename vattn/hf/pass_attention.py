"""What transformers calls in a pass of a ``TransformersModel``: a cache that appends, attention that reads in place.

Both are registered with transformers by documented names, and find the pass in ``passes.current``. What a model asks of
them is noted once, in a pass that computes nothing: ``Recording``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import SINKS, SOFTCAP
from ..errors import ConfigError
from .attention import KNOWN, OVERLOOKED
from .passes import IMPLEMENTATIONS, Pass, current
from .shapes import ConfiguredLayer, LayerShape

__all__ = ["PassLayer", "Recording", "implementation_for", "pass_layers"]


class Recording(Pass):
    """A pass that computes no attention and notes what layers ask for.

    Args:
        rows: ``[T]`` int64, of its tokens.

    Attributes:
        shapes: of K and V, by layer.
        windows: that each layer was given, by layer: by its mask and its options.
        dtype: of K and V.
        features: that attention needs, of SOFTCAP and SINKS.
        num_heads: query heads, of the layer that has most.
        late: layers whose attention reads other K and V than ``update`` was given.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.slots, self.rows, self.num_tokens, self.parts = torch.zeros_like(rows), rows, len(rows), []
        self.shapes: dict[int, LayerShape] = {}
        self.windows: dict[int, set[int | None]] = {}
        self.dtype = torch.float32
        self.features: frozenset[str] = frozenset()
        self.num_heads = 1
        self.late: set[int] = set()

    def window(self, layer: int) -> int | None:
        """None: it is not known yet."""
        return None

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Note the shapes."""
        if k.shape[0] != self.num_tokens:
            raise ConfigError(f"layer {layer} caches {k.shape[0]} tokens of {self.num_tokens}")
        self.shapes[layer] = LayerShape(k.shape[1], k.shape[2], v.shape[2])
        self.dtype = v.dtype

    def attend(self, layer: int, q: torch.Tensor, *, scale: float, window: int | None = None, **extras: Any) -> Any:
        """Zeros."""
        for name, feature in (("softcap", SOFTCAP), ("sinks", SINKS)):
            if extras.get(name) is not None:
                self.features |= {feature}
        self.num_heads = max(self.num_heads, q.shape[1])
        return q.new_zeros(*q.shape[:2], self.shapes[layer].v_head_dim)

    def mask(self, local_size: int | None, is_causal: bool, device: torch.device) -> torch.Tensor:
        """A mask that nobody reads, which tells a layer's attention what pattern the model wants."""
        if not is_causal:
            raise ConfigError("its attention has another pattern than causal, or causal in a window")
        mask = torch.zeros(1, 1, self.num_tokens, self.num_tokens, dtype=torch.bool, device=device)
        mask._vattn_window = local_size  # type: ignore[attr-defined]
        return mask

    def check(self, module: torch.nn.Module, layer: int, mask: Any, options: dict[str, Any]) -> None:
        """Note the window; ConfigError for what vattn's backends do not compute."""
        unknown = [
            name
            for name, given in options.items()
            if given is not None and given is not False and name not in KNOWN | OVERLOOKED
        ]
        if unknown:
            raise ConfigError(f"its attention takes options that vattn does not know: {', '.join(unknown)}")
        if options.get("is_causal") is False or not getattr(module, "is_causal", True):
            raise ConfigError("its attention is not causal")
        noted = self.windows.setdefault(layer, set())
        if hasattr(mask, "_vattn_window"):
            noted.add(mask._vattn_window)
        if options.get("sliding_window") is not None:
            noted.add(options["sliding_window"])


# -- the cache -------------------------------------------------------------------------------------------------------
class PassLayer(CacheLayerMixin):
    """One layer: K and V of the pass's tokens go to its cache, and attention is told whose they are.

    Args:
        index: in the model.
        num_layers: of the model.
        window: sliding window, None for none.

    Attributes:
        is_late: whether the model makes other K and V of those that it gives here before attention reads them, as from
            latent ones (DeepSeek) or with halves of V (DiffLlama). The cache then holds what attention reads, which a
            token always has the same of: for each call of attention in a layer of its own.
    """

    def __init__(self, index: int, num_layers: int, window: int | None) -> None:
        super().__init__()
        self.index, self.num_layers, self.is_sliding = index, num_layers, window is not None
        self.is_late = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[1, num_kv_heads, T, head_dim]``; they are returned as they came: attention reads the cache."""
        this = current()
        if this is None:
            raise ConfigError("this cache belongs to a TransformersModel, and works in its passes only")
        this.unread = itertools.count(self.index, self.num_layers)
        if not self.is_late:
            this.append(self.index, *_packed(key_states, value_states))
            key_states._vattn_layer_index = value_states._vattn_layer_index = self.index  # type: ignore[attr-defined]
        return key_states, value_states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory is the runtime's."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a text that begins with the pass."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: where each token stands is in its position."""
        return 0

    def get_max_length(self) -> int:
        """No maximum here; the runtime has one."""
        return -1


def pass_layers(num_layers: int, configured: dict[int, ConfiguredLayer]) -> list[PassLayer]:
    """Of the cache that every pass of a model is given.

    Args:
        num_layers: of the model.
        configured: those of attention.
    """
    windows = {index: layer.window for index, layer in configured.items()}
    return [PassLayer(index, num_layers, windows.get(index)) for index in range(num_layers)]


def _packed(*states: torch.Tensor) -> Iterator[torch.Tensor]:
    """``[1, heads, T, head_dim]`` -> ``[T, heads, head_dim]``."""
    return (each.squeeze(0).transpose(0, 1) for each in states)


# -- attention -------------------------------------------------------------------------------------------------------
def implementation_for(original: str) -> str:
    """vattn's name for attention that computes passes, and is ``original`` outside of them; registered on first use."""
    for name, stands_for in IMPLEMENTATIONS.items():
        if stands_for == original:
            return name
    name = f"vattn-runtime-{len(IMPLEMENTATIONS)}"  # models look for "flash" and "sdpa" in names, so it has neither
    AttentionInterface.register(name, partial(_attend, original))
    AttentionMaskInterface.register(name, partial(_mask, original))
    IMPLEMENTATIONS[name] = original
    return name


def _attend(
    original: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> Any:
    """transformers' attention interface: q ``[1, heads, T, head_dim]`` -> ``[1, T, heads, v_head_dim]``."""
    this = current()
    if this is None:  # looked up by another way than the registry's ``get_interface``
        if original not in ALL_ATTENTION_FUNCTIONS:
            raise ConfigError("its own attention cannot be reached while a TransformersModel runs it: close that first")
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[original]
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
    layer = getattr(key, "_vattn_layer_index", None)
    if layer is None or getattr(value, "_vattn_layer_index", None) != layer:
        layer = next(this.unread, None)
        if layer is None:
            raise ConfigError("its attention reads K and V that it does not cache")
        if isinstance(this, Recording):
            this.late.add(layer)
        this.append(layer, *_packed(key, value))
    if isinstance(this, Recording):
        this.check(module, layer, attention_mask, options)
    out = this.attend(
        layer,
        *_packed(query),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=this.window(layer),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    return out.unsqueeze(0), None


def _mask(
    original: str,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    device: Any = "cpu",
    **others: Any,
) -> Any:
    """transformers' mask interface: in a pass there is no mask, as attention knows lengths and windows."""
    this = current()
    if isinstance(this, Recording):
        return this.mask(local_size, allow_is_causal_skip, device)
    if this is not None:
        return None
    if original not in ALL_MASK_ATTENTION_FUNCTIONS:
        return others.get("attention_mask")  # as transformers does for attention without masks of its own
    return ALL_MASK_ATTENTION_FUNCTIONS[original](
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, device=device, **others
    )
