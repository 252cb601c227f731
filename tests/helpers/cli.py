"""The command line as a process: piped, on a terminal, with streams that fail."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vattn.cli.main import main

COMMAND = [sys.executable, "-m", "vattn"]
ON_CPU = ["--device", "cpu", "--memory-limit", "256MiB"]


def vattn(*args: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end; ``text`` is its stdin."""
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120, input=text)


def called(*args: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """As ``vattn``, in this process: seconds sooner, as torch is loaded already."""
    stdin, stdout, stderr = (io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (text.encode(), b"", b""))
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = stdin, stdout, stderr
    try:
        code = main([*map(str, args)])
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
    written = []
    for stream in (stdout, stderr):
        stream.flush()
        written.append(stream.buffer.getvalue().decode())
    return subprocess.CompletedProcess(args, code, *written)


def in_shell(command: str) -> subprocess.CompletedProcess[str]:
    """``vattn`` in a command of the shell's, which can close streams."""
    python = f"'{sys.executable}' -m vattn"
    return subprocess.run(
        ["sh", "-c", command.replace("vattn", python, 1)], capture_output=True, text=True, timeout=120
    )


class Terminal:
    """What a process writes to a terminal, and what is typed there."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self.output = b""
        self._descriptor = descriptor

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read_until(self, word: bytes, seconds: float = 60.0) -> bytes:
        """Everything since the last call, up to and with the word; AssertionError where it does not come."""
        end = time.monotonic() + seconds
        while word not in self.output:
            assert time.monotonic() < end, f"{word!r} is not in {self.output!r}"
            chunk = self._read()
            assert chunk, f"{word!r} is not in {self.output!r}"
            self.output += chunk
        before, _, self.output = self.output.partition(word)
        return before + word

    def read_some(self) -> None:
        """Wait for anything at all."""
        self.output += self._read()

    def read_to_the_end(self) -> bytes:
        while chunk := self._read():
            self.output += chunk
        return self.output

    def _read(self, seconds: float = 60.0) -> bytes:
        assert select.select([self._descriptor], [], [], seconds)[0], f"nothing comes after {self.output!r}"
        try:
            return os.read(self._descriptor, 65536)
        except OSError:  # the other end is closed
            return b""


@contextmanager
def on_terminal(*args: str | Path) -> Iterator[Terminal]:
    """A process whose three streams are a terminal of its own."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment,
        start_new_session=True,
    )
    os.close(child)
    try:
        yield Terminal(process, parent)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(parent)
