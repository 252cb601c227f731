"""Text of an answer: stop strings wherever tokens begin and end."""

from __future__ import annotations

import random

import pytest

from vattn.models import Tokenizer
from vattn.models.loader import find, load_tokenizer
from vattn.serve.text import TextStream

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(find("smollm2"))


class Pieces:
    """A tokenizer whose token i is its piece i: tokens may begin and end anywhere."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def stream(self, skip_special: bool = True) -> Pieces:
        return self

    def push(self, token: int) -> str:
        return self._pieces[token]

    def finish(self) -> str:
        return ""


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What is to be seen of a text: it grows by a character until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    stream = TextStream(Pieces(pieces), stops)  # type: ignore[arg-type]
    shown, said = "", ""
    for i, piece in enumerate(pieces):
        said += piece
        shown += stream.push(i)
        if stream.stopped is None:
            # All is shown but what may be the beginning of a stop string.
            held = said.removeprefix(shown)
            assert shown + held == said
            assert not held or any(stop.startswith(held) for stop in stops)
            assert not any(said.endswith(stop[:n]) for stop in stops for n in range(len(held) + 1, len(stop)))
    return shown + stream.finish(), stream.stopped


def test_stops_are_found_wherever_tokens_end() -> None:
    for seed in range(500):
        check_stops(seed)


def check_stops(seed: int) -> None:
    draw = random.Random(seed)
    letters = "ab" if seed % 2 else "aé\n🦊"
    text = "".join(draw.choices(letters, k=draw.randrange(40)))
    stops = ["".join(draw.choices(letters, k=draw.randrange(1, 7))) for _ in range(draw.randrange(5))]
    pieces, rest = [], text
    while rest:
        n = draw.randrange(5)
        pieces.append(rest[:n])
        rest = rest[n:]
    assert streamed(pieces, stops) == cut(text, stops)


def test_a_stop_across_tokens_is_never_shown(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("One, two, three. STOP here. STOP there")
    stream = TextStream(tokenizer, ["STOP there", ". STOP h"])
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == "One, two, three"
    assert stream.stopped == ". STOP h"
    assert stream.push(tokens[0]) == ""


def test_without_stops_the_text_is_that_of_all_tokens(tokenizer: Tokenizer) -> None:
    text = "naïve 👩‍👩‍👧 日本語\n\n  end"
    tokens = tokenizer.encode(text)
    for stops in ([], ["never said"]):
        stream = TextStream(tokenizer, stops)
        assert "".join(map(stream.push, tokens)) + stream.finish() == text


def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["END OF TEXT"])
    shown = "".join(map(stream.push, tokenizer.encode("this is the END OF")))
    assert shown == "this is the "
    assert stream.finish() == "END OF"
    assert stream.stopped is None
    assert stream.finish() == ""


def test_a_stop_may_be_what_stands_for_an_incomplete_character(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["\N{REPLACEMENT CHARACTER}"])
    first = tokenizer.encode("🦊")[0]
    assert stream.push(first) == ""
    assert stream.finish() == ""
    assert stream.stopped == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_have_text_where_they_are_wanted(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("hi<|im_start|>"), *tokenizer.stop_tokens]
    hidden, told = TextStream(tokenizer), TextStream(tokenizer, skip_special=False)
    assert "".join(map(hidden.push, tokens)) + hidden.finish() == "hi"
    assert "".join(map(told.push, tokens)) + told.finish() == "hi<|im_start|>"
