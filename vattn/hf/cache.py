"""``VirtualCache``: a transformers ``Cache`` whose tensors are contiguous, never move and never are copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer

from .. import attention as backends
from ..arguments import optional_int, require_bool, require_int
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..stats import CacheStats
from .configs import decoder_config, layers_of, turns_by_length
from .layer import VirtualLayer
from .prefixes import NUM_STORED, Prefixes
from .storage import Options, Storage

__all__ = ["VirtualCache"]


class VirtualCache(Cache):
    """The KV cache of one batch, for ``model.generate(..., cache=past)`` and ``model(...)``. Versions of transformers
    before 5.24 call the argument ``past_key_values``.

    Each sequence has addresses for ``max_length`` tokens, and memory for the tokens that it has. New K and V are
    written in place, and attention reads them there. Batch size, dtype and device are the model's, found at first use.

    In a forward pass with this cache, vattn's attention takes the place of the model's wherever it computes the same.
    It needs no mask and no repeated K and V. The model and its config stay as they are.

    Args:
        config: of the model, ``model.config``.
        max_length: the most tokens a sequence can have, padding and new ones included; None: the config's
            ``max_position_embeddings``. It costs addresses, not memory.
        device, dtype: of the model, any other is refused; None: found at first use.
        memory_limit: bytes; None: 90 % of what is free at first use.
        page_bytes: as for ``KVCache``.
        attention: ``"auto"``, the name of one of vattn's attention backends, or None to leave the model's own attention
            in place, which then reads the same memory through views.
        prefix_caching: whether sequences can be stored, for ``begin`` to find their rows: ``store`` says how.

    Raises:
        ConfigError: the config is not one of a decoder, or has layers that this cache cannot hold.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_length: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory_limit: int | None = None,
        page_bytes: int | None = None,
        attention: str | None = "auto",
        prefix_caching: bool = False,
    ) -> None:
        text_config = decoder_config(config)
        if max_length is None:
            max_length = getattr(text_config, "max_position_embeddings", None)
            if max_length is None:
                raise ConfigError("this config has no max_position_embeddings: give max_length")
        if attention not in ("auto", None) and backends.get(attention).over_read_tokens:
            raise ConfigError(f"attention {attention!r} reads past the end of a sequence; this cache ends there")
        options = Options(
            require_int("max_length", max_length, 1),
            _device(device),
            dtype,
            optional_int("memory_limit", memory_limit, 1),
            optional_int("page_bytes", page_bytes, 1),
            attention,
            NUM_STORED if require_bool("prefix_caching", prefix_caching) else 0,
        )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ConfigError(f"dtype must be a torch.dtype, got {dtype!r}")
        layers, configured = layers_of(text_config)
        self._config = text_config
        self._assemble(layers, Storage(configured, options))
        if prefix_caching and (text_config is not config or self._storage.is_hybrid or turns_by_length(text_config)):
            raise ConfigError(
                "prefix_caching=True finds rows by their tokens, and this model's depend on more, on images, on a "
                "recurrent state or on the length of the text (dynamic and longrope RoPE): leave it out"
            )

    def _assemble(self, templates: list[Any], storage: Storage) -> None:
        """Layers over the storage: attention layers are replaced, others kept."""
        self._storage, self._prefixes = storage, Prefixes(storage)
        self._virtual = {index: VirtualLayer(storage, index) for index in storage.configured}
        layers = [self._virtual.get(index, template) for index, template in enumerate(templates)]
        super().__init__(layers=layers)
        # Layers that share another's K and V are dummies.
        self._is_hybrid = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
        # RecurrentGemma of older versions keeps its recurrent states itself.
        storage.is_hybrid = self._is_hybrid or "recurrent" in (getattr(self._config, "block_types", None) or ())
        self._torn = False  # whether an operation failed after it had changed some of the layers

    # -- transformers' interface ---------------------------------------------------------------------------------
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V of one layer, ``[batch, num_kv_heads, new, head_dim]``; returns views of what queries see.

        Raises:
            ConfigError, OutOfPages: as ``VirtualLayer.update``.
        """
        if torch.compiler.is_compiling():
            return self._update_uncompiled(key_states, value_states, layer_idx, *args, **kwargs)
        if self._storage.closed or self._torn:
            self._open()
            self._whole()
        if not 0 <= layer_idx < len(self.layers):
            raise ConfigError(f"this cache was made for a model of {len(self.layers)} layers, got layer {layer_idx}")
        layer: Any = self.layers[layer_idx]
        if self._is_hybrid and layer_idx not in self._virtual:
            raise ConfigError(f"layer {layer_idx} of the config that this cache was made for has no K and V")
        if self._storage.awaits_attention and self._storage.options.attention not in ("auto", None):
            self._require_attention()
        try:
            return layer.update(key_states, value_states, *args, **kwargs)
        except BaseException:
            self._torn = self._is_hybrid
            raise

    def _require_attention(self) -> None:
        self._storage.awaits_attention = False
        raise ConfigError(
            f"attention {self._storage.options.attention!r} was not asked for: this model computes its own, or has it "
            'compiled; use attention="auto"'
        )

    @torch.compiler.disable  # compiled, a write through a view may become a copy of all addresses behind it
    def _update_uncompiled(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.update(*args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As transformers': of a recurrent layer, ``[batch, ...]``."""
        self._require_batch(conv_states.shape[0])
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As transformers': of a recurrent layer, ``[batch, ...]``."""
        self._require_batch(recurrent_states.shape[0])
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def _require_batch(self, size: int) -> None:
        self._open()
        self._storage.require_batch(size)

    def crop(self, tokens_to_remove: int = 0, max_length: int | None = None) -> None:
        """Remove the newest tokens of every sequence.

        Args:
            tokens_to_remove: minus their number. A positive number is the length to keep, where the installed
                transformers takes one.
            max_length: another name for the same.

        Raises:
            ConfigError: a positive number, which newer versions of transformers refuse.
        """
        self._open()
        self._whole()
        number = int(tokens_to_remove if max_length is None else max_length)  # some versions give a tensor
        lengths = {index: layer.cropped(number) for index, layer in self._virtual.items()}
        self._others("crop", number)  # first, because recurrent layers cannot
        self._storage.truncate(lengths)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make batch row ``i`` continue row ``beam_idx[i]``, ``[batch]``, in every layer.

        Whole pages are shared, not copied: rows with a common beginning keep it once.

        Raises:
            ConfigError: there are no such rows.
            OutOfPages: no memory for the pages that cannot be shared; call ``reset`` then.
        """
        self._open()
        self._whole()
        size, sources = max(self.batch_size, 0), beam_idx.tolist()
        if beam_idx.shape != (size,):
            raise ConfigError(
                f"beam_idx must name a row for each of the {size} sequences, got a shape of {tuple(beam_idx.shape)}; "
                "batch_select_indices changes the batch's size"
            )
        if any(not 0 <= source < size for source in sources):
            raise ConfigError(f"beam_idx must name rows of a batch of {size}, got {sources}")
        self._torn = True
        self._others("reorder_cache", beam_idx)
        self._storage.reorder(sources)
        self._torn = False

    def reset(self) -> None:
        """Forget every token. Afterwards the batch may be of another size."""
        self._open()
        self._storage.truncate(dict.fromkeys(self._virtual, 0))
        if self._is_hybrid:
            fresh, _ = layers_of(self._config)
            self.layers = [self._virtual.get(index, layer) for index, layer in enumerate(fresh)]
        self._torn = False

    def begin(self, input_ids: torch.Tensor) -> int:
        """Forget every token, and begin a batch with the rows that stored sequences have of its prompts.

        ``generate`` with these ``input_ids`` then computes the rest of them. (Not with ``prompt_lookup_num_tokens``: it
        gives wrong tokens over any cache that holds some of the prompt, transformers' own included.)

        Args:
            input_ids: ``[batch, tokens]``, without padding.

        Returns:
            How many tokens the cache has of each prompt now: as many as there are of every one, and less than all.

        Raises:
            ConfigError: the cache was made without ``prefix_caching=True``, or these are no tokens of a batch.
        """
        self._open()
        tokens = self._prefixes.tokens("begin", input_ids)
        self.reset()
        return self._prefixes.begin(tokens)

    def store(self, token_ids: torch.Tensor) -> None:
        """Keep the rows that the cache has now for a later ``begin``, until this cache needs their memory, or
        ``kv_cache.trim()`` gives it back to the device.

        They share it with the batch, which goes on. The sequence that was used least recently goes first. All go where
        the batch gets another size.

        Args:
            token_ids: ``[batch, tokens]``, what these rows were computed from: the model's input so far, or what
                ``generate`` returned, whose last tokens have no rows yet. They are for the same model: its weights stay
                what they are, adapters included.

        Raises:
            ConfigError: as ``begin``; also where there are fewer tokens than rows, or another number of sequences; and
                where the rows are not of these tokens alone: after beam search, with padding, after half a pass. (With
                ``attention=None`` padding is not seen: do not store it.)
        """
        self._open()
        self._whole()
        self._prefixes.store(self._prefixes.tokens("store", token_ids))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make every sequence ``repeats`` sequences, neighbours in the batch.

        Raises:
            ConfigError: a layer is recurrent and cannot.
            OutOfPages: no memory for them. For a moment the old batch and the new one both exist, each within
                ``memory_limit``.
        """
        repeats = require_int("repeats", repeats, 1)
        self._regroup("batch_repeat_interleave", torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order: indices, negative ones from the end, or a mask over the batch.

        Raises:
            ConfigError, OutOfPages: as ``batch_repeat_interleave``; ConfigError too where there is no such sequence.
        """
        size = max(self.batch_size, 0)
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            if indices.shape != (size,):
                raise ConfigError(f"a mask over the batch must have {size} elements, got {tuple(indices.shape)}")
            indices = indices.nonzero()[:, 0]
        if indices.ndim != 1 or not len(indices) or indices.min() < -size or indices.max() >= size:
            raise ConfigError(f"indices must name sequences of a batch of {size}, got {indices.tolist()}")
        self._regroup("batch_select_indices", indices.long() % size)

    def _regroup(self, method: str, indices: torch.Tensor) -> None:
        self._open()
        self._whole()
        if self._is_hybrid:
            raise ConfigError(f"{method}: this model has layers that are not attention, which cannot")
        self._storage.regroup(indices.tolist())

    def _others(self, method: str, *arguments: Any) -> None:
        """Do the same with layers that are not virtual."""
        for index, layer in enumerate(self.layers):
            if index not in self._virtual:
                getattr(layer, method)(*arguments)

    @property
    def batch_size(self) -> int:
        """Sequences in the batch, -1 before the first use."""
        return self._storage.batch_size

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualCache:
        """The same tokens in memory of their own, as for continuing one prompt in several ways."""
        self._open()
        self._whole()
        if self._is_hybrid:
            raise ConfigError(
                "a cache with layers that are not attention cannot be copied: prefill another, or use transformers' own"
            )
        other = VirtualCache.__new__(VirtualCache)
        other._config = self._config
        other._assemble(list(self.layers), self._storage.copy())
        for index, layer in self._virtual.items():
            other._virtual[index].shape = layer.shape
        return other

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """K, V and the window of each layer, as ``DynamicCache`` gives them; None where there is none."""
        for layer in self.layers:
            window = getattr(layer, "window", None)
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            yield keys, values, None if window is None else torch.tensor(window)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Nothing: layers of this cache are never offloaded."""

    def __copy__(self) -> VirtualCache:
        return copy.deepcopy(self)

    def __reduce__(self) -> Any:
        raise ConfigError("a VirtualCache cannot be pickled; copy.deepcopy copies it within the process")

    # -- vattn's own ---------------------------------------------------------------------------------------------
    @property
    def kv_cache(self) -> KVCache | None:
        """The ``KVCache`` underneath, a slot for each row of the batch and a free one; None before the first use."""
        return self._storage.kv_cache

    def stats(self) -> CacheStats:
        """What the cache has reserved, mapped and used; zeros before the first use.

        Raises:
            ConfigError: the cache is closed.
        """
        self._open()
        if self.kv_cache is None:
            return CacheStats(**{field.name: 0 for field in fields(CacheStats)})
        return self.kv_cache.stats()

    def close(self) -> None:
        """Free the memory. Idempotent; later use raises ConfigError."""
        self._storage.close()
        for layer in self._virtual.values():
            layer.forget()

    def __enter__(self) -> VirtualCache:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _whole(self) -> None:
        if self._torn:
            raise ConfigError("an operation on this cache failed half-way, its layers are apart: call reset()")

    def _open(self) -> None:
        self._storage.require_open()

    def __repr__(self) -> str:
        options = self._storage.options
        return (
            f"VirtualCache(layers={len(self.layers)}, max_length={options.max_length}, batch_size={self.batch_size}, "
            f"tokens={max(self._storage.lengths.values())})"
        )


def _device(device: torch.device | str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be a torch.device or its name, got {device!r}: {error}") from error
