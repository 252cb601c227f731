"""Showing text while it is written: a live view on a terminal, whole lines elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Self

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..stats import CacheStats
from .report import format_bytes
from .text import one_line, printable

__all__ = ["Display", "LineDisplay", "LiveDisplay", "display_for"]

# Signals that end or stop a process by default: of kill, a closed terminal, Ctrl-\, Ctrl-Z. Ctrl-C is an exception.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
_TAIL_CHARACTERS = 2000  # of a text, kept to draw its end: more than a line of any terminal


class Display:
    """Is told of every piece of text and of every step, and shows nothing; a context manager around the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, index: int, piece: str) -> None:
        """More text of prompt ``index``, possibly none."""

    def finish(self, index: int) -> None:
        """Prompt ``index`` is complete."""

    def progress(self, num_tokens: int, stats: CacheStats) -> None:
        """After each step: new tokens so far, and the cache as it is."""


class LineDisplay(Display):
    """Prints each line once it is complete.

    Of several prompts, each line has its prompt's number, and the prompts come first unless ``quiet``.
    """

    def __init__(self, prompts: Sequence[str], quiet: bool = False) -> None:
        self._prompts = prompts
        self._quiet = quiet
        self._partial: list[list[str]] = [[] for _ in prompts]  # pieces of the line that is not complete

    def __enter__(self) -> Self:
        if len(self._prompts) > 1 and not self._quiet:
            for index, prompt in enumerate(self._prompts):
                self._print(index, f"> {one_line(prompt, 80)}")
        return self

    def add(self, index: int, piece: str) -> None:
        more, *lines = printable(piece).split("\n")
        self._partial[index].append(more)
        for line in lines:
            self._end_line(index)
            self._partial[index].append(line)

    def finish(self, index: int) -> None:
        if any(self._partial[index]):
            self._end_line(index)

    def _end_line(self, index: int) -> None:
        self._print(index, "".join(self._partial[index]))
        self._partial[index].clear()

    def _print(self, index: int, line: str) -> None:
        print(f"[{index + 1}] {line}".rstrip() if len(self._partial) > 1 else line, flush=True)


class LiveDisplay(Display):
    """The last words of every running prompt, above a line of figures. Completed texts scroll away above both.

    It is drawn a few times a second. What is told of tokens and steps in between costs the same however long the texts.
    """

    def __init__(self, console: Console, prompts: Sequence[str]) -> None:
        self._console = console
        self._prompts = prompts
        self._pieces: list[list[str]] = [[] for _ in prompts]
        self._tails = [""] * len(prompts)
        self._running: set[int] = set()
        self._num_done = 0
        self._start = time.perf_counter()
        self._latest: tuple[int, CacheStats] | None = None
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(_cursor_shown_at_the_end(console=self._console))
            stack.enter_context(self._live)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def add(self, index: int, piece: str) -> None:
        shown = printable(piece)
        self._pieces[index].append(shown)
        self._tails[index] = (self._tails[index] + shown)[-_TAIL_CHARACTERS:]
        self._running.add(index)

    def finish(self, index: int) -> None:
        self._running.discard(index)
        self._num_done += 1
        self._console.print(Rule(Text(one_line(self._prompts[index], 60), style="bold"), align="left"))
        self._console.print(Text("".join(self._pieces[index]).strip()), end="\n\n")

    def progress(self, num_tokens: int, stats: CacheStats) -> None:
        self._latest = num_tokens, stats

    def _status(self) -> Text:
        if self._latest is None:
            return Text("waiting for the first token", style="dim")
        num_tokens, stats = self._latest
        seconds = time.perf_counter() - self._start
        num_waiting = len(self._prompts) - len(self._running) - self._num_done
        return Text(
            f"{num_tokens} tokens, {num_tokens / seconds:.1f} tok/s · "
            f"{len(self._running)} running, {num_waiting} waiting, {self._num_done} done · "
            f"mapped {format_bytes(stats.mapped_bytes)} of {format_bytes(stats.reserved_bytes)} reserved, "
            f"wasted {format_bytes(stats.waste_bytes)}",
            style="cyan",
        )

    def _render(self) -> Group:
        """In the thread that draws, too."""
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", justify="right")
        table.add_column(overflow="ellipsis", no_wrap=True)
        width = max(20, self._console.width - 6)
        shown = sorted(self._running)[: max(1, self._console.height - 3)]
        for index in shown:
            table.add_row(str(index + 1), Text(one_line(self._tails[index], width, tail=True)))
        return Group(table, self._status())


def display_for(prompts: Sequence[str], *, quiet: bool) -> Display:
    """A live view on a terminal that can move its cursor; lines elsewhere, and where ``quiet``."""
    console = Console(highlight=False)
    if quiet or not sys.stdout.isatty() or console.is_dumb_terminal:
        return LineDisplay(prompts, quiet)
    return LiveDisplay(console, prompts)


@contextmanager
def _cursor_shown_at_the_end(console: Console) -> Iterator[None]:
    """Show the cursor, which a live view hides, before a signal ends the process, or stops it until the shell's ``fg``.

    The signal then has its default effect, which the shell sees. No ``finally`` runs: the memory goes with the process.
    """
    descriptor = console.file.fileno()
    show, hide = (str(Control.show_cursor(shown)).encode() for shown in (True, False))

    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):  # the terminal may be gone
            os.write(descriptor, show + b"\r\n")
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        # Only after a stop does it come here.
        signal.signal(number, handle)
        with suppress(OSError):
            os.write(descriptor, hide)

    taken = []
    if threading.current_thread() is threading.main_thread():  # no other may
        taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]  # not under nohup
    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
