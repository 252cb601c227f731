"""A chat rendered as text by the template that comes with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .chat_child import CPU_SECONDS, MEMORY_BYTES
from .child import Child

__all__ = ["harmless", "mapped", "render", "texts"]


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that ``template`` makes of ``variables``, which must be plain enough for JSON.

    jinja's sandbox renders it in another process, so that a template that never ends, or takes all memory, ends in an
    error. The first call starts that process, which takes tens of milliseconds; later calls take one or less.

    Raises:
        ConfigError: the template does not parse, raises, takes more than a second of CPU time or 512 MiB, or writes
            far more than it was given.
    """
    answer = _child.ask({"template": template, "variables": dict(variables)})
    if "text" in answer:
        return answer["text"]
    bounds = f"it takes more than {CPU_SECONDS:g} s of CPU time or {MEMORY_BYTES >> 20} MiB"
    raise ConfigError(f"the model's chat template cannot be used: {escaped(answer.get('error', bounds), 300)}")


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


_child = Child(Path(__file__).with_name("chat_child.py"))
