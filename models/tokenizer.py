"""Text to tokens and back: a thin layer over transformers' tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vattn.errors import ConfigError

__all__ = ["TextStream", "Tokenizer"]

# What a tokenizer puts in place of bytes that are not, or not yet, a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Encodes prompts, plain or as a chat, and decodes what the model says.

    Args:
        hf_tokenizer: a transformers tokenizer.
        stop_tokens: ids that end a turn, besides those found in the tokenizer and its chat template.
    """

    def __init__(self, hf_tokenizer: Any, stop_tokens: Iterable[int] = ()) -> None:
        self._hf = hf_tokenizer
        self.stop_tokens = frozenset(stop_tokens) | _stop_tokens(hf_tokenizer)

    @classmethod
    def from_path(cls, path: Path, stop_tokens: Iterable[int] = ()) -> Tokenizer:
        """From a folder with tokenizer files, or from a GGUF file, which carries its own.

        Raises:
            ConfigError: transformers is not installed, or there is no tokenizer it can read.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ConfigError("tokenizers need the package transformers: pip install 'vattn[hf]'") from error
        gguf = {} if path.is_dir() else {"gguf_file": path.name}
        folder = path if path.is_dir() else path.parent
        try:
            return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **gguf), stop_tokens)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # transformers answers a missing tokenizer with any of these, depending on which file it misses first
            raise ConfigError(f"cannot read a tokenizer from {path}: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was trained on chats and says how they look."""
        return bool(getattr(self._hf, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands, with the special tokens that the model expects around a text."""
        return list(self._hf(text)["input_ids"])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat up to where the assistant's answer begins.

        Args:
            messages: dictionaries with ``role`` and ``content``.

        Raises:
            ConfigError: the model has no chat template.
        """
        if not self.has_chat_template:
            raise ConfigError("this model has no chat template; encode its prompt as plain text")
        text = self._hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self._hf(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without special tokens."""
        return self._hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self) -> TextStream:
        """A decoder for tokens that arrive one by one."""
        return TextStream(self)


class TextStream:
    """Incremental detokenisation in whole characters: the pieces joined equal ``decode`` of all tokens.

    A token may end in the middle of a character, and some tokenizers treat a text's first token differently, so each
    piece is the difference between decoding the latest tokens with and without the new ones.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # tokens[_context:_shown] are decoded along, as context for what follows
        self._shown = 0

    def push(self, token: int) -> str:
        """Text that ``token`` completes; empty while a character is incomplete."""
        self._tokens.append(token)
        piece = self._pending()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return piece

    def finish(self) -> str:
        """What is left, an incomplete character as U+FFFD."""
        piece = self._pending()
        self._context = self._shown = len(self._tokens)
        return piece

    def _pending(self) -> str:
        context = self._tokenizer.decode(self._tokens[self._context : self._shown])
        return self._tokenizer.decode(self._tokens[self._context :])[len(context) :]


def _stop_tokens(hf_tokenizer: Any) -> frozenset[int]:
    """End-of-sequence id and whatever special token the chat template writes after an assistant's answer.

    The two differ where a file names the end of a document (``<|endoftext|>``) and the chat ends its turns with another
    token (``<|im_end|>``, ``<|eot_id|>``); a model that stops only at the first talks to itself.
    """
    found = set() if hf_tokenizer.eos_token_id is None else {int(hf_tokenizer.eos_token_id)}
    if getattr(hf_tokenizer, "chat_template", None):
        answer = "ANSWER"
        messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
        text = hf_tokenizer.apply_chat_template(messages, tokenize=False)
        after = hf_tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        if after and int(after[0]) in hf_tokenizer.all_special_ids:
            found.add(int(after[0]))
    return frozenset(found)
