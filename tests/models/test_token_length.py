"""What is sure about a text's tokens before it is encoded: never more than there turn out to be."""

from __future__ import annotations

import os
import random

import pytest

pytest.importorskip("transformers")

from helpers.llama import save_folder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vattn.errors import ConfigError
from vattn.models import Tokenizer as VattnTokenizer
from vattn.models.loader import find, load_tokenizer
from vattn.models.token_length import TooLong, byte_letters, least_tokens

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def made(vocab=BYTES, normalizer=None, pre_tokenizer=None, **more):
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)}, [], **more))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def tokenizer(request, tmp_path_factory):
    if request.param == "tiny":
        return load_tokenizer(save_folder(tmp_path_factory.mktemp("tiny")))
    try:
        return load_tokenizer(find("smollm2"))
    except ConfigError as error:
        if os.environ.get("VATTN_REQUIRE_MODEL"):
            raise
        pytest.skip(str(error))


def test_the_letters_are_those_of_tokenizers():
    assert sorted(byte_letters()) == BYTES


def test_nothing_is_refused_that_fits(tokenizer):
    draw = random.Random(0)
    tokens = [*range(len(tokenizer.hf))]
    widest = sorted(tokens, key=lambda token: len(tokenizer.token_bytes(token)))[-20:]
    characters = "ab \n\t<|>éा한\u0301\u200d\U0001f600\U000e0001\0\x1d\x13"
    for number in range(300):
        source = widest if number % 3 == 0 else draw.sample(tokens, 20)
        text = (
            "".join(draw.choices(characters, k=50))
            if number % 3 == 1
            else tokenizer.decode(draw.choices(source, k=20), skip_special=False)
        )
        found = tokenizer.encode(text)
        assert tokenizer.encode(text, len(found)) == found


@pytest.mark.parametrize("text", ["<|im_end|>" * 200, "\ud800", "x" * 2000, " " * 2000])
def test_what_cannot_fit_is_refused_in_a_prompt_and_in_a_chat(tokenizer, text):
    if text != "\ud800":  # which no tokenizer encodes
        assert len(tokenizer.encode(text)) > 2
        with pytest.raises(TooLong, match="the text has at least"):
            tokenizer.encode(text, 2)
    with pytest.raises(TooLong if text != "\ud800" else ConfigError):
        tokenizer.encode_chat([{"role": "user", "content": text}], None, 2)


def test_nothing_is_sure_where_text_may_be_lost():
    text = "abc " * 100
    assert least_tokens(made())(text) == 400
    assert least_tokens(made([*BYTES, "abc"]))(text) == 134
    without_c = made([letter for letter in BYTES if letter != "c"])
    assert least_tokens(without_c)(text) == 300 == len(VattnTokenizer(without_c).encode(text))
    split = pre_tokenizers.Split(Regex(" "), "removed")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for lossy in (
        made(unk_token="a"),
        made(normalizer=normalizers.NFC()),
        made(pre_tokenizer=pre_tokenizers.Sequence([split, byte_level])),
        made(pre_tokenizer=pre_tokenizers.Whitespace()),
        made(end_of_word_suffix="</w>"),
        made(pre_tokenizer=pre_tokenizers.Sequence([byte_level, byte_level])),
        object(),
    ):
        assert least_tokens(lossy)(text) == 0
    strips = made()
    strips.add_tokens([AddedToken("<sep>", lstrip=True)])
    assert least_tokens(strips)(text) == 0
    assert len(VattnTokenizer(strips).encode(" " * 100 + "<sep>", 1)) == 1  # and so nothing is refused
