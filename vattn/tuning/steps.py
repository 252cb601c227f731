"""The second half of ``vattn tune``: of kernels that are about as fast alone, those that make the fastest step.

Alone, launches of one kernel follow each other. In a step each kernel begins while the one before it ends, waits for
it, and adds up what it left in parts. So the fastest kernels do not make the fastest step: on an H200 others made steps
of a 1B shape up to 7 % shorter, and those of an 8B shape up to 3 % (probe, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch

from ..attention import AttentionBackend, DecodeBatch, bind, get
from ..kv_cache import KVCache
from ..ops.ops_table import LinearTable, Ops, fused_ops
from ..ops.skinny_linear import LinearConfig
from .measure import filled_cache, graph_us

__all__ = ["StepModel", "choose", "choose_in_steps"]

_LAYERS = 8  # of the model that is timed
_MIN_GAIN = 1.003  # a step must get shorter by this factor, because timings are noisy


class StepModel(Protocol):
    """What computes a step: its operations and layers are exchanged."""

    ops: Ops
    layers: list[Any]

    @property
    def embedding(self) -> torch.Tensor: ...

    def decode(
        self, residual: torch.Tensor, batch: DecodeBatch, cache: KVCache, attention: AttentionBackend
    ) -> torch.Tensor: ...


def choose(options: Sequence[Sequence[Any]], time_us: Callable[[list[Any]], float]) -> tuple[list[Any], float, float]:
    """One of the options at each place: from the first ones on, place after place, what makes the whole faster.

    Args:
        options: for each place.
        time_us: microseconds with one option at each place.

    Returns:
        The options, and microseconds with the first ones and with these. What seems faster is timed again beside what
        is chosen so far, and taken if it still is.
    """
    chosen = [each[0] for each in options]
    first_us = best_us = time_us(chosen)
    for place, each in enumerate(options):
        for option in each[1:]:
            trial = [*chosen[:place], option, *chosen[place + 1 :]]
            if time_us(trial) * _MIN_GAIN < best_us:
                best_us = min(best_us, time_us(chosen))
                if (us := time_us(trial)) * _MIN_GAIN < best_us:
                    chosen, best_us = trial, us
    return chosen, first_us, best_us


def choose_in_steps(
    model: Callable[[int, int], StepModel],
    linear: Sequence[dict[str, Any]],
    attention: Sequence[dict[str, Any]],
    dtype: torch.dtype,
    device: torch.device,
    pdl: bool = False,
    report: Callable[[int, int, float, float], None] = lambda batch, context, before_us, after_us: None,
) -> None:
    """Let the records of a model's products and of its attention name the kernels with which its steps are fastest.

    Products are chosen at the first context of a batch, attention at each. A table has a kernel for a shape: where two
    models share one, what is chosen last stands.

    Args:
        model: called with a number of layers and of positions; it may have fewer layers.
        linear, attention: as ``measure_linear`` and ``measure_attention`` gave them, one record for a case. Their
            runners-up are used up.
        pdl: with programmatic dependent launch.
        report: called with batch, context, and microseconds of a step of at most eight layers before and after.

    Raises:
        torch.OutOfMemoryError, OutOfPages: there is no room for such a step. Records that were not reached name what is
            fastest alone.
    """
    close = {id(record): record.pop("runners_up") for record in (*linear, *attention)}
    fused = model(_LAYERS, max((record["context"] for record in attention), default=0) + 64)
    layers = fused.layers
    for batch, cases in groupby(attention, key=lambda record: record["batch"]):
        products = [record for record in linear if record["tokens"] == batch]
        options = [[(record["config"], record["us"]), *close[id(record)]] for record in products]
        for case in cases:
            backends = [(case["backend"], case["options"]), *close[id(case)]]
            shape = (case["num_kv_heads"], case["head_dim"], dtype, device, batch, case["context"])
            with filled_cache(*shape) as (cache, decode_batch), torch.inference_mode():
                fused.layers = layers[: len(cache.layout.layers)]
                time_us = partial(_step_us, fused, cache, decode_batch, products, pdl)
                (backend, *found), before_us, after_us = choose([backends, *options], time_us)
            case["backend"], case["options"] = backend
            for record, product in zip(products, found, strict=True):
                record["config"], record["us"] = product
            options = [[product] for product in found]
            report(batch, case["context"], before_us, after_us)


def _step_us(
    fused: StepModel,
    cache: KVCache,
    batch: DecodeBatch,
    products: Sequence[dict[str, Any]],
    pdl: bool,
    chosen: Sequence[Any],
) -> float:
    """Microseconds of a step with (a backend and its options, a configuration and its time for each product)."""
    (name, options), *found = chosen
    num_tokens = len(batch.slots_int32)
    entries = {
        (record["outputs"], record["inputs"], record["swiglu"]): {num_tokens: config and LinearConfig(**config)}
        for record, (config, _) in zip(products, found, strict=True)
    }
    fused.ops = fused_ops(LinearTable(entries, pdl))
    backend = bind(get(name).tuned(options, pdl=pdl))
    embeddings = fused.embedding[:1].repeat(num_tokens, 1)
    return graph_us(lambda _: fused.decode(embeddings.clone(), batch, cache, backend), 1, 31)
