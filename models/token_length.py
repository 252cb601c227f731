"""How many tokens a text has at least, known before it is encoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vattn.errors import ConfigError

__all__ = ["TooLong", "byte_letters", "least_tokens"]


class TooLong(ConfigError):
    """A text has more tokens than were allowed."""


def byte_letters() -> dict[str, int]:
    """The letters that a tokenizer of bytes writes for them (GPT-2's)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}


def least_tokens(hf_tokenizer: Any) -> Callable[[str], int]:
    """A function that gives a number of tokens that a text does not go below, in a thousandth of the time to encode it.

    It is the text's bytes over those of the longest token, where the tokenizer is byte-level BPE without a normaliser:
    each byte is in one token, but for bytes that the vocabulary lacks, which are dropped. It is 0 elsewhere: other
    tokenizers may drop spaces, compose characters, or make one unknown token of a long word.
    """
    from tokenizers import Tokenizer

    backend = getattr(hf_tokenizer, "backend_tokenizer", None)
    told = json.loads(backend.to_str()) if isinstance(backend, Tokenizer) else None  # as tokenizer.json
    if told is None or not _keeps_text(told):
        return lambda text: 0
    vocab = told["model"]["vocab"]
    dropped = bytes(byte for letter, byte in byte_letters().items() if letter not in vocab)
    longest = max([*map(len, vocab), *(len(token["content"].encode()) for token in told["added_tokens"])])
    return lambda text: -(-len(text.encode(errors="surrogatepass").translate(None, dropped)) // longest)


def _keeps_text(told: dict[str, Any]) -> bool:
    model, first = told["model"], told["pre_tokenizer"] or {}
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    return (
        model["type"] == "BPE"
        and not (model["unk_token"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and told["normalizer"] is None
        and told["truncation"] is None
        and [step.get("type") for step in steps].count("ByteLevel") == 1  # a second one would encode its letters
        and all(step.get("type") in ("ByteLevel", "Digits", "Split") for step in steps)
        and all(step.get("behavior") != "Removed" for step in steps)
        # These take all spaces beside them.
        and not any(token["lstrip"] or token["rstrip"] for token in told["added_tokens"])
    )
