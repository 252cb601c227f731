"""Calls of tools in a text that comes piece by piece."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import Any

__all__ = ["Form", "ToolStream"]

_PYTHON_TAG = "<|python_tag|>"
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED = re.compile(r"([^\s\[\]{}]+)(?:\[CALL_ID\]([A-Za-z0-9_-]{1,64}))?\[ARGS\]\s*(?=\{)")
_HEAD_LENGTH = 400  # characters in which one of these must have come

_Steps = Generator[None, None, bool]  # yields where it needs more text


@dataclass(frozen=True)
class Form:
    """How calls are written.

    Attributes:
        name: of the form, as vLLM names its parsers.
        opens: what stands before a call, or before a list of them; empty where an answer is calls or text.
        closes: what stands behind one.
        arguments: their key in a call's JSON object. Both usual keys are read.
        in_list: the calls are in a JSON list.
        named_before: a call is its name, this, and its arguments as a JSON object.
    """

    name: str
    opens: str
    closes: str
    arguments: str = "arguments"
    in_list: bool = False
    named_before: str = ""


class ToolStream:
    """Splits one answer into text and calls. White space beside calls is dropped.

    Args:
        form: of the calls.
        names: of the tools that there are; what looks like a call of another one is text. None for any.
    """

    def __init__(self, form: Form, names: Collection[str] | None = None) -> None:
        self._form, self._names = form, names
        self._buffer = ""  # not looked at yet
        self._raw = ""  # what may be a call, as it was written
        self._spaces = ""  # held back: they are dropped where a call follows
        self._follows_call = False
        self._has_ended = False
        self._content = ""
        self._calls: list[dict[str, Any]] = []
        self._deltas: list[dict[str, Any]] = []
        self._steps: _Steps | None = self._answer()

    def push(self, text: str) -> list[dict[str, Any]]:
        """What is certain now, as deltas of OpenAI's streams: ``{"content": …}`` or ``{"tool_calls": [{"index": …}]}``.

        The first delta of a call has its id and name, further ones have parts of its arguments.
        """
        self._buffer += text
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        deltas, self._deltas = self._deltas, []
        return deltas

    def flush(self) -> list[dict[str, Any]]:
        """The rest of the deltas, at the end of the answer. What has begun like a call and is none is text."""
        self._has_ended = True
        return self.push("")

    def finish(self) -> tuple[str | None, list[dict[str, Any]]]:
        """The whole answer: its text, None where there are only calls, and its calls as OpenAI's."""
        self.flush()
        return self._content if self._content or not self._calls else None, self._calls

    # -- the parts of an answer: each is a generator that takes from the buffer -----------------------------------
    def _answer(self) -> _Steps:
        opens = self._form.opens
        if opens:
            while (yield from self._text_until(opens)):
                yield from self._marked_calls()
        else:
            while (yield from self._unmarked_call()):
                pass
            yield from self._text_until("")
        if not self._calls:
            self._emit(self._spaces)
        return True

    def _text_until(self, mark: str) -> _Steps:
        """True where the mark came; False at the end. Without a mark, all the rest."""
        while True:
            before, found, after = self._buffer.partition(mark) if mark else (self._buffer, "", "")
            if found:
                self._say(before)
                self._raw, self._buffer = mark, after
                return True
            most = 0 if self._has_ended else min(len(mark) - 1, len(before))
            held = next((n for n in range(most, 0, -1) if before.endswith(mark[:n])), 0)
            self._say(before[: len(before) - held])
            self._buffer = before[len(before) - held :]
            if self._has_ended:
                return False
            yield

    def _marked_calls(self) -> _Steps:
        """What follows a mark: a call, or a list of them."""
        yield from self._until_word()
        form = self._form
        in_list = form.name == "mistral" and self._buffer[:1] == "["
        if in_list:
            yield from self._next_word()
        while True:
            if self._buffer[:1] == "{":
                is_call = yield from self._object_call()
            else:
                is_call = form.name == "mistral" and not in_list and (yield from self._named_call())
            if not is_call:
                self._give_up()
                return False
            yield from self._until_word()
            if not in_list or self._buffer[:1] != ",":
                break
            yield from self._next_word()
        closes = "]" if in_list else form.closes
        while len(self._buffer) < len(closes) and closes.startswith(self._buffer) and not self._has_ended:
            yield
        if self._buffer.startswith(closes) or (self._has_ended and closes.startswith(self._buffer)):
            self._buffer = self._buffer[len(closes) :]
        self._raw = ""
        return True

    def _unmarked_call(self) -> _Steps:
        """True for a call; False for the text that is all the rest."""
        yield from self._until_word()
        while _PYTHON_TAG.startswith(self._buffer) and self._buffer != _PYTHON_TAG and not self._has_ended:
            yield
        if not self._calls and self._buffer.startswith(_PYTHON_TAG):
            yield from self._next_word(len(_PYTHON_TAG))
        if self._calls and self._buffer[:1] == ";":
            yield from self._next_word()
        if self._buffer[:1] == "{" and (yield from self._object_call()):
            self._raw = ""
            return True
        self._give_up()
        return False

    def _object_call(self) -> _Steps:
        """A call that is a JSON object; False for another object, which is taken then."""
        whole, text = _Object(), ""
        while True:
            taken = whole.read(self._buffer)
            text += self._buffer[:taken]
            self._raw += self._buffer[:taken]
            self._buffer = self._buffer[taken:]
            found = _HEAD.match(text, 0, _HEAD_LENGTH)
            if found and self._is_known(found[1]):
                break
            if whole.is_complete:
                return self._late_call(text)
            if self._has_ended:
                return False
            yield
        self._begin_call(found[1])
        self._buffer = text[found.end() :] + self._buffer
        yield from self._arguments()
        rest = _Object(depth=1)
        while True:
            self._buffer = self._buffer[rest.read(self._buffer) :]
            if rest.is_complete or self._has_ended:
                return True
            yield

    def _late_call(self, text: str) -> bool:
        """A call whose arguments are a string, or come before its name, or with other keys."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return False
        arguments = call.get("arguments", call.get("parameters"))
        if not isinstance(call.get("name"), str) or not self._is_known(call["name"]):
            return False
        if not isinstance(arguments, (dict, str)) and arguments is not None:
            return False
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        self._begin_call(call["name"])
        self._add_arguments(arguments)
        return True

    def _named_call(self) -> _Steps:
        """A name, then arguments."""
        while not (found := _NAMED.match(self._buffer, 0, _HEAD_LENGTH)):
            if self._has_ended or "{" in self._buffer or len(self._buffer) > _HEAD_LENGTH:
                return False
            yield
        if not self._is_known(found[1]):
            return False
        self._begin_call(found[1], found[2])
        self._buffer = self._buffer[found.end() :]
        yield from self._arguments()
        return True

    def _arguments(self) -> _Steps:
        """A JSON object, handed out as it comes."""
        whole = _Object()
        while True:
            taken = whole.read(self._buffer)
            self._add_arguments(self._buffer[:taken])
            self._buffer = self._buffer[taken:]
            if whole.is_complete or self._has_ended:
                return True
            yield

    def _until_word(self) -> _Steps:
        """Up to what is no white space."""
        while True:
            word = self._buffer.lstrip()
            self._raw += self._buffer[: len(self._buffer) - len(word)]
            self._buffer = word
            if word or self._has_ended:
                return True
            yield

    def _next_word(self, length: int = 1) -> _Steps:
        """Past so many characters, and white space."""
        self._raw, self._buffer = self._raw + self._buffer[:length], self._buffer[length:]
        return self._until_word()

    # -- what is found -----------------------------------------------------------------------------------------------
    def _is_known(self, name: str) -> bool:
        return bool(name) and (self._names is None or name in self._names)

    def _give_up(self) -> None:
        """What may have been a call is text."""
        raw, self._raw = self._raw, ""
        self._say(raw)

    def _say(self, text: str) -> None:
        text = self._spaces + text
        if self._follows_call:
            text = text.lstrip()
            if text and self._content:
                text = "\n" + text
        if not text:
            return
        self._follows_call = False
        said = text.rstrip()
        self._spaces = text[len(said) :]
        self._emit(said)

    def _emit(self, text: str) -> None:
        if text:
            self._content += text
            self._deltas.append({"content": text})

    def _begin_call(self, name: str, call_id: str | None = None) -> None:
        self._spaces, self._raw, self._follows_call = "", "", True
        # Templates of Mistral take ids of nine letters and digits only.
        made = secrets.token_hex(5)[:9] if self._form.name == "mistral" else f"call_{secrets.token_hex(12)}"
        call = {"id": call_id or made, "type": "function"}
        self._calls.append(call | {"function": {"name": name, "arguments": ""}})
        first = {"index": len(self._calls) - 1, **call, "function": {"name": name, "arguments": ""}}
        self._deltas.append({"tool_calls": [first]})

    def _add_arguments(self, part: str) -> None:
        if part:
            self._calls[-1]["function"]["arguments"] += part
            function = {"arguments": part}
            self._deltas.append({"tool_calls": [{"index": len(self._calls) - 1, "function": function}]})


class _Object:
    """Finds the end of a JSON object by its brackets.

    Args:
        depth: how many are open already.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False
        self.is_complete = False

    def read(self, text: str) -> int:
        """How many characters of ``text`` belong to it."""
        for i, letter in enumerate(text):
            if self.is_complete:
                return i
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                self.is_complete = self._depth <= 0
        return len(text)
