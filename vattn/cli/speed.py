"""How fast a run was, and how fast this machine could have been at best, by what limits it: reading or arithmetic."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from ..engine import EngineStats

__all__ = ["Limits", "ModelWork", "RunCounts", "StepTimes", "measure_limits", "speed_table", "throughput"]

_LONG_ENOUGH_S = 0.02  # of one product, for a timer's and a launch's own time not to matter
_LARGEST_PRODUCT = 8192


@dataclass(frozen=True)
class Limits:
    """What a plain read and a plain matrix product reach; 0 where there is no memory to measure with."""

    read_bytes_per_s: float
    multiply_flops_per_s: float

    def least_s(self, num_bytes: float, num_flops: float) -> tuple[float, str | None]:
        """(the least seconds that these take, which of them takes longer: ``"reading"`` or ``"arithmetic"``)."""
        read_s = num_bytes / self.read_bytes_per_s if self.read_bytes_per_s else 0.0
        multiply_s = num_flops / self.multiply_flops_per_s if self.multiply_flops_per_s else 0.0
        if not read_s and not multiply_s:
            return 0.0, None
        return max(read_s, multiply_s), "reading" if read_s >= multiply_s else "arithmetic"


@dataclass(frozen=True)
class ModelWork:
    """The least work that a model's passes are for a machine.

    Attributes:
        weight_bytes: weights that every pass reads.
        num_weights: of those, the elements; each is multiplied and added once for each token.
        num_head_weights: those of the output projection, which a prefill does without.
        bytes_per_token: K and V of one row.
    """

    weight_bytes: int
    num_weights: int
    num_head_weights: int
    bytes_per_token: int


@dataclass(frozen=True)
class RunCounts:
    """What a run computed, and how long it took.

    Attributes:
        num_prefill_tokens, num_decode_tokens: rows of prompts, and tokens.
        prefill_s, decode_s: time of passes and of decode steps.
        num_prefill_steps, num_decode_steps: steps with a pass, and with decoding sequences.
        num_decode_rows: rows of K and V that the decode steps read.
        num_preemptions: of sequences.
    """

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    num_decode_rows: int = 0
    num_preemptions: int = 0


class StepTimes:
    """Seconds of an engine's steps, seen from outside, by what they did: prefill, decode, or both."""

    def __init__(self) -> None:
        self._before: EngineStats | None = None
        self._seconds = {"prefill": 0.0, "decode": 0.0, "both": 0.0}
        self._num_steps = {"prefill": 0, "decode": 0, "both": 0}
        self._waited_s = 0.0  # in steps that brought nothing: it belongs to the next one that does

    def note(self, stats: EngineStats, seconds: float) -> None:
        """A step has taken so long, and these are the engine's figures after it."""
        before, self._before = self._before, stats
        prefilled = stats.num_prefill_tokens > (0 if before is None else before.num_prefill_tokens)
        decoded = stats.num_decode_tokens > (0 if before is None else before.num_decode_tokens)
        seconds, self._waited_s = seconds + self._waited_s, 0.0
        if not (prefilled or decoded):
            self._waited_s = seconds
            return
        kind = "both" if prefilled and decoded else "prefill" if prefilled else "decode"
        self._seconds[kind] += seconds
        self._num_steps[kind] += 1

    def counts(self, num_decode_rows: int) -> RunCounts:
        """Of steps that did both, the part that decoding took is what a step of decode alone took on average."""
        stats, seconds, num = self._before, self._seconds, self._num_steps
        if stats is None:
            return RunCounts()
        alone = seconds["decode"] / num["decode"] if num["decode"] else 0.5 * seconds["both"] / max(1, num["both"])
        decode_s = min(num["both"] * alone, seconds["both"])
        return RunCounts(
            stats.num_prefill_tokens,
            stats.num_decode_tokens,
            seconds["prefill"] + seconds["both"] - decode_s,
            seconds["decode"] + decode_s,
            num["prefill"] + num["both"],
            num["decode"] + num["both"],
            num_decode_rows,
            stats.num_preemptions,
        )


def throughput(stats: RunCounts, work: ModelWork, limits: Limits) -> dict[str, Any]:
    """Tokens per second of prefill and decode, and the share of their time that no program could save on this machine.

    Counted: weights, K and V, each read once a step, and the products with the weights. Not counted: attention's own
    products, a few per cent up to some thousand tokens.
    """
    prefill_flops = 2.0 * (work.num_weights - work.num_head_weights) * stats.num_prefill_tokens
    head_share = work.num_head_weights / work.num_weights if work.num_weights else 0.0
    prefill_bytes = stats.num_prefill_steps * work.weight_bytes * (1 - head_share)
    decode_bytes = stats.num_decode_steps * work.weight_bytes + stats.num_decode_rows * work.bytes_per_token
    speed = {
        **asdict(stats),
        "decode_read_bytes_per_s": decode_bytes / stats.decode_s if stats.decode_s else 0.0,
        "read_limit_bytes_per_s": limits.read_bytes_per_s,
        "multiply_limit_flops_per_s": limits.multiply_flops_per_s,
    }
    for phase, num_bytes, num_flops in (
        ("prefill", prefill_bytes, prefill_flops),
        ("decode", decode_bytes, 2.0 * work.num_weights * stats.num_decode_tokens),
    ):
        took_s, limit_s, bound = speed[f"{phase}_s"], *limits.least_s(num_bytes, num_flops)
        speed[f"{phase}_tokens_per_s"] = speed[f"num_{phase}_tokens"] / took_s if took_s else 0.0
        speed |= {f"{phase}_limit_s": limit_s, f"{phase}_bound_by": bound}
        speed[f"{phase}_share_of_limit"] = limit_s / took_s if took_s else 0.0
    return speed


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure this machine, with the threads that torch has now; takes well under a second."""
    return Limits(_read_bandwidth(device), _multiply_rate(device, dtype))


def _read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a plain sum over memory larger than any cache reads: the best of five."""
    data = None
    for size in (1 << 30, 1 << 28, 1 << 26) if device.type == "cuda" else (1 << 28, 1 << 26):
        with suppress(RuntimeError, MemoryError):
            data = torch.ones(size // 4, dtype=torch.float32, device=device)
            break
    if data is None:
        return 0.0
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def _multiply_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product, the best of growing ones."""
    best, size = 0.0, 256
    while size <= _LARGEST_PRODUCT:
        try:
            square = torch.rand(size, size, device=device).to(dtype)  # a GPU is faster on zeros
            elapsed = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                (square @ square)[0, 0].item()  # waits for the device
                elapsed = min(elapsed, time.perf_counter() - start)
                if elapsed > _LONG_ENOUGH_S * 5:  # half precision without instructions for it
                    break
        except (RuntimeError, MemoryError):
            break
        best = max(best, 2 * size**3 / elapsed)
        if elapsed > _LONG_ENOUGH_S:
            break
        size *= 2
    return best


def speed_table(speed: dict[str, Any]) -> Table:
    """From ``throughput``'s dictionary."""
    table = Table(title="speed", title_justify="left")
    for column in ("", "tokens", "seconds", "tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("of the limit", justify="right")
    table.add_column("which is", style="dim")
    limits = {
        "reading": f"reading at {speed['read_limit_bytes_per_s'] / 1e9:.1f} GB/s",
        "arithmetic": f"arithmetic at {speed['multiply_limit_flops_per_s'] / 1e9:.0f} GFLOP/s",
        None: "not known",
    }
    for name in ("prefill", "decode"):
        tokens, seconds = speed[f"num_{name}_tokens"], speed[f"{name}_s"]
        figures = (str(tokens), f"{seconds:.2f}", f"{speed[f'{name}_tokens_per_s']:.1f}")
        share, limit = f"{speed[f'{name}_share_of_limit']:.0%}", limits[speed[f"{name}_bound_by"]]
        table.add_row(name, *figures, *((share, limit) if tokens else ("", "")))
    return table
