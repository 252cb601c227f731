"""In what ways a Llama computes a decode step: kernels of two kinds, or one persistent kernel."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

import torch

from vattn.attention import AttentionBackend, DecodeBatch
from vattn.attention.base import Backend
from vattn.ops.persistent_step import PersistentStep, StepLayer, StepShape, persistent_unavailable

from .config import LlamaConfig

if TYPE_CHECKING:
    from vattn.kv_cache import KVCache

    from .fused_llama import FusedLlama

__all__ = ["Compute", "persistent_step", "step_shape", "ways_of"]

Compute = Callable[[torch.Tensor, DecodeBatch, AttentionBackend], torch.Tensor]


def ways_of(model: FusedLlama, batch: int, cache: KVCache) -> dict[str, Compute]:
    """See ``FusedLlama.ways``."""

    def own(residual: torch.Tensor, batch: DecodeBatch, attention: AttentionBackend) -> torch.Tensor:
        return model.decode(residual, batch, cache, attention)

    def plain(residual: torch.Tensor, batch: DecodeBatch, attention: AttentionBackend) -> torch.Tensor:
        attention = attention.tuned({}, pdl=False) if isinstance(attention, Backend) else attention
        return without.decode(residual, batch, cache, attention)

    step: PersistentStep | None = None

    def persistent(residual: torch.Tensor, batch: DecodeBatch, attention: AttentionBackend) -> torch.Tensor:
        nonlocal step
        if step is None:
            step = persistent_step(model, cache, batch.batch_size)
        return step(residual, batch.slots_int32, batch.rows_int32)

    ways: dict[str, Compute] = {"kernels": own}
    if model.ops.plain is not None:
        without = copy(model)
        without.ops = model.ops.plain
        ways = {"kernels": plain, "dependent launch": own}
    same_dtype = cache.layout.dtype == model.dtype
    if same_dtype and persistent_unavailable(model.device, model.dtype, step_shape(model.config), batch) is None:
        ways["persistent"] = persistent
    return ways


def persistent_step(model: FusedLlama, cache: KVCache, max_tokens: int) -> PersistentStep:
    """``decode`` over this cache as one kernel.

    Args:
        max_tokens: of a step.

    Raises:
        ConfigError: there is none for the model, the GPU, or so many tokens.
    """
    layers = [
        StepLayer(**{name: getattr(layer, name) for name in vars(layer)}, k=cache.k(index), v=cache.v(index))
        for index, layer in enumerate(model.layers)
    ]
    norm, output, config = model.model.norm.weight, model.model.output_weight, model.config
    return PersistentStep(step_shape(config), layers, norm, output, model.table, config.rms_norm_eps, max_tokens)


def step_shape(config: LlamaConfig) -> StepShape:
    return StepShape(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        layers=config.num_layers,
    )
