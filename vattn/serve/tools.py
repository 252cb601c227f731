"""Calls of tools in what a model says: which form its family writes them in, how to ask for it and how to read it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import escaped, shown
from ..errors import ConfigError
from .tool_stream import Form, ToolStream

if TYPE_CHECKING:
    from ..models import Tokenizer

__all__ = ["ToolParser", "checked_tools", "grammar_for", "parser_for"]

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")

# <tool_call>{"name": …, "arguments": …}</tool_call>: Hermes, Qwen 2.5 and 3, and many after them
HERMES = Form("hermes", opens="<tool_call>", closes="</tool_call>")
# {"name": …, "parameters": …} as the whole answer: Llama 3.1 to 3.3
LLAMA = Form("llama3_json", opens="", closes="", arguments="parameters")
# [TOOL_CALLS] and a list of calls: Mistral up to 2024
MISTRAL = Form("mistral", opens="[TOOL_CALLS]", closes="", in_list=True)
# [TOOL_CALLS]name[ARGS]{…} for each call: Mistral since
MISTRAL_ARGS = Form("mistral", opens="[TOOL_CALLS]", closes="", named_before="[ARGS]")


class ToolParser:
    """Reads the calls of one family of models.

    Attributes:
        name: of the form, as vLLM names its parsers.
        form: what a call looks like.
        skip_special: for ``text.TextStream``: False where the form's marks are special tokens.
    """

    def __init__(self, form: Form, skip_special: bool = True) -> None:
        self.name, self.form, self.skip_special = form.name, form, skip_special

    def stream(self, names: Collection[str] | None = None) -> ToolStream:
        """A reader of one answer.

        Args:
            names: of the tools that there are; what looks like a call of another one is text. None for any.
        """
        return ToolStream(self.form, names)


def parser_for(tokenizer: Tokenizer) -> ToolParser | None:
    """How this model writes its calls, by its chat template; None where that is a form which is not known here."""
    says = tokenizer.template_mentions
    if not tokenizer.takes_tools:
        return ToolParser(HERMES)  # chat.prompt_tokens tells the model in words
    if says("[TOOL_CALLS]"):
        form = MISTRAL_ARGS if says("[ARGS]") else MISTRAL
    elif says("<tool_call>") and not says("<function=") and not says("<arg_key>"):
        form = HERMES
    elif says('"parameters"') and (says("<|python_tag|>") or says("ipython")):
        form = LLAMA
    else:
        return None
    mark = form.opens
    return ToolParser(form, mark in tokenizer.decode(tokenizer.encode(mark)) if mark else True)


def checked_tools(tools: Any, tool_choice: Any = "auto") -> list[dict[str, Any]]:
    """The tools that may be called: all, those that ``tool_choice`` names, or none.

    Args:
        tools: as OpenAI's: ``{"type": "function", "function": {"name": …, "parameters": …}}`` each.
        tool_choice: ``"none"``, ``"auto"``, ``"required"`` or ``{"type": "function", "function": {"name": …}}``.

    Raises:
        ConfigError: names what is wrong.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str) or len(tools) > MAX_TOOLS:
        raise ConfigError(f"tools must be a list of at most {MAX_TOOLS}, got {escaped(shown(tools))}")
    found: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(function, Mapping):
            said = escaped(shown(tool))
            raise ConfigError(f'tools[{i}] must be {{"type": "function", "function": {{…}}}}, got {said}')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            said = escaped(shown(name))
            raise ConfigError(f"tools[{i}].function.name must be up to 64 letters, digits and _ . -, got {said}")
        if name in found:
            raise ConfigError(f"tools[{i}].function.name {name!r} is that of another tool too")
        if parameters is not None and not isinstance(parameters, Mapping):
            said = escaped(shown(parameters))
            raise ConfigError(f"tools[{i}].function.parameters must be a JSON schema, an object, got {said}")
        found[name] = dict(tool)
    if tool_choice in (None, "auto"):
        return list(found.values())
    if tool_choice == "none":
        return []
    if not found:
        raise ConfigError("tool_choice needs tools")
    if tool_choice == "required":
        return list(found.values())
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    if not isinstance(function, Mapping) or tool_choice.get("type") != "function":
        wanted = '"none", "auto", "required" or {"type": "function", "function": {"name": …}}'
        raise ConfigError(f"tool_choice must be {wanted}, got {escaped(shown(tool_choice))}")
    if function.get("name") not in found:
        said = escaped(shown(function.get("name")))
        raise ConfigError(f"tool_choice.function.name {said} is none of the tools: {escaped(', '.join(found), 200)}")
    return [found[function["name"]]]


def grammar_for(
    tools: Sequence[Mapping[str, Any]], tool_choice: Any, parser: ToolParser, parallel: bool = True
) -> dict[str, Any] | None:
    """What ``Grammars.for_format`` takes so that the answer is calls in the family's form; None where it is free.

    Args:
        tools, tool_choice: as those of ``checked_tools``.
        parallel: allow several calls in one answer.

    Raises:
        ConfigError: as ``checked_tools``.
    """
    chosen = checked_tools(tools, tool_choice)
    if not chosen or tool_choice in (None, "auto", "none"):
        return None
    return {"type": "structural_tag", "format": _calls(parser.form, chosen, parallel and tool_choice == "required")}


def _calls(form: Form, tools: Sequence[Mapping[str, Any]], several: bool) -> dict[str, Any]:
    """One call or several, as xgrammar's structural tag."""
    tags = []
    for tool in tools:
        name, schema = tool["function"]["name"], tool["function"].get("parameters") or {"type": "object"}
        begin, end = f'{{"name": "{name}", "{form.arguments}": ', "}"
        if form.named_before:
            begin, end = f"{form.opens}{name}{form.named_before}", ""
        elif form.closes:
            begin, end = f"{form.opens}\n{begin}", f"{end}\n{form.closes}"
        content = {"type": "json_schema", "json_schema": dict(schema)}
        tags.append({"type": "tag", "begin": begin, "content": content, "end": end})
    separator = ", " if form.in_list else "; " if not form.opens else "" if form.named_before else "\n"
    calls: dict[str, Any] = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not several,
    }
    if not form.in_list:
        return calls
    edges = [{"type": "const_string", "value": value} for value in (f"{form.opens}[", "]")]
    return {"type": "sequence", "elements": [edges[0], calls, edges[1]]}
