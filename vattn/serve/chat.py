"""Messages of OpenAI's chat interface to the tokens of a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import escaped, shown
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..models import Tokenizer

__all__ = ["prompt_tokens"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")  # of functions and calls
_PERSON = re.compile(r"[^\s<|\\/>]{1,64}")
# For templates without a place for tools: the form that Hermes models and many after them were trained on.
_TOOLS = """You may call one or more functions to help with the user's request. These are their signatures:
<tools>
{tools}
</tools>

For each call, write a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "<function name>", "arguments": <arguments as a JSON object>}}
</tool_call>"""


def prompt_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    most_tokens: int | None = None,
    /,
    **template_kwargs: Any,
) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins. Rendering takes about a millisecond: not for an
    event loop.

    Special tokens inside what is given stay text. Content in parts is joined by newlines, arguments of calls are
    parsed, and a developer is the system where the template knows none. Where the template has no place for tools, they
    go into the system's message and the calls and results into the others', in Hermes's form.

    Args:
        messages: as OpenAI's, in plain Python values.
        tools: as OpenAI's.
        most_tokens: as of ``Tokenizer.encode``.
        template_kwargs: variables of the chat template.

    Raises:
        ConfigError: a message is not as it should be, and which; or what ``Tokenizer.encode_chat`` raises.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ConfigError(f"messages must be a list of at least one message, got {shown(messages)}")
    chat = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    if not tokenizer.template_mentions("developer"):
        chat = [m | {"role": "system"} if m["role"] == "developer" else m for m in chat]
    if not tokenizer.takes_tools and (tools or any("tool_calls" in m or m["role"] == "tool" for m in chat)):
        chat, tools = _in_words(chat, tools), None
    return tokenizer.encode_chat(chat, tools, most_tokens, **template_kwargs)


def _message(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """One message, checked, in the form that transformers documents for templates."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be an object with role and content, got {shown(given)}")
    role = given.get("role")
    if role not in _ROLES:
        raise ConfigError(f"{where}.role must be one of {', '.join(_ROLES)}, got {escaped(shown(role))}")
    message: dict[str, Any] = {"role": role}
    calls = given.get("tool_calls")
    if calls is not None:
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
            raise ConfigError(f"{where}.tool_calls must be a list, in a message of the assistant, got {shown(calls)}")
        if calls:
            message["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    content = given.get("content")
    if content is None and role == "assistant":
        content = given.get("refusal") or ""
    message["content"] = _content(f"{where}.content", content)
    if given.get("tool_call_id") is not None:
        message["tool_call_id"] = _name(f"{where}.tool_call_id", given["tool_call_id"])
    if (name := given.get("name")) is not None:
        if not isinstance(name, str) or not _PERSON.fullmatch(name):
            raise ConfigError(f"{where}.name must be up to 64 letters without spaces, < | \\ / or >, got {shown(name)}")
        message["name"] = name
    if role == "assistant" and given.get("reasoning_content") is not None:
        message["reasoning_content"] = _text(f"{where}.reasoning_content", given["reasoning_content"])
    return message


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return _text(where, content)
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ConfigError(f"{where} must be a string or a list of parts, got {escaped(shown(content))}")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            said = escaped(shown(kind))
            raise ConfigError(f"{where}[{i}].type must be 'text', as this model reads nothing else, got {said}")
        texts.append(_text(f"{where}[{i}].{kind}", part.get(kind)))
    return "\n".join(texts)


def _text(where: str, text: Any) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"{where} must be a string, got {escaped(shown(text))}")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{where} holds half of a surrogate pair, which is no text")
    return text


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where} must be a name of letters, digits and any of _ . : -, got {escaped(shown(name))}")
    return name


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ConfigError(f"{where} must be an object with a function, got {escaped(shown(call))}")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}.function.arguments is not JSON: {escaped(str(error))}") from error
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{where}.function.arguments must be a JSON object, got {escaped(shown(arguments))}")
    name = _name(f"{where}.function.name", function.get("name"))
    found: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    if call.get("id") is not None:
        found["id"] = _name(f"{where}.id", call["id"])
    return found


def _in_words(chat: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The chat with tools, calls and results as text."""
    words: list[dict[str, Any]] = []
    for message in chat:
        role, content = message["role"], message["content"]
        calls = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in message.get("tool_calls", ())]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if words and words[-1]["role"] == "user" and words[-1]["content"].startswith("<tool_response>"):
                words[-1]["content"] += f"\n{content}"
                continue
        words.append({"role": role, "content": "\n".join(filter(None, [content, *calls]))})
    if tools:
        shown_tools = _TOOLS.format(tools="\n".join(json.dumps(tool) for tool in tools))
        if words[0]["role"] == "system":
            words[0]["content"] += f"\n\n{shown_tools}"
        else:
            words.insert(0, {"role": "system", "content": shown_tools})
    return words
