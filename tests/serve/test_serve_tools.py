"""Calls of tools: read in each family's form wherever tokens end, and asked for by grammars of the same form."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vattn.errors import ConfigError
from vattn.models import Tokenizer
from vattn.models.loader import find, load_tokenizer
from vattn.serve.grammar import Grammars
from vattn.serve.text import TextStream
from vattn.serve.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    ToolParser,
    checked_tools,
    grammar_for,
    parser_for,
)

pytest.importorskip("transformers")

NAMES = ("get_weather", "add")
ARGS = '{"city": "Oslo \\"}{[<", "days": [1, {"a": null}]}'
W = '{"name": "get_weather", "arguments": %s}'
HERMES_CALL = f"<tool_call>\n{W % ARGS}\n</tool_call>"
ADD = '{"a": 1}'

# form, answer, its text, its calls
ANSWERS: list[tuple[Any, str, str | None, list[tuple[str, str]]]] = [
    (HERMES, "Just text.", "Just text.", []),
    (HERMES, "", "", []),
    (HERMES, " text \n", " text \n", []),
    (HERMES, HERMES_CALL, None, [("get_weather", ARGS)]),
    (HERMES, f"Let me see.\n\n{HERMES_CALL}\n", "Let me see.", [("get_weather", ARGS)]),
    (HERMES, f"{HERMES_CALL}\n{HERMES_CALL}", None, [("get_weather", ARGS)] * 2),
    (HERMES, f"a {HERMES_CALL} b {HERMES_CALL} c", "a\nb\nc", [("get_weather", ARGS)] * 2),
    (HERMES, '<tool_call>{"name":"add","arguments":{}}</tool_call>', None, [("add", "{}")]),
    (HERMES, f'<tool_call>{{"arguments": {ADD}, "name": "add"}}</tool_call>', None, [("add", ADD)]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("add", ADD)]),
    (HERMES, '<tool_call>{"id": 7, "name": "add", "arguments": null}</tool_call>', None, [("add", "{}")]),
    (HERMES, f'<tool_call>{{"name": "add", "arguments": {ADD}, "id": "}}"}}</tool_call>', None, [("add", ADD)]),
    # No calls: what is no JSON object, of no tool that there is, or has no name.
    (HERMES, "<tool_call> hello </tool_call>", "<tool_call> hello </tool_call>", []),
    (HERMES, "a < b <tool_cal", "a < b <tool_cal", []),
    (HERMES, "<tool_call>\n{'name'}\n</tool_call>", "<tool_call>\n{'name'}\n</tool_call>", []),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}', '<tool_call>{"name": "rm", "arguments": {}}', []),
    (HERMES, '<tool_call>{"name": "add", "arguments": 3}', '<tool_call>{"name": "add", "arguments": 3}', []),
    (HERMES, f"<tool_call>no<tool_call>{W % '{}'}", "<tool_call>no", [("get_weather", "{}")]),
    # Cut short: before it is a call for sure, and after.
    (HERMES, 'x <tool_call>{"name": "add", ', 'x <tool_call>{"name": "add", ', []),
    (HERMES, 'x <tool_call>{"name": "add", "arguments": {"a": ', "x", [("add", '{"a": ')]),
    (HERMES, f"{HERMES_CALL[:-3]}", None, [("get_weather", ARGS)]),
    (LLAMA, "Hello {world}", "Hello {world}", []),
    (LLAMA, '{"name": "add", "parameters": {"a": 1}}', None, [("add", ADD)]),
    (LLAMA, '\n<|python_tag|>{"name": "add", "parameters": {"a": 1}}', None, [("add", ADD)]),
    (
        LLAMA,
        '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "arguments": {}}',
        None,
        [("add", ADD), ("add", "{}")],
    ),
    (LLAMA, '{"type": "function", "name": "add", "parameters": {"a": 1}} Done.', "Done.", [("add", ADD)]),
    (LLAMA, '{"name": "Bob", "parameters": {"a": 1}}', '{"name": "Bob", "parameters": {"a": 1}}', []),
    (LLAMA, '  {"answer": 42} ', '  {"answer": 42} ', []),
    (LLAMA, "<|python", "<|python", []),
    (MISTRAL, f"[TOOL_CALLS] [{W % ARGS}, {W % '{}'}]", None, [("get_weather", ARGS), ("get_weather", "{}")]),
    (MISTRAL, f"Sure. [TOOL_CALLS][{W % ARGS}]", "Sure.", [("get_weather", ARGS)]),
    (MISTRAL, f"[TOOL_CALLS][{W % ARGS}", None, [("get_weather", ARGS)]),
    (MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (MISTRAL_ARGS, f"[TOOL_CALLS]add[ARGS]{ADD}", None, [("add", ADD)]),
    (MISTRAL_ARGS, f"ok[TOOL_CALLS]add[CALL_ID]abc123xyz[ARGS]{ADD}", "ok", [("add", ADD)]),
    (
        MISTRAL_ARGS,
        f"[TOOL_CALLS]add[ARGS]{ADD}[TOOL_CALLS]get_weather[ARGS]{ARGS}",
        None,
        [("add", ADD), ("get_weather", ARGS)],
    ),
    (MISTRAL_ARGS, "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
    (MISTRAL_ARGS, "[TOOL_CALLS]add[AR", "[TOOL_CALLS]add[AR", []),
]


def joined(deltas: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """What a client makes of deltas."""
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                assert part["type"] == "function"
                calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
            else:
                assert set(part) == {"index", "function"}
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return content, calls


@pytest.mark.parametrize(("form", "answer", "content", "calls"), ANSWERS)
def test_answers_are_split(form: Any, answer: str, content: str | None, calls: list[Any]) -> None:
    for seed in range(25):
        check_split(form, answer, content, calls, seed)


def check_split(form: Any, answer: str, content: str | None, calls: list[Any], seed: int) -> None:
    draw = random.Random(seed)
    stream = ToolParser(form).stream(NAMES)
    deltas, rest = [], answer
    while rest:
        n = len(answer) if seed == 0 else 1 if seed == 1 else draw.randrange(1, 12)
        deltas += stream.push(rest[:n])
        rest = rest[n:]
    deltas += stream.flush()
    said, found = stream.finish()
    assert (said, [(call["function"]["name"], call["function"]["arguments"]) for call in found]) == (content, calls)
    assert joined(deltas) == (content or "", found)
    assert len({call["id"] for call in found}) == len(found)
    if "[CALL_ID]" in answer:
        assert found[0]["id"] == "abc123xyz"
    assert all(len(call["id"]) == 9 for call in found) or form.name != "mistral"


def test_text_and_arguments_come_as_soon_as_they_are_certain() -> None:
    stream = ToolParser(HERMES).stream()
    assert stream.push("Let me ") == [{"content": "Let me"}]
    assert stream.push("see <b>. <tool") == [{"content": " see <b>."}]
    assert stream.push('_call>{"name": "add", "argu') == []
    first, second = stream.push('ments": {"text": "one')
    assert first["tool_calls"][0]["function"] == {"name": "add", "arguments": ""}
    assert second == {"tool_calls": [{"index": 0, "function": {"arguments": '{"text": "one'}}]}
    assert stream.push(' two"') == [{"tool_calls": [{"index": 0, "function": {"arguments": ' two"'}}]}]


# What there is to call, and wrong ways to say so ------------------------------------------------------------------


def tool(name: Any, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
NUMBER = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"]}
TOOLS = [tool("get_weather", CITY), tool("add", NUMBER), tool("now")]

WRONG: dict[str, tuple[Any, Any]] = {
    "tools must be a list": (7, "auto"),
    r"tools\[0\] must be": ([3], "auto"),
    r"tools\[1\] must be": ([tool("a"), {"type": "web_search"}], "auto"),
    r"tools\[0\].function.name must": ([tool('"}')], "auto"),
    r"tools\[1\].function.name 'a' is that of another": ([tool("a"), tool("a")], "auto"),
    r"tools\[0\].function.parameters": ([tool("a", [])], "auto"),
    "tool_choice must be": (TOOLS, "always"),
    "tool_choice must be .*allowed_tools": (TOOLS, {"type": "allowed_tools"}),
    "tool_choice.function.name 'rm' is none of the tools: get_weather, add, now": (
        TOOLS,
        {"type": "function", "function": {"name": "rm"}},
    ),
    "tool_choice needs tools": ([], "required"),
}


@pytest.mark.parametrize("said", list(WRONG))
def test_what_is_wrong_is_named(said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked_tools(*WRONG[said])


def test_choices() -> None:
    def names(choice: Any) -> list[str]:
        return [each["function"]["name"] for each in checked_tools(TOOLS, choice)]

    assert names("auto") == names(None) == names("required") == ["get_weather", "add", "now"]
    assert names("none") == []
    assert names({"type": "function", "function": {"name": "add"}}) == ["add"]
    for choice in ("auto", "none", None):
        assert grammar_for(TOOLS, choice, ToolParser(HERMES)) is None


# With a tokenizer --------------------------------------------------------------------------------------------------

TEMPLATES = {
    "hermes": "{% if tools %}<tool_call>{% endif %}",
    "llama3_json": '{% if tools %}{"name": f, "parameters": {}}<|python_tag|>{% endif %}',
    "mistral": "{% if tools %}[TOOL_CALLS]{% endif %}",
    "mistral, named": "{% if tools %}[TOOL_CALLS][ARGS]{% endif %}",
}


def tokenizer_for(template: str | None) -> Tokenizer:
    hf = load_tokenizer(find("smollm2"))._hf
    if template is not None:
        hf.chat_template = template
        if "[TOOL_CALLS]" in template:
            hf.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    return Tokenizer(hf)


def test_the_form_is_that_of_the_template() -> None:
    for name, template in TEMPLATES.items():
        parser = parser_for(tokenizer_for(template))
        assert parser is not None
        assert parser.name == name.split(",")[0]
        assert bool(parser.form.named_before) == ("named" in name)
        assert parser.skip_special == ("mistral" not in name)
    assert parser_for(tokenizer_for("{% if tools %}<tool_call><function=f>{% endif %}")) is None
    assert parser_for(tokenizer_for("{{ tools }}")) is None
    plain = parser_for(tokenizer_for(None))  # told in words
    assert plain is not None
    assert plain.name == "hermes"


@pytest.fixture(scope="module", params=list(TEMPLATES))
def family(request: pytest.FixtureRequest) -> Iterator[tuple[Tokenizer, Grammars]]:
    pytest.importorskip("xgrammar")
    tokenizer = tokenizer_for(TEMPLATES[request.param])
    grammars = Grammars(tokenizer, len(tokenizer.hf) + -len(tokenizer.hf) % 32)
    yield tokenizer, grammars
    grammars.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", "add"])
def test_forced_answers_are_calls(family: tuple[Tokenizer, Grammars], choice: str, seed: int) -> None:
    tokenizer, grammars = family
    parser = parser_for(tokenizer)
    assert parser is not None
    named = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    form = grammar_for(TOOLS[:2], named, parser)
    assert form is not None
    allowed = grammars.for_format(form)
    assert allowed is not None
    draw, answer, ended = random.Random(seed), [], False
    text, calls = TextStream(tokenizer, skip_special=parser.skip_special), parser.stream()
    deltas: list[dict[str, Any]] = []
    while not ended:
        mask = allowed(answer)
        bits = (mask[:, None] >> torch.arange(32)) & 1
        tokens = bits.flatten().nonzero().flatten().tolist()
        stops = [token for token in tokens if token in tokenizer.stop_tokens]
        wordy = [token for token in tokens if tokenizer.decode([token], skip_special=False).strip()]
        token = stops[0] if stops and (len(answer) > 120 or draw.random() < 0.5) else draw.choice(wordy or tokens)
        answer.append(token)
        ended = token in tokenizer.stop_tokens
        deltas += calls.push(text.push(token))
    deltas += calls.push(text.finish())
    deltas += calls.flush()
    content, found = calls.finish()
    assert content is None
    assert joined(deltas) == ("", found)
    assert len(found) == 1 or choice == "required"
    for call in found:
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "add":
            assert set(arguments) == {"a"}
            assert 0 <= arguments["a"] <= 9
        else:
            assert arguments["city"] in ("Oslo", "Rome")
            assert choice == "required"
