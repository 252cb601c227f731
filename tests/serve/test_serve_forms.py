"""Answers of a given form, calls of tools, metrics and the status page, through OpenAI's client."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import openai
import pytest
from helpers.server import NAME, Running, error_of, post, raw, status_of
from pydantic import BaseModel

pytest.importorskip("xgrammar")

MESSAGES: list[Any] = [{"role": "user", "content": "the quick fox"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time"}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def asked(server: Running) -> dict[str, Any]:
    """What every request has. Spaces would be allowed anywhere, and a model of random weights writes many."""
    spaces = {token for text in (" ", "\n", "\t") for token in server.tokenizer.encode(text)}
    bias = {str(token): -100 for token in spaces}
    return {"model": NAME, "temperature": 1, "seed": 1, "max_tokens": 200, "logit_bias": bias}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def of_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def test_a_schema_is_kept_to(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, response_format=of_schema(SCHEMA), n=3, **asked)
    for choice in answer.choices:
        found = json.loads(choice.message.content or "")
        assert found.keys() == {"city", "days"}
        assert found["city"] in ("Rome", "Oslo")
        assert found["days"] in range(1, 10)
        assert choice.finish_reason == "stop"


def test_a_schema_of_a_class(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    class Trip(BaseModel):
        city: Literal["Rome", "Oslo"]
        far: bool

    answer = client.chat.completions.parse(messages=MESSAGES, response_format=Trip, **asked)
    assert isinstance(answer.choices[0].message.parsed, Trip)


def test_a_schema_for_plain_completions_and_streams(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    form = {"response_format": of_schema(SCHEMA)}
    whole = client.completions.create(prompt=["the fox", "a dog"], extra_body=form, **asked)
    texts = [""] * 2
    for chunk in client.completions.create(prompt=["the fox", "a dog"], stream=True, extra_body=form, **asked):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert all(json.loads(text)["city"] in ("Rome", "Oslo") for text in texts)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "xml"},
        {"type": "structural_tag", "format": {"type": "any_text"}},
        {},
        {"type": "json_schema"},
        of_schema({"type": "no such type"}),
        of_schema({"$ref": "#/nowhere"}),
        of_schema({"type": "string", "pattern": "("}),
        of_schema({"type": "string", "pattern": "((((a{1,900}){1,900}){1,900}){1,900})"}),
    ],
    ids=lambda form: json.dumps(form)[:60],
)
def test_forms_that_are_none_or_explode(client: openai.OpenAI, asked: dict[str, Any], form: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="response_format") as refused:
        client.post("/chat/completions", body={"messages": MESSAGES, "response_format": form, **asked}, cast_to=object)
    assert (refused.value.param or "").startswith("response_format")


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "time"}), (named("weather"), {"weather"})],
)
def test_calls_that_are_asked_for(client: openai.OpenAI, asked: dict[str, Any], choice: Any, names: set[str]) -> None:
    given: Any = {"tools": [TIME, WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(messages=MESSAGES, **given, **asked)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.id
    assert call.function.name in names
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments["city"] in ("Rome", "Oslo")

    with client.chat.completions.stream(messages=MESSAGES, **given, **asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls is not None
    assert streamed.message.tool_calls[0].function.name == call.function.name
    assert json.loads(streamed.message.tool_calls[0].function.arguments) == arguments

    back: list[Any] = [
        *MESSAGES,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(messages=back, tools=[TIME, WEATHER], tool_choice="none", **asked)  # type: ignore[list-item]
    assert after.choices[0].message.tool_calls is None
    assert after.choices[0].message.content


def test_calls_that_are_free(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    """A model of random weights makes none: its text comes as it would without tools in the answer."""
    whole = client.chat.completions.create(messages=MESSAGES, tools=[WEATHER], **asked)  # type: ignore[list-item]
    chunks = client.chat.completions.create(messages=MESSAGES, tools=[WEATHER], stream=True, **asked)  # type: ignore[list-item]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == (whole.choices[0].message.content or "").strip() != ""
    assert whole.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_tools_that_are_none(client: openai.OpenAI, asked: dict[str, Any], given: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", body={"messages": MESSAGES, **given, **asked}, cast_to=object)
    assert refused.value.param == field


def get(server: Running, path: str) -> bytes:
    return raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())


def samples(server: Running) -> dict[str, float]:
    text = get(server, "/metrics").partition(b"\r\n\r\n")[2].decode()
    return {name: float(value) for name, value in re.findall(r"^([^#\s].*?) (\S+)$", text, re.MULTILINE)}


def test_metrics(client: openai.OpenAI, server: Running, asked: dict[str, Any]) -> None:
    label = f'{{model_name="{NAME}"}}'
    before = samples(server)
    answer = client.chat.completions.create(messages=MESSAGES, **asked, n=2)
    assert status_of(raw(server, post("/v1/completions", {"prompt": "x", "n": 0}))) == 400
    assert status_of(get(server, "/nowhere")) == 404
    after = samples(server)
    assert answer.usage is not None

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew(f"vattn:generation_tokens_total{label}") == answer.usage.completion_tokens
    assert grew(f"vattn:prompt_tokens_total{label}") == answer.usage.prompt_tokens
    assert grew(f"vattn:time_to_first_token_seconds_count{label}") == 2
    assert grew(f"vattn:e2e_request_latency_seconds_count{label}") == 1
    assert grew('vattn:http_requests_total{handler="/v1/chat/completions",status="200"}') == 1
    assert grew('vattn:http_requests_total{handler="/v1/completions",status="400"}') == 1
    assert grew('vattn:http_requests_total{handler="other",status="404"}') == 1
    assert after[f"vattn:num_requests_running{label}"] == 0


def test_the_status_page(server: Running) -> None:
    page = get(server, "/")
    assert status_of(page) == 200
    assert b"content-security-policy: default-src 'none'" in page
    assert b"<html" in page
    figures = json.loads(get(server, "/status.json").partition(b"\r\n\r\n")[2])
    assert (figures["model"], figures["running"], figures["waiting"]) == (NAME, 0, 0)
    assert figures["memory"]["num_live_slots"] == 1


def test_the_page_holds_no_data_and_the_figures_need_the_key(server: Running) -> None:
    assert NAME.encode() not in get(server, "/")
    assert "error" not in get(server, "/status.json").decode()
    assert error_of(get(server, "/status"))["type"] == "not_found_error"
