"""Timing of kernels for ``vattn tune``.

Three kinds of kernels are timed: matrix products of a decode step, attention of a decode step, and attention of a
prefill. Those of a decode step are timed inside a CUDA graph, as the decode loop runs them. Their data is not in the L2
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from ..attention import AttentionBackend, AttentionBatch, DecodeBatch, bind, decode_backends, get
from ..errors import ConfigError
from ..interrupts import GarbageWaits, Uninterrupted
from ..kv_cache import KVCache
from ..layout import KVLayout
from ..ops.skinny_linear import LinearConfig, skinny_linear
from ..ops.swiglu import swiglu
from .candidates import attention_candidates, linear_candidates
from .table import dtype_name

__all__ = [
    "filled_cache",
    "graph_us",
    "measure_attention",
    "measure_linear",
    "measure_prefill",
    "replays_us",
]

PREFILL_BACKENDS = ("flash-attn-3", "flash-attn-2", "torch-varlen")
_BUSY_CYCLES = 2_000_000  # the GPU waits so long, about a millisecond, while the host launches what is timed
_MIN_GAIN = 1.01  # a kernel must be faster than cuBLAS by this factor, because timings are noisy
_COLD_BYTES = 400 << 20  # weights used in turn; they are more than the L2 cache holds


def replays_us(launch: Callable[[int], object], count: int, repeats: int) -> list[float]:
    """Time one launch inside a CUDA graph.

    Args:
        launch: launches the kernel. It is captured as ``launch(0)`` to ``launch(count - 1)``.
        count: launches in the graph.
        repeats: replays of the graph.

    Returns:
        One value per replay: its time in microseconds divided by ``count``.
    """
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        launch(0)  # compiles, and makes workspaces
        stream.synchronize()
        # Not torch.cuda.graph: it collects garbage and empties caches, which takes longer than the measurement.
        with Uninterrupted(), GarbageWaits():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(count):
                    launch(i)
            finally:
                graph.capture_end()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        graph.replay()
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        stream.synchronize()
    return [start.elapsed_time(end) * 1e3 / count for start, end in pairwise(events)]


def graph_us(launch: Callable[[int], object], count: int, repeats: int = 5) -> float:
    """The median of ``replays_us``: microseconds of one launch."""
    return median(replays_us(launch, count, repeats))


def _graph_us_if_it_fits(launch: Callable[[int], object], count: int) -> float | None:
    """``graph_us`` of three replays; None where the kernel's tiles do not fit into this GPU's shared memory."""
    try:
        return graph_us(launch, count, 3)
    except Exception as error:
        if "out of resource" not in str(error):
            raise
        return None


def measure_linear(
    outputs: int,
    inputs: int,
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    kind: str = "plain",
    pdl: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Time the kernels for one matrix product. The weights are read from memory, not from the L2 cache.

    Args:
        outputs, inputs: the weight is ``[outputs, inputs]``.
        tokens: numbers of tokens to time; ``x`` is ``[tokens, inputs]``.
        kind: ``"plain"``: any kernel. ``"whole"``: kernels that do not split the sum over ``inputs``. ``"swiglu"``: as
            ``"whole"``, followed by SwiGLU, which vattn's kernels compute in the same launch.
        pdl: time vattn's kernels with programmatic dependent launch, as a loop runs them.
        report: called with each record.

    Returns:
        A record for each number of tokens: the best configuration (None: cuBLAS), and microseconds of both; and
        ``runners_up``, configurations that are nearly as fast, and their microseconds.
    """
    weight_bytes = outputs * inputs * dtype.itemsize
    count = max(2, min(16, _COLD_BYTES // weight_bytes))
    weights = [torch.randn(outputs, inputs, device=device, dtype=dtype) * 0.02 for _ in range(count)]
    fused = kind == "swiglu"
    records = []
    for num_tokens in tokens:
        x = torch.randn(num_tokens, inputs, device=device, dtype=dtype)

        def launch(i: int, x: torch.Tensor = x, config: LinearConfig | None = None) -> torch.Tensor:
            if config is not None:
                return skinny_linear(x, weights[i], config, swiglu=fused, pdl=pdl)
            out = torch.nn.functional.linear(x, weights[i])
            return swiglu(out) if fused else out

        times: dict[LinearConfig | None, float] = {None: graph_us(launch, count)}
        for config in linear_candidates(outputs, inputs, num_tokens, whole=kind != "plain"):
            if (us := _graph_us_if_it_fits(partial(launch, config=config), count)) is not None:
                times[config] = us
        times |= {config: graph_us(partial(launch, config=config), count, 11) for config in _close(times)}
        cublas_us = times[None]
        times = _close(_faster_than_cublas(times))
        found = [(None if config is None else asdict(config), round(us, 2)) for config, us in times.items()]
        record = {
            "outputs": outputs,
            "inputs": inputs,
            "dtype": dtype_name(dtype),
            "tokens": num_tokens,
            "swiglu": fused,
            "config": found[0][0],
            "us": found[0][1],
            "cublas_us": round(cublas_us, 2),
            "runners_up": found[1:],
        }
        report(record)
        records.append(record)
    return records


def measure_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    cases: Sequence[tuple[int, int]],
    pdl: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Time decode attention of one layer. K and V are in a cache in token order and are read from memory.

    Args:
        cases: pairs (sequences, tokens of each).
        pdl: time vattn's kernel with programmatic dependent launch.
        report: called with each record.

    Returns:
        A record for each case: the fastest backend, its options, and microseconds of every backend; and
        ``runners_up``, backends and their options that are nearly as fast.

    Raises:
        ConfigError: no backend runs there.
    """
    records = []
    for batch, context in cases:
        with filled_cache(num_kv_heads, head_dim, dtype, device, batch, context) as (cache, decode_batch):
            q = torch.randn(batch, num_heads, head_dim, device=device, dtype=dtype)
            attend: dict[tuple[str, int], Callable[[int], torch.Tensor]] = {}
            for number, (name, options) in enumerate(every := attention_candidates()):
                backend = get(name).tuned(options, pdl=pdl)
                if backend.supports(device, dtype, head_dim) is None:
                    attend[name, number] = partial(_attend, bind(backend), q, cache, decode_batch)
            num_layers = len(cache.layout.layers)
            found = {what: _graph_us_if_it_fits(attend[what], num_layers) for what in attend}
            times = {what: us for what, us in found.items() if us is not None}
            times |= {what: graph_us(attend[what], num_layers, 11) for what in _close(times)}
        if not times:
            raise ConfigError(f"no backend of attention runs decode steps of {dtype} at head_dim {head_dim} here")
        close = [every[number] for _, number in _close(times)]
        by_backend = {name: round(min(us for (other, _), us in times.items() if other == name), 2) for name, _ in times}
        record = _heads(num_heads, num_kv_heads, head_dim, dtype) | {"batch": batch, "context": context}
        record |= {"backend": close[0][0], "options": close[0][1], "us": by_backend, "runners_up": close[1:]}
        report(record)
        records.append(record)
    return records


def _faster_than_cublas(times: dict[LinearConfig | None, float]) -> dict[LinearConfig | None, float]:
    """Those that are faster by more than the noise, and cuBLAS (None) itself."""
    return {config: us for config, us in times.items() if config is None or us * _MIN_GAIN < times[None]}


def _close(times: dict[Any, float]) -> dict[Any, float]:
    """Those within 15 % of the fastest, at most eight of them, the fastest first."""
    ordered = sorted(times.items(), key=lambda item: item[1])
    return {what: us for what, us in ordered[:8] if us <= 1.15 * ordered[0][1]}


@contextmanager
def filled_cache(
    num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, batch: int, context: int
) -> Iterator[tuple[KVCache, DecodeBatch]]:
    """A cache of ``batch`` sequences of ``context`` random rows, the newest of which a decode step is to compute."""
    num_layers = _layers_of(batch * context * num_kv_heads * head_dim * 2 * dtype.itemsize, device)
    layout = KVLayout(num_layers, num_kv_heads, head_dim, context + 64, dtype)
    margin = max(backend.over_read_tokens for backend in decode_backends())
    with KVCache(layout, batch, device, over_read_tokens=margin) as cache:
        slots = [cache.acquire() for _ in range(batch)]
        cache.ensure_batch(slots, [context] * batch)
        for slot in slots:
            for layer in range(num_layers):
                for rows in cache.rows(slot, layer):
                    rows.normal_()
        index = torch.tensor(slots, dtype=torch.int32, device=device)
        ends = torch.full_like(index, context)
        yield cache, DecodeBatch(index, ends - 1, ends, layout.max_seq_len)


def measure_prefill(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    cases: Sequence[tuple[int, int]],
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Time prefill attention of one layer and one sequence. The backends take turns.

    Args:
        cases: pairs (new tokens, all tokens of the sequence).
        report: called with each record.

    Returns:
        A record for each case with microseconds of every backend.
    """
    records = []
    names = [name for name in PREFILL_BACKENDS if get(name).supports(device, dtype, head_dim) is None]
    for new, total in cases:
        num_layers = _layers_of(total * num_kv_heads * head_dim * 2 * dtype.itemsize, device)
        layout = KVLayout(num_layers, num_kv_heads, head_dim, total + 256, dtype)
        margin = max((get(name).over_read_tokens for name in names), default=0)
        with KVCache(layout, 1, device, over_read_tokens=margin) as cache:
            slot = cache.acquire()
            cache.ensure(slot, total)
            for rows in cache.rows(slot, 0):
                rows.normal_()
            q = torch.randn(new, num_heads, head_dim, device=device, dtype=dtype)
            batch = AttentionBatch.build([slot], [new], [total], device)
            samples: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(6):
                for name in names:
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    torch.cuda._sleep(_BUSY_CYCLES)
                    start.record()
                    get(name)(q, cache.k(0), cache.v(0), batch, scale=head_dim**-0.5)
                    end.record()
                    end.synchronize()
                    samples[name].append(start.elapsed_time(end) * 1e3)
        medians = {name: round(sorted(us[1:])[2], 1) for name, us in samples.items()}  # the first one loads the kernel
        record = _heads(num_heads, num_kv_heads, head_dim, dtype) | {"new": new, "total": total, "us": medians}
        report(record)
        records.append(record)
    return records


def _heads(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Fields that every record of attention begins with."""
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "dtype": dtype_name(dtype),
    }


def _layers_of(layer_bytes: int, device: torch.device) -> int:
    """How many layers the cache of a measurement has: 32, or as many as fit into half of the free memory, at least 4.

    In token order, all layers of a token are neighbours. So their number sets the distance between two tokens of a
    layer, which changes the time of kernels. Many layers also keep a small layer's K and V out of the L2 cache.
    """
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(4, min(32, free_bytes // 2 // layer_bytes))


def _attend(
    attention: AttentionBackend, q: torch.Tensor, cache: KVCache, batch: DecodeBatch, layer: int
) -> torch.Tensor:
    return attention(q, cache.k(layer), cache.v(layer), batch, scale=q.shape[-1] ** -0.5)
