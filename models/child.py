"""A process that answers questions which may take all time and memory."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from vattn.errors import ConfigError

__all__ = ["Child"]


class Child:
    """A program that answers each line of JSON with another, one at a time. It bounds itself, and may end by that.

    It is started by the first question, and replaced when it has ended or failed, and in a process that was forked.

    Args:
        program: a Python file. Its first line of input is a list of folders to import from.
        greeting: what the second line is to be, as JSON; None for no such line.
    """

    def __init__(self, program: Path, greeting: Any = None) -> None:
        self._program, self._greeting = program, greeting
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """What it answers; nothing where it ends instead. An answer with an ``error`` is its last.

        Raises:
            ConfigError: it cannot be started.
        """
        line = json.dumps(question) + "\n"
        with self._lock:
            process = self._running()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            except BaseException:  # the reply that is still to come would answer the next question
                self._end(process)
                raise
            answer: dict[str, Any] = json.loads(reply) if reply.endswith("\n") else {"error": None}
            if "error" in answer:
                self._end(process)
        return {name: value for name, value in answer.items() if value is not None}

    def close(self) -> None:
        """End the process if it is this one's child. Another question starts another."""
        if self._process is not None and self._owner == os.getpid():
            self._end(self._process)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            command = [sys.executable, "-I", "-S", str(self._program)]
            pipe = subprocess.PIPE
            try:
                process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            except OSError as error:
                raise ConfigError(f"cannot start {sys.executable!r} to run {self._program.name}: {error}") from error
            assert process.stdin is not None
            process.stdin.write(json.dumps([entry for entry in sys.path if entry]) + "\n")
            if self._greeting is not None:
                process.stdin.write(json.dumps(self._greeting) + "\n")
            self._process, self._owner = process, os.getpid()
            atexit.register(self.close)
        return self._process

    def _end(self, process: subprocess.Popen[str]) -> None:
        self._process = None
        atexit.unregister(self.close)
        process.kill()
        process.communicate()
