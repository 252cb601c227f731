"""Tables of what the commands report, and how they are shown."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..stats import CacheStats
from .text import one_line

__all__ = ["Meter", "facts_table", "format_bytes", "memory_table", "show"]


class Meter:
    """Keeps the latest snapshot, and that of the step with most memory in use: at the end nothing is in use."""

    def __init__(self) -> None:
        self.fullest: CacheStats | None = None
        self.latest: CacheStats | None = None

    def observe(self, stats: CacheStats) -> None:
        self.latest = stats
        if self.fullest is None or stats.in_use_bytes >= self.fullest.in_use_bytes:
            self.fullest = stats


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


def facts_table(facts: list[tuple[str, str]]) -> Table:
    """A line for each (name, text)."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")  # a path is there to be copied
    for name, text in facts:
        table.add_row(Text(one_line(name)), Text(one_line(text)))
    return table


def show(stream: TextIO, *tables: Table) -> None:
    """Print tables as wide as the terminal; without one, in full width, because programs read lines."""
    if stream.isatty():
        Console(file=stream, markup=False, highlight=False).print(*tables)
        return
    console = Console(file=stream, width=10_000, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(*tables)
    stream.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def format_bytes(size: int) -> str:
    """``3145728`` -> ``"3.0 MiB"``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
