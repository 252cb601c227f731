"""Captured steps: one CUDA graph for each batch size, used where a measurement says that it wins."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from ..arguments import require_int
from ..errors import ConfigError
from ..graphs.capture import CaptureFailed, captured
from ..tuning.choices import EAGER
from .ways import GRAPH, Chosen, why

__all__ = ["GraphReport", "StepGraphs", "buckets_beside", "default_buckets"]

MODES = ("always", "measure", "first use", "never")


def default_buckets(max_batch: int) -> tuple[int, ...]:
    """Batch sizes to capture: every one to 16, then in steps of an eighth of the next power of two; the maximum too."""
    sizes, size = [], 1
    while size < max_batch:
        sizes.append(size)
        size += 1 if size < 16 else (1 << size.bit_length()) // 8
    return (*sizes, max_batch)


def buckets_beside(buckets: Sequence[int]) -> tuple[int, ...]:
    """Of rising batch sizes, those for steps that other work is captured with: few, as each needs a graph for every
    size of the other work, and each twice the one before it, the first at least 16; the largest too."""
    found = [buckets[-1]]
    for bucket in reversed(buckets):
        if 16 <= bucket <= found[0] // 2:
            found.insert(0, bucket)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One bucket.

    Attributes:
        batch: rows of the step.
        captured: whether there is a graph, which replays then use.
        capture_ms: time to warm up and capture it.
        pool_bytes: what torch's allocator reserved for it in the pool that all buckets share.
        device_bytes: device memory that its capture took, the graph itself included.
        way: how its steps are run: ``"eager"``, ``"graph"``, or ``"graph + "`` and what the model calls it. Where none
            was measured, ``"graph"`` is that of the model's ``decode`` as it is.
        us: microseconds of a step by way, where they were measured, now or earlier.
        rows: that its sequences had then.
        failed: why, for each way that could not be run.
    """

    batch: int
    captured: bool
    capture_ms: float = 0.0
    pool_bytes: int = 0
    device_bytes: int = 0
    way: str = EAGER
    us: Mapping[str, float] = field(default_factory=dict, hash=False)
    rows: int | None = None
    failed: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def eager_us(self) -> float | None:
        """Of a step whose kernels are launched one by one; None where that was not measured."""
        return self.us.get(EAGER)

    @property
    def graph_us(self) -> float | None:
        """Of the fastest graph; None where none was measured."""
        return min((us for way, us in self.us.items() if way != EAGER), default=None)


class StepGraphs:
    """Runs a step of any batch size up to the largest bucket, as a graph or eagerly.

    The step reads everything that changes from device tensors at fixed addresses, so that one graph of a bucket serves
    every batch that fits: parameters are indirect, none is copied into the graph (PyGraph, arXiv 2503.19779).

    Args:
        run: launches the step for the first ``batch`` rows; allocates nothing that outlives it. With several steps to a
            launch it takes a ``key`` that names their graph.
        buckets: batch sizes, the largest included.
        device: where it runs; graphs need CUDA.
        steps_per_launch: of the graphs that ``launch_several`` replays; 1 for none.
        mode: ``"always"`` captures every bucket; ``"measure"`` those whose graph was measured as faster than launching
            the step, as PyGraph found it is not for a quarter of the graphs it looked at; ``"first use"`` captures a
            bucket when it is first launched; ``"never"`` captures none.

    Raises:
        ConfigError: no buckets, sizes below 1, an unknown mode, or graphs on a device without them.
    """

    def __init__(
        self,
        run: Callable[..., None],
        buckets: Sequence[int],
        device: torch.device,
        mode: str = "always",
        steps_per_launch: int = 1,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"graphs must be one of {', '.join(MODES)}, got {mode!r}")
        if mode != "never" and device.type != "cuda":
            raise ConfigError(f"graphs={mode!r} needs a CUDA device, got {device}; pass graphs='never'")
        if not buckets:
            raise ConfigError("expected at least one batch bucket")
        self.buckets = tuple(sorted({require_int("bucket", bucket, 1) for bucket in buckets}))
        self.mode = mode
        self.device = device
        self.steps_per_launch = steps_per_launch
        self._run: Callable[..., None] = run
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._several: dict[int, torch.cuda.CUDAGraph] = {}  # of several steps
        self._launches: dict[int, Callable[[], None]] = {}  # of each graph, which uses memory that they hold
        self._by_key: dict[Hashable, torch.cuda.CUDAGraph | bool] = {}  # True: it came once; False: it cannot be
        self._failed = False  # whether other work could not be captured
        self._pool: Any = None
        self.reports: tuple[GraphReport, ...] = tuple(GraphReport(bucket, False) for bucket in self.buckets)

    def bucket_for(self, batch: int) -> int:
        """The smallest bucket that holds so many rows."""
        for bucket in self.buckets:
            if batch <= bucket:
                return bucket
        raise ConfigError(f"a batch of {batch} exceeds the largest bucket, {self.buckets[-1]}")

    def capture(self, chosen: Mapping[int, Chosen] | None = None) -> None:
        """Capture what is to be captured, the largest bucket first so that the others fit into its memory.

        The caller has filled the tensors that the step reads with values that do no harm; the step runs on them.

        Args:
            chosen: of each bucket, in the mode ``"measure"``.
        """
        if self.mode == "never":
            return
        self._pool = torch.cuda.graph_pool_handle()
        if self.mode == "first use":
            return
        reports = [
            self._capture(bucket, partial(self._run, bucket))
            if chosen is None
            else self._capture_chosen(bucket, chosen[bucket])
            for bucket in reversed(self.buckets)
        ]
        self.reports = tuple(reversed(reports))

    def awaits_capture(self, bucket: int) -> bool:
        """Whether this bucket is to be captured before it is launched."""
        return self.mode == "first use" and bucket not in self._graphs

    def capture_one(self, bucket: int) -> None:
        """As ``capture``, of a bucket that awaits it."""
        report = self._capture(bucket, partial(self._run, bucket))
        self.reports = tuple(report if each.batch == bucket else each for each in self.reports)

    def launch(self, bucket: int) -> None:
        """Run the step for a bucket on the current stream."""
        graph = self._graphs.get(bucket)
        if graph is None:
            self._run(bucket)
        else:
            graph.replay()

    def several(self, bucket: int) -> int:
        """Steps that one launch can take for a bucket."""
        return self.steps_per_launch if bucket in self._several else 1

    def launch_several(self, bucket: int) -> Hashable:
        """Run ``several`` steps for a bucket on the current stream, in one launch; their key."""
        self._several[bucket].replay()
        return self.key_of_several(bucket)

    @staticmethod
    def key_of_several(bucket: int) -> Hashable:
        """What ``run`` is called with where it is captured for a launch of several steps."""
        return bucket, "several"

    def launch_by_need(self, key: Hashable, run: Callable[[], None]) -> None:
        """Run other work on the current stream, captured once it has come before.

        The first time compiles kernels and makes workspaces, which capture may not do. What cannot be captured is
        launched each time.

        Args:
            key: all work of one key is the same but for what lies in device tensors at fixed addresses.
            run: launches it; allocates nothing that outlives it.
        """
        known = self._by_key.get(key)
        if known is True:
            known = self._by_key[key] = self._captured(run) or False
        if isinstance(known, torch.cuda.CUDAGraph):
            known.replay()
            return
        run()
        if known is None and self.mode != "never":
            self._by_key[key] = True

    def capture_now(self, key: Hashable, run: Callable[[], None], compiled: bool) -> None:
        """Capture other work before it comes, where that can be; ``launch_by_need`` tries again.

        Args:
            key, run: as for ``launch_by_need``; the tensors hold values that do no harm.
            compiled: whether work of this kind has run, so that its kernels are there.
        """
        if self.mode == "never" or isinstance(self._by_key.get(key), torch.cuda.CUDAGraph):
            return
        if not compiled:
            run()
        if (graph := self._captured(run)) is not None:
            self._by_key[key] = graph

    def release(self) -> None:
        """Drop every graph and its memory."""
        self._graphs.clear()
        self._several.clear()
        self._launches.clear()
        self._by_key.clear()
        self._pool = None

    def _capture_chosen(self, bucket: int, chosen: Chosen) -> GraphReport:
        """In the way that was chosen. One that cannot be captured this time is named, and the step launched instead."""
        choice = chosen.choice
        report = GraphReport(bucket, False, us=choice.us, rows=chosen.rows, failed=choice.failed)
        if choice.way == EAGER:
            return report
        try:
            made = self._capture(bucket, chosen.launch)
        except Exception as error:
            chosen.drop()
            if isinstance(error, CaptureFailed):
                self._pool = torch.cuda.graph_pool_handle()
            return replace(report, failed={**choice.failed, choice.way: why(error)})
        failed = {**choice.failed, **made.failed}
        return replace(made, way=choice.way, us=choice.us, rows=chosen.rows, failed=failed)

    def _capture(self, bucket: int, launch: Callable[..., None]) -> GraphReport:
        start = perf_counter()
        launch()  # compiles kernels and makes workspaces, which capture may not do
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # capturing does so too, which would hide what it takes
        free, pooled = torch.cuda.mem_get_info(self.device)[0], torch.cuda.memory_reserved(self.device)
        graph = captured(launch, self._pool)
        graph.replay()  # the first one uploads it
        torch.cuda.synchronize(self.device)
        self._graphs[bucket], self._launches[bucket] = graph, launch
        failed = {} if self.steps_per_launch == 1 else self._capture_several(bucket, launch)
        return GraphReport(
            bucket,
            True,
            (perf_counter() - start) * 1e3,
            max(0, torch.cuda.memory_reserved(self.device) - pooled),
            max(0, free - torch.cuda.mem_get_info(self.device)[0]),
            GRAPH,
            failed=failed,
        )

    def _capture_several(self, bucket: int, launch: Callable[..., None]) -> dict[str, str]:
        """Steps of a bucket in one graph; why not, where they cannot be: those of one step serve then."""

        def several() -> None:
            for _ in range(self.steps_per_launch):
                launch(key=self.key_of_several(bucket))

        try:
            graph = captured(several, self._pool)
            graph.replay()
            torch.cuda.synchronize(self.device)
        except Exception as error:
            if isinstance(error, CaptureFailed):
                self._pool = torch.cuda.graph_pool_handle()
            return {f"{self.steps_per_launch} steps in one launch": why(error)}
        self._several[bucket] = graph
        return {}

    def _captured(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """None where it cannot be; the launch that follows shows what was wrong, if it was not the capture.

        Where CUDA gave one up, no other work is captured either: it would fail alike, and each failure keeps memory.
        """
        if self._failed:
            return None
        try:
            return captured(run, self._pool)
        except CaptureFailed:
            self._failed, self._pool = True, torch.cuda.graph_pool_handle()
        except Exception:  # what the launch raises again, or what PyTorch refuses before CUDA would
            pass
        return None
