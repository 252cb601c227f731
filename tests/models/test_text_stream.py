"""Text of tokens that come one by one."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.llama import save_folder

from vattn.errors import ConfigError
from vattn.models.loader import find, load_tokenizer
from vattn.models.text_stream import TextStream
from vattn.models.tokenizer import Tokenizer

pytest.importorskip("transformers")

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Of two, three and four bytes, of several code points, with spaces in front, behind and between.
TEXTS = ["the quick fox", " ", "  ", "é", "ñandú", "日本語", "🦊", "👍🏽", "👨‍👩‍👧", "\n\n", "a b", " , ", "don't"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"))


def like_sentencepiece(decoder: str) -> Tokenizer:
    """Words that begin with ▁, and bytes for all other characters."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", "t", "h", "e", "é", "日", "▁t", "▁th", "▁the", "he", "▁a"]
    vocab = {token: i for i, token in enumerate(["<unk>", *letters, *(f"<0x{i:02X}>" for i in range(256))])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    first = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    backend.decoder = decoders.Sequence(spaces if decoder == "strip" else first)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


def like_wordpiece() -> Tokenizer:
    """Spaces come with the words that follow them, and not before marks."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "the", "quick", "##er", "fox", ",", ".", "don", "'", "t", "é", "日", "🦊", "##🦊"]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]"))


def made(kind: str, saved: Path) -> Tokenizer:
    if kind == "bytes":
        return load_tokenizer(saved)
    if kind == "smollm2":
        try:
            return load_tokenizer(find("smollm2"))
        except ConfigError as error:
            if os.environ.get("VATTN_REQUIRE_MODEL"):
                raise
            pytest.skip(str(error))
    return like_wordpiece() if kind == "wordpiece" else like_sentencepiece(kind)


def stream_of(tokenizer: Tokenizer, way: str) -> TextStream:
    """As the tokenizer makes it, or as for a tokenizer that only decodes whole lists."""
    return tokenizer.stream() if way == "stream" else TextStream(tokenizer.decode, tokenizer._special)


def any_tokens(tokenizer: Tokenizer, rng: random.Random, with_garbage: bool) -> Iterator[int]:
    """Tokens of texts, special ones, ids that stand for nothing and, on request, any others."""
    size = len(tokenizer._hf)
    for _ in range(rng.choice((3, 10, 60))):
        kind = rng.random()
        if kind < 0.1:
            yield from rng.choices(sorted(tokenizer._special), k=rng.choice((1, 1, 3, 30)))
        elif kind < 0.15:
            yield from [size + rng.randrange(9)] * rng.choice((1, 2, 20))
        elif kind < 0.5 and with_garbage:
            yield rng.randrange(size)
        else:
            yield from tokenizer.encode(rng.choice(TEXTS))


@pytest.mark.parametrize("way", ["stream", "lists"])
@pytest.mark.parametrize("kind", ["bytes", "smollm2", "strip", "metaspace", "wordpiece"])
def test_the_text_so_far_is_that_of_all_tokens_so_far(saved: Path, kind: str, way: str) -> None:
    """At every token that completes a character."""
    tokenizer = made(kind, saved)
    rng = random.Random(kind + way)
    num_compared = 0
    for _ in range(30):
        # Byte fallback changes the text of a whole run of bytes when one comes that belongs to no character.
        tokens = list(any_tokens(tokenizer, rng, with_garbage=kind not in ("strip", "metaspace")))
        stream, text = stream_of(tokenizer, way), ""
        for end, token in enumerate(tokens, 1):
            piece = stream.push(token)
            text += piece
            expected = tokenizer.decode(tokens[:end])
            if not expected.endswith(REPLACEMENT):
                assert text == expected
                num_compared += bool(piece)
        assert text + stream.finish() == tokenizer.decode(tokens)
    assert num_compared > 300


@pytest.mark.parametrize("way", ["stream", "lists"])
def test_a_byte_that_changes_the_text_of_those_before(way: str) -> None:
    """What was shown stays; the stream goes on, and the text after these bytes is whole."""
    tokenizer = like_sentencepiece("strip")
    rng = random.Random(0)
    byte = {value: tokenizer._hf.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256)}
    after = tokenizer.encode("the é")
    for _ in range(200):
        run = [byte[value] for value in "日本".encode()] + [
            byte[rng.randrange(128, 256)] for _ in range(rng.randrange(1, 40))
        ]
        tokens = after + run + after * 3
        stream = stream_of(tokenizer, way)
        text = "".join([stream.push(token) for token in tokens]) + stream.finish()
        assert text.startswith("the é日本")
        assert text.endswith(" the é the é the é")


@pytest.mark.parametrize("way", ["stream", "lists"])
@pytest.mark.parametrize("kind", ["special", "unknown", "bytes"])
def test_tokens_without_text_take_linear_time(saved: Path, kind: str, way: str) -> None:
    """``DecodeStream`` by itself takes a hundred times as long for ten times as many."""
    tokenizer = load_tokenizer(saved)
    token = {"special": tokenizer.encode("<|im_end|>")[0], "unknown": len(tokenizer._hf) + 3}
    token["bytes"] = tokenizer.encode("🦊")[1]

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            stream = stream_of(tokenizer, way)
            start = time.thread_time()
            for _ in range(count):
                stream.push(token[kind])
            best = min(best, time.thread_time() - start)
            stream.finish()
        return best

    assert seconds(20_000) < 30 * seconds(2_000)


def in_pieces(decode: Callable[[list[int]], str], tokens: list[int], special: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    stream = TextStream(decode, special)
    return "".join(stream.push(token) for token in tokens) + stream.finish()


def test_pieces_of_any_tokens(saved: Path) -> None:
    """Bytes that are no characters, special tokens among them, in any order: the pieces are the whole."""
    tokenizer = load_tokenizer(saved)
    generator = random.Random(0)
    size = len(tokenizer._hf)
    for number in range(60):
        pool = list(range(size)) if number % 2 else [0, 1, 2, *range(150, 260)]
        tokens = generator.choices(pool, k=generator.choice([5, 40, 300]))
        stream = tokenizer.stream()
        assert "".join(stream.push(token) for token in tokens) + stream.finish() == tokenizer.decode(tokens)


def test_bytes_that_a_decoder_replaces_as_a_whole() -> None:
    """Byte fallback gives one replacement for each byte of a run that is no text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁a": 256, "b": 257}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for tokens in (
        [256, *"日本語".encode(), 257, 256],
        [256, *([0xFF] * 100), 257, *"日".encode(), 256],
        [*([0xFF, 0xE4, 0xBD] * 30), 256, 257],
    ):
        assert in_pieces(backend.decode, tokens) == backend.decode(tokens)


@pytest.mark.parametrize("kind", ["special", "bytes"])
def test_the_work_for_a_token_is_bounded(saved: Path, kind: str) -> None:
    tokenizer = load_tokenizer(saved)
    byte = tokenizer.encode("🦊")[1]  # the middle of a character, for ever
    token = tokenizer.encode("<|im_end|>")[0] if kind == "special" else byte
    decoded = 0

    def decode(tokens: list[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return tokenizer.decode(tokens)

    assert in_pieces(decode, [token] * 3000, tokenizer._special) == tokenizer.decode([token] * 3000)
    assert decoded < 3000 * 60
