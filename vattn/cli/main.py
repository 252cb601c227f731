"""The ``vattn`` command: ``generate``, ``chat``, ``serve``, ``tune``, ``bench`` and ``info``.

Exit codes: 0 for success, 1 where the machine failed, 2 where the caller must change something, 130 for Ctrl-C. An
error is one line on stderr.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from ..errors import ConfigError, VattnError
from .options import parser
from .text import one_line
from .threads import sleep_while_waiting

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _prepare_streams()
    try:
        if sys.stdout is None:
            raise VattnError("stdout is closed: there is nowhere to write to")
        if not sys.platform.startswith("linux"):
            raise ConfigError(f"vattn runs on Linux only, not on {sys.platform}")
        status = _run(argv)
        sys.stdout.flush()
    except ConfigError as error:
        return _fail(2, error)
    except (VattnError, MemoryError) as error:
        return _fail(1, error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch to name it would slow --help down
            raise
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except BrokenPipeError:  # the reader has gone
        _write_no_more(sys.stdout)
        return 1
    except OSError as error:  # a full disk behind stdout, say
        _write_no_more(sys.stdout)
        return _fail(1, error)
    return status


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
    except SystemExit as end:  # --help and --version
        return end.code if isinstance(end.code, int) else 0
    if args.command in ("generate", "chat", "serve"):
        sleep_while_waiting()  # before the command's module imports torch
    # Each command is the function of its name, in the module of its name.
    getattr(importlib.import_module(f".{args.command}", __package__), args.command)(args)
    return 0


def _prepare_streams() -> None:
    """Put /dev/null in place of closed descriptors, whose numbers files opened later would take, and stderr's text."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal's encoding lacks is no reason to stop


def _write_no_more(stream: TextIO | None) -> None:
    """Send the stream to /dev/null: Python flushes it at exit, and would report the same error again."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(code: int, reason: object) -> int:
    try:
        print(f"vattn: {one_line(reason) or type(reason).__name__}", file=sys.stderr, flush=True)
    except OSError:
        with suppress(OSError):
            _write_no_more(sys.stderr)
    return code
