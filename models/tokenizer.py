"""Text to tokens and back: a thin layer over transformers' tokenizers."""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vattn.arguments import escaped
from vattn.errors import ConfigError

from .chat_template import harmless, mapped, render, texts
from .files import lacks_package
from .text_stream import TextStream
from .token_length import TooLong, byte_letters, least_tokens

__all__ = ["Tokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


class Tokenizer:
    """Encodes prompts, plain or as a chat, and decodes what the model says.

    Args:
        hf_tokenizer: a transformers tokenizer.
        stop_tokens: ids that end a turn, besides those found in the tokenizer and its chat template.
    """

    def __init__(self, hf_tokenizer: Any, stop_tokens: Iterable[int] = ()) -> None:
        self._hf = hf_tokenizer
        self._declared = frozenset(stop_tokens)
        added = getattr(hf_tokenizer, "added_tokens_decoder", {})
        self._added = {int(i) for i in added}
        self._bytes: dict[int, bytes] = {}
        self._special = {int(i) for i, token in added.items() if token.special} | set(hf_tokenizer.all_special_ids)
        template = str(getattr(hf_tokenizer, "chat_template", None) or "")
        # Some markers that a template writes, as DeepSeek's <｜User｜>, are not marked special.
        self._control = {
            token.content
            for token in added.values()
            if token.special or (token.content[:1] in "<[" and len(token.content) > 2 and token.content in template)
        }
        self._control |= set(hf_tokenizer.all_special_tokens)
        self._control.discard("")
        self._control_ids = self._special | {int(i) for i, token in added.items() if token.content in self._control}

    @classmethod
    def from_path(cls, path: Path, stop_tokens: Iterable[int] = ()) -> Tokenizer:
        """From a folder with tokenizer files, or from a GGUF file, which carries its own.

        Nothing in the folder is run as a program: a tokenizer that needs code of its own is refused.

        Raises:
            ConfigError: transformers is not installed, or there is no tokenizer it can read.
        """
        try:
            from transformers import AutoTokenizer, PreTrainedTokenizerFast
        except ImportError as error:
            raise lacks_package("tokenizers need", "transformers") from error
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            if path.is_dir():
                tokenizer = AutoTokenizer.from_pretrained(str(path), **options)
            else:  # the class that AutoTokenizer would choose, after it had read the file once more to do so
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name, **options)
            found = cls(tokenizer, stop_tokens)
            found.decode(found.encode("a"))  # fails where a setting has a wrong type
            return found
        except MemoryError:
            raise
        except Exception as error:
            # transformers raises exceptions of any kind for missing or broken files
            said = escaped(" ".join(str(error).split()), 300)
            if path.is_dir() and not any((path / name).exists() for name in _TOKENIZER_FILES):
                said = f"there is none of {', '.join(_TOKENIZER_FILES)}: save the tokenizer beside the model"
            elif "trust_remote_code" in str(error):
                said = "it needs Python code that comes with the model, and that is never run"
            raise ConfigError(f"cannot read a tokenizer from {path}: {said}") from error

    @property
    def hf(self) -> Any:
        """The transformers tokenizer."""
        return self._hf

    @property
    def has_chat_template(self) -> bool:
        """Whether the model comes with a template for chats."""
        return bool(getattr(self._hf, "chat_template", None))

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a turn: those declared, the end of a text, and what the chat template writes after an answer.

        The last two differ where the tokenizer's end is that of a document (``<|endoftext|>``) and a chat's turns end
        with another token (``<|im_end|>``, ``<|eot_id|>``). A model that stops only at the first talks to itself. A
        template that cannot be used adds nothing here; ``encode_chat`` reports it.
        """
        found = set(self._declared)
        if isinstance(self._hf.eos_token_id, int):
            found.add(self._hf.eos_token_id)
        if self.has_chat_template:
            answer = "ANSWER"
            messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}]
            try:
                text = self._render({"messages": messages, "tools": None, "documents": None}, False)
                after = self._ids(text.rpartition(answer)[2])
            except ConfigError:
                after = []
            if after and after[0] in self._special:
                found.add(after[0])
        return frozenset(found)

    def encode(self, text: str, most_tokens: int | None = None) -> list[int]:
        """Token ids of ``text`` as it stands, with the special tokens that the model expects around a text.

        The model's markers in the text (``<|im_start|>``) become their tokens, so that a chat can be written by hand.
        For text of others use ``encode_chat``.

        Raises:
            TooLong: it is sure, before a long text is encoded, that it has more than ``most_tokens``. A list may still
                come that has more.
        """
        self._refuse_longer([text], most_tokens)
        return self._ids(text, add_special_tokens=True)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template shows the model the tools that it may call."""
        return self.has_chat_template and re.search(r"\btools\b", self._template(True)) is not None

    def template_mentions(self, text: str) -> bool:
        """Whether the chat template has this in it, as a role or a marker."""
        return self.has_chat_template and text in self._template(True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        most_tokens: int | None = None,
        /,
        *,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of a chat up to where the assistant's answer begins.

        What is given is text: a marker in it (``<|im_start|>``) is spelled in ordinary tokens and begins no turn. Only
        the template's own markers become their tokens.

        Args:
            messages: dictionaries with ``role`` and ``content``, both strings; the rest, as ``tool_calls``, is for the
                template, and plain enough for JSON.
            tools: what the model may call, as JSON schemas of functions, where the template takes them.
            most_tokens: as of ``encode``.
            add_generation_prompt: begin the assistant's answer.
            template_kwargs: variables of the template, as ``enable_thinking``.

        Raises:
            ConfigError: no chat template, or one that cannot be used (see ``chat_template.render``); messages that are
                not as above; a message that the template or the tokenizer turns into a marker. TooLong: as ``encode``.
        """
        if not self.has_chat_template:
            raise ConfigError("this model has no chat template; encode its prompt as plain text")
        chat = [_checked(message) for message in messages]
        if not chat:
            raise ConfigError("a chat needs at least one message")
        given = {"documents": None, **template_kwargs, "messages": chat, "tools": list(tools) if tools else None}
        for name in template_kwargs:
            if name in self._hf.special_tokens_map or name in ("messages", "tools", "self"):
                raise ConfigError(
                    f"template_kwargs cannot set {escaped(name)}, which is set to what was given or to the model's"
                )
        ids = self._chat_ids(given, add_generation_prompt, most_tokens)
        if self._may_forge(given):
            # A normaliser or the template may turn other text into a marker. Compare the number of markers with that
            # of a chat in which only the assistant says anything.
            plain = given | {
                "messages": [message if message["role"] == "assistant" else harmless(message) for message in chat],
                "tools": harmless(given["tools"]),
            }
            if self._num_markers(ids) - self._num_markers(self._chat_ids(plain, add_generation_prompt)):
                raise ConfigError("a message becomes a marker of the chat, such as the end of a turn: take it out")
        return ids

    def _may_forge(self, given: object) -> bool:
        """Whether a text in it has a character that markers begin with, or a compatibility form of one."""
        first = {marker[0] for marker in self._control if not marker.isalnum()}
        return any(first.intersection(unicodedata.normalize("NFKC", text)) for text in texts(given))

    def _num_markers(self, ids: list[int]) -> Counter[int]:
        return Counter(token for token in ids if token in self._control_ids)

    def _chat_ids(
        self, given: dict[str, Any], add_generation_prompt: bool, most_tokens: int | None = None
    ) -> list[int]:
        markers = re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))) or "(?!)")
        if not any(markers.search(text) for text in texts(given)):
            text = self._render(given, add_generation_prompt)
            self._refuse_longer([text], most_tokens)
            return self._ids(text)

        # Put each marker that was given between two strings that nobody can guess, render, and find them in the text.
        # Where the template cut a message, one string of a pair may be missing; the text is split there all the same.
        key = f"{secrets.randbelow(10**20):020}"
        start, end = f"\ue000{key}\ue001", f"\ue002{key}\ue001"
        marked = mapped(given, lambda text: markers.sub(rf"{start}\g<0>{end}", text))
        text = self._render(marked, add_generation_prompt)
        ids: list[int] = []
        continued = cache(self._continued)  # of the same few markers, which may be a hundred thousand
        pieces = re.split(f"{start}({markers.pattern}){end}|{start}|{end}", text)
        self._refuse_longer(filter(None, pieces), most_tokens)
        for number, piece in enumerate(pieces):
            if piece and number % 2:
                spelled = continued(piece[:1]) + continued(piece[1:])
                if self._special.intersection(spelled):
                    raise ConfigError(f"a message holds {escaped(piece)!r}, which this tokenizer cannot spell as text")
                ids += spelled
            elif piece:
                ids += continued(piece) if ids else self._ids(piece)
        return ids

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``tokens``, without special tokens or with them."""
        return self._hf.decode(list(tokens), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, which may be a part of a character. Special tokens have their names."""
        if token not in self._bytes:
            self._bytes[token] = self._spelled(token)
        return self._bytes[token]

    def _spelled(self, token: int) -> bytes:
        piece = self._hf.convert_ids_to_tokens(token)
        if piece is None:  # a model may have more rows than its tokenizer has tokens
            return b""
        if token in self._added:
            return piece.encode()
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes([int(match[1], 16)])
        if self._byte_letters and all(letter in self._byte_letters for letter in piece):
            return bytes(self._byte_letters[letter] for letter in piece)
        return piece.replace("▁", " ").encode()

    @cached_property
    def _byte_letters(self) -> dict[str, int]:
        """The letters that a tokenizer of bytes writes for them (GPT-2's); none where it is one of characters."""
        unknown = self._hf.unk_token_id
        ids = [self._hf.convert_tokens_to_ids(letter) for letter in ("Ġ", "Ċ", "Ã")]
        return byte_letters() if all(i is not None and i != unknown for i in ids) else {}

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for tokens that arrive one by one; special ones are left out or have their names as text."""
        if not skip_special:
            return TextStream(lambda tokens: self.decode(tokens, skip_special=False))
        from tokenizers import Tokenizer as Backend

        backend = getattr(self._hf, "backend_tokenizer", None)
        return TextStream(self.decode, self._special, backend if isinstance(backend, Backend) else None)

    @cached_property
    def _least_tokens(self) -> Callable[[str], int]:
        return least_tokens(self._hf)

    def _refuse_longer(self, given: Iterable[str], most_tokens: int | None) -> None:
        if most_tokens is not None and (least := sum(map(self._least_tokens, given))) > most_tokens:
            raise TooLong(f"the text has at least {least} tokens; at most {most_tokens} are possible")

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            return [int(token) for token in self._hf(text, add_special_tokens=add_special_tokens)["input_ids"]]
        except Exception as error:  # for example a lone surrogate, or a vocabulary without an unknown token
            said = escaped(" ".join(str(error).split()), 300)
            raise ConfigError(f"the tokenizer cannot encode {escaped(repr(text), 80)}: {said}") from error

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that follows another: some tokenizers put a space before the first word of a text."""
        line = self._ids("\n")
        both = self._ids("\n" + text)
        return both[len(line) :] if both[: len(line)] == line else self._ids(text)

    def _render(self, given: Mapping[str, Any], add_generation_prompt: bool) -> str:
        variables = {name: _plain(token) for name, token in self._hf.special_tokens_map.items()}
        variables |= {**given, "add_generation_prompt": add_generation_prompt}
        return render(self._template(bool(given["tools"])), variables)

    def _template(self, for_tools: bool) -> str:
        template = self._hf.chat_template
        if isinstance(template, dict):
            template = (for_tools and template.get("tool_use")) or template.get("default")
        if not isinstance(template, str):
            raise ConfigError("the model's chat template is not a text, or there are several and none is the default")
        return template


def _checked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a plain dictionary, its role and content strings."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ConfigError(f"a message must be a dictionary with role and content, got {escaped(repr(message))}")
    for key, value in message.items():
        if not isinstance(key, str) or (key in ("role", "content") and not isinstance(value, str)):
            raise ConfigError(f"a message's {escaped(str(key))} must be a string, got {escaped(repr(value))}")
    return dict(message)


def _plain(token: Any) -> Any:
    return [str(each) for each in token] if isinstance(token, (list, tuple)) else str(token)
