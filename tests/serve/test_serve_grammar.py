"""Answers of a given form, and schemas that must not be compiled."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.llama import SMALL

from vattn import Engine, Request, Sampling
from vattn.errors import ConfigError
from vattn.models import Tokenizer
from vattn.models.llama import Llama
from vattn.models.loader import find, load_tokenizer
from vattn.serve.grammar import Grammars

pytest.importorskip("transformers")
pytest.importorskip("xgrammar")

VOCAB = 49152
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(find("smollm2"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(tokenizer, VOCAB)
    yield grammars
    grammars.close()


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def unpacked(mask: torch.Tensor) -> list[int]:
    """Token ids of a mask."""
    assert mask.dtype == torch.int32
    assert mask.shape == (VOCAB // 32,)
    bits = (mask[:, None] >> torch.arange(32)) & 1
    return bits.flatten().nonzero().flatten().tolist()


def is_person(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == ["name", "age", "kind"]
    return isinstance(found["name"], str) and 0 <= found["age"] <= 130 and found["kind"] in ("cat", "dog")


def walked(allowed: Callable[[Any], Any], tokenizer: Tokenizer, seed: int) -> str:
    """The text of random allowed tokens, short ones, until the answer ends."""
    draw, answer = random.Random(seed), []
    while True:
        tokens = unpacked(allowed(answer))
        assert tokens
        if tokens[0] in tokenizer.stop_tokens or answer[-1:] == [*tokenizer.stop_tokens]:
            return tokenizer.decode(answer)
        ends = [token for token in tokens if '"' in tokenizer.decode([token])]
        # White space may go on for ever.
        words = [token for token in draw.sample(tokens, min(40, len(tokens))) if tokenizer.decode([token]).strip()]
        answer.append(draw.choice(ends if len(answer) > 200 and ends else words or tokens))


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_chosen_keeps_to_the_schema(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    allowed = grammars.for_format(json_schema(PERSON))
    assert allowed is not None
    assert is_person(walked(allowed, tokenizer, seed))


def test_an_engine_answers_in_the_form(grammars: Grammars, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Describe a cat as JSON with name, age and kind."}])
    # Of random weights, which left alone would say anything.
    model = Llama.random(dataclasses.replace(SMALL, vocab_size=VOCAB), std=0.3)
    with Engine(model, max_batch=4, memory_limit=1 << 28) as engine:
        # Several samples of one request share the function; a request without it decodes beside them.
        allowed = grammars.for_format(json_schema(PERSON))
        sampling = Sampling(temperature=0.8, seed=5)
        constrained = Request(prompt, 60, sampling, tokenizer.stop_tokens, n=3, allowed_tokens=allowed)
        free = Request(prompt, 12, None, tokenizer.stop_tokens)
        *answers, beside = engine.generate([constrained, free])
        fresh = grammars.for_format(json_schema(PERSON))
        assert fresh is not None
        for answer in answers:
            assert answer.finish_reason in ("stop", "length"), answer.error
            assert fresh(answer.tokens) is not None  # raises where a token is not of the grammar
            assert answer.finish_reason == "length" or is_person(tokenizer.decode(answer.tokens))
        assert beside.tokens == engine.generate([free])[0].tokens


def test_samples_that_part_have_masks_of_their_own(grammars: Grammars, tokenizer: Tokenizer) -> None:
    allowed = grammars.for_format(json_schema({"enum": ["cat", "cow"]}))
    assert allowed is not None
    begin = tokenizer.encode('"c')
    at, ow = tokenizer.encode("at"), tokenizer.encode("ow")
    for n in range(len(begin) + 1):  # both samples ask at each step, as they do in an engine
        assert unpacked(allowed(begin[:n])) == unpacked(allowed(tuple(begin[:n])))
    first, second = unpacked(allowed(begin + at)), unpacked(allowed(begin + ow))
    assert first == second == tokenizer.encode('"')
    end = tokenizer.encode('"')
    stops = sorted(tokenizer.stop_tokens)
    assert unpacked(allowed(begin + at + end)) == stops
    assert unpacked(allowed(begin + ow + end)) == stops
    assert unpacked(allowed(begin + ow + end + stops)) == stops  # where the engine was told of no stop token
    with pytest.raises(ConfigError, match="does not keep"):
        allowed(begin + end)


@pytest.mark.parametrize("given", [None, 3, {}, {"type": "xml"}, {"type": ["json_object"]}, {"type": "json_schema"}])
def test_formats_that_are_none(grammars: Grammars, given: Any) -> None:
    with pytest.raises(ConfigError, match="response_format"):
        grammars.for_format(given)
    assert grammars.for_format({"type": "text"}) is None


NOT_KEPT = {
    r"x\.not is not": {"properties": {"x": {"not": {}}}},
    r"tags\.uniqueItems": {"properties": {"tags": {"type": "array", "uniqueItems": True}}},
    r"anyOf\[1\]\.if": {"anyOf": [{}, {"if": {}, "then": {}}]},
    "allOf of several": {"allOf": [{"type": "object"}, {"type": "object"}]},
    "beside properties": {"properties": {}, "anyOf": [{"required": []}]},
    r"\$ref must point into": {"$ref": "http://example.com/schema"},
    "required names 'a'": {"type": "object", "required": ["a"]},
    "looks ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "pattern beside": {"type": "string", "pattern": "^a+$", "maxLength": 3},
    "pattern must be a string": {"pattern": 3},
    "patterns may repeat": {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    "Unsupported type": {"type": "money"},
    "cannot be kept to: Regex": {"type": "string", "pattern": "("},
    "cannot be kept to: Invalid range": {"type": "integer", "minimum": 5, "maximum": 4},
}


@pytest.mark.parametrize("said", list(NOT_KEPT))
def test_what_is_not_kept_to_is_refused(grammars: Grammars, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        grammars.for_format(json_schema(NOT_KEPT[said]))
    assert len(str(raised.value)) < 500
    assert str(raised.value).isprintable()


def test_names_of_properties_are_no_keywords(grammars: Grammars, tokenizer: Tokenizer) -> None:
    names = ["not", "if", "pattern", "allOf"]
    schema = {"type": "object", "properties": {name: {"const": 1} for name in names}, "required": names}
    allowed = grammars.for_format(json_schema(schema))
    assert allowed is not None
    assert json.loads(walked(allowed, tokenizer, 0)) == dict.fromkeys(names, 1)


EXPLODING = {
    "takes all time": {"anyOf": [{"type": "string", "pattern": "a*" * (i % 5 + 1) + "b" * i} for i in range(120)]},
    "grows large": {"type": "object", "properties": {f"a{i}": {"type": "string"} for i in range(300)}},
}


@pytest.mark.parametrize("kind", list(EXPLODING))
def test_a_grammar_that_explodes_ends_in_an_error(grammars: Grammars, kind: str) -> None:
    begin = time.monotonic()
    beats = 0
    failed: list[str] = []

    def ask() -> None:
        try:
            grammars.for_format(json_schema(EXPLODING[kind]))
        except ConfigError as error:
            failed.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive():  # meanwhile others run
        thread.join(0.01)
        beats += 1
    taken = time.monotonic() - begin
    assert len(failed) == 1
    assert "takes more than" in failed[0] or "compiles to" in failed[0]
    assert beats > taken  # at least once a second, on a machine however slow
    ask()  # it is remembered
    assert failed[1] == failed[0]
    assert grammars.for_format(json_schema({"const": kind})) is not None


def test_a_token_that_takes_long_to_find_ends_the_request(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = grammars.for_format({"type": "json_object"})
    assert allowed is not None
    allowed(())
    monkeypatch.setattr("vattn.serve.grammar._TOKEN_CPU_S", -1.0)
    with pytest.raises(ConfigError, match="s for one token; make it simpler"):
        allowed(())


def test_grammars_go_on_after_they_were_closed(grammars: Grammars) -> None:
    grammars.close()
    grammars.close()
    assert grammars.for_format(json_schema({"const": "a form that is new"})) is not None


def test_deep_schemas(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ConfigError, match="more than 64 schemas within each other"):
        grammars.for_format(json_schema(schema))
    default: list[Any] = []
    for _ in range(5000):
        default = [default]
    with pytest.raises(ConfigError, match="too deeply nested"):
        grammars.for_format(json_schema({"type": "string", "default": default}))
    assert grammars.for_format({"type": "json_object"}) is not None
