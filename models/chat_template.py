"""A chat rendered as text by the template that comes with a model."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .chat_child import CPU_SECONDS, MEMORY_BYTES

__all__ = ["harmless", "mapped", "render", "texts"]


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that ``template`` makes of ``variables``, which must be plain enough for JSON.

    jinja's sandbox renders it in another process, so that a template that never ends, or takes all memory, ends in an
    error. The first call starts that process, which takes tens of milliseconds; later calls take one or less.

    Raises:
        ConfigError: the template does not parse, raises, takes more than a second of CPU time or 512 MiB, or writes
            far more than it was given.
    """
    return _child.ask({"template": template, "variables": dict(variables)})


def texts(given: object) -> Iterator[str]:
    """Every string in plain data, keys too."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, Mapping):
        for key, value in given.items():
            yield str(key)
            yield from texts(value)
    elif isinstance(given, (list, tuple)):
        for value in given:
            yield from texts(value)


def mapped(given: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every string changed, keys too."""
    if isinstance(given, str):
        return change(given)
    if isinstance(given, Mapping):
        return {mapped(key, change): mapped(value, change) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [mapped(value, change) for value in given]
    return given


def harmless(given: Any) -> Any:
    """Plain data with x for each character of a text that says something.

    A name under ``role`` or ``type`` stays, as templates compare it with names of their own.
    """
    if isinstance(given, Mapping):
        return {
            key if _is_name(key) else f"x{i}": value if key in ("role", "type") and _is_name(value) else harmless(value)
            for i, (key, value) in enumerate(given.items())
        }
    if isinstance(given, (list, tuple)):
        return [harmless(value) for value in given]
    return "x" * len(given) if isinstance(given, str) and given.strip() else given


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isidentifier()


class _Child:
    """The process that renders. It is replaced after a failure, and in a process that was forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> str:
        line = json.dumps(request) + "\n"
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
            except BaseException:  # the reply that is still to come would answer the next request
                self._end(process)
                raise
            answer = json.loads(reply) if reply.endswith("\n") else {}
            if "text" in answer:
                return answer["text"]
            self._end(process)
        bounds = f"it takes more than {CPU_SECONDS:g} s of CPU time or {MEMORY_BYTES >> 20} MiB"
        raise ConfigError(f"the model's chat template cannot be used: {escaped(answer.get('error', bounds), 300)}")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("chat_child.py"))]
            pipe = subprocess.PIPE
            try:
                process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            except OSError as error:
                raise ConfigError(f"cannot start {sys.executable!r} to render a chat template: {error}") from error
            assert process.stdin is not None
            process.stdin.write(json.dumps([entry for entry in sys.path if entry]) + "\n")
            self._process, self._owner = process, os.getpid()
        return self._process

    def close(self) -> None:
        """End the process if it is this one's child."""
        if self._process is not None and self._owner == os.getpid():
            self._end(self._process)

    def _end(self, process: subprocess.Popen[str]) -> None:
        self._process = None
        process.kill()
        process.communicate()


_child = _Child()
atexit.register(_child.close)
