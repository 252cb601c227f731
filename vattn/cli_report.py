"""What a run cost: memory while the sequences were alive, memory at the end, speed and its share of the limit."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from .engine import EngineStats
from .stats import CacheStats

__all__ = ["Meter", "format_bytes", "memory_table", "read_bandwidth", "speed_table", "throughput"]


class Meter:
    """Keeps the snapshot of the step that had most memory in use: at the end every sequence has been released."""

    def __init__(self) -> None:
        self.fullest: CacheStats | None = None
        self.latest: CacheStats | None = None

    def observe(self, stats: CacheStats) -> None:
        self.latest = stats
        if self.fullest is None or stats.in_use_bytes >= self.fullest.in_use_bytes:
            self.fullest = stats


def throughput(stats: EngineStats, weight_bytes: int, bytes_per_token: int, limit_bytes_per_s: float) -> dict[str, Any]:
    """Tokens per second of prefill and decode, and what decode read of weights, K and V against what memory gives.

    Args:
        weight_bytes: weights that every step reads.
        bytes_per_token: K and V of one row.
        limit_bytes_per_s: read bandwidth of the device, see ``read_bandwidth``.
    """
    decode_bytes = stats.num_decode_steps * weight_bytes + stats.num_decode_rows * bytes_per_token
    decode_rate = decode_bytes / stats.decode_s if stats.decode_s else 0.0
    return {
        **asdict(stats),
        "prefill_tokens_per_s": stats.num_prefill_tokens / stats.prefill_s if stats.prefill_s else 0.0,
        "decode_tokens_per_s": stats.num_decode_tokens / stats.decode_s if stats.decode_s else 0.0,
        "decode_read_bytes_per_s": decode_rate,
        "read_limit_bytes_per_s": limit_bytes_per_s,
        "decode_share_of_limit": decode_rate / limit_bytes_per_s if limit_bytes_per_s else 0.0,
    }


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a plain sum over memory larger than any cache reads: the best of five, measured now.

    0 where there is not even the memory to measure with.
    """
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


def memory_table(fullest: CacheStats, end: CacheStats) -> Table:
    """Both snapshots side by side."""
    table = Table(title="memory of the cache", title_justify="left")
    table.add_column("")
    table.add_column("most in use", justify="right")
    table.add_column("at the end", justify="right")
    table.add_column("which is", style="dim")
    rows = {
        "reserved": ("reserved_bytes", "addresses; they cost nothing"),
        "physical": ("physical_bytes", "memory taken from the system"),
        "mapped": ("mapped_bytes", "pages behind addresses, every mapping counted"),
        "in use": ("in_use_bytes", "pages of live sequences"),
        "wasted": ("waste_bytes", "mapped for live sequences and not asked for"),
        "peak": ("peak_physical_bytes", "the most physical memory so far"),
    }
    for name, (field, meaning) in rows.items():
        table.add_row(name, *(format_bytes(getattr(stats, field)) for stats in (fullest, end)), meaning)
    names = ("create", "map", "set_access", "unmap", "release")
    calls = ", ".join(f"{count} {name}" for name in names if (count := getattr(end, f"num_{name}")))
    table.add_row("driver calls", str(fullest.num_driver_calls), str(end.num_driver_calls), calls)
    return table


def speed_table(speed: dict[str, Any]) -> Table:
    """From ``throughput``'s dictionary."""
    table = Table(title="speed", title_justify="left")
    for column in ("", "tokens", "seconds", "tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("of the limit", style="dim")
    share = (
        f"reads {speed['decode_read_bytes_per_s'] / 1e9:.1f} GB/s, {speed['decode_share_of_limit']:.0%} of the "
        f"{speed['read_limit_bytes_per_s'] / 1e9:.1f} GB/s that a plain read reaches here"
    )
    for name, text in (("prefill", ""), ("decode", share)):
        tokens, seconds = speed[f"num_{name}_tokens"], speed[f"{name}_s"]
        table.add_row(name, str(tokens), f"{seconds:.2f}", f"{speed[f'{name}_tokens_per_s']:.1f}", text)
    return table


def format_bytes(size: int) -> str:
    """``3145728`` -> ``"3.0 MiB"``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
