"""Answers of a given form: JSON, JSON of a schema, calls of tools. By xgrammar."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import escaped, shown
from ..errors import ConfigError
from ..models.child import Child
from .grammar_child import CPU_SECONDS, MEMORY_BYTES
from .schema import check_schema, schemas_of

if TYPE_CHECKING:
    from ..models import Tokenizer

__all__ = ["Grammars"]

_KEPT_BYTES = 256 << 20  # of compiled grammars, as JSON
_KEPT_ERRORS_BYTES = 1 << 10  # what an error counts as
_TOKEN_CPU_S = 1.0  # for the mask of one token


class Grammars:
    """Compiles the forms that requests ask for, each once while it is remembered. Any thread may ask.

    Args:
        tokenizer: of the model.
        vocab_size: of the model: how many logits it has.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[int, Any]] = OrderedDict()  # question -> (bytes, grammar or what is wrong)

    def for_format(self, response_format: Mapping[str, Any]) -> Callable[[Sequence[int]], Any] | None:
        """A function for ``Request.allowed_tokens``, one for each request, also of several samples; None for free text.

        Compiling takes milliseconds to seconds, in another process, which the first call starts in some seconds: not
        for an event loop.

        Args:
            response_format: as OpenAI's, of type ``"text"``, ``"json_object"`` or ``"json_schema"``; or what
                ``tools.grammar_for`` returns. Spaces between the parts of JSON are the model's choice. Properties come
                in the schema's order, and others than the schema's only where it has ``additionalProperties``.

        Raises:
            ConfigError: another type, a schema that is none or has what is not kept to, or a grammar that takes too
                much time or memory.
        """
        question = _question(response_format)
        if question is None:
            return None
        return _Masks(self._compiled(question), self._vocab_size, sorted(self._tokenizer.stop_tokens))

    def warm_up(self) -> None:
        """Start the process and load what is needed, so that no request waits for that. Takes some seconds.

        Raises:
            ConfigError: xgrammar is not installed.
        """
        self.for_format({"type": "json_object"})

    def close(self) -> None:
        """End the process. Another form that is not remembered starts it again."""
        with self._lock:
            if "_child" in vars(self):
                self._child.close()

    @cached_property
    def _info(self) -> Any:
        try:
            import xgrammar
        except ImportError as error:
            raise ConfigError("grammars need xgrammar: pip install 'vattn[serve]'") from error
        stops = sorted(self._tokenizer.stop_tokens)
        return xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer.hf, vocab_size=self._vocab_size, stop_token_ids=stops
        )

    @cached_property
    def _child(self) -> Child:
        return Child(Path(__file__).with_name("grammar_child.py"), self._info.serialize_json())

    def _compiled(self, question: dict[str, Any]) -> Any:
        import xgrammar

        try:
            key = json.dumps(question)
        except RecursionError as error:
            raise ConfigError("response_format: the schema is too deeply nested") from error
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            child = self._child
        if found is None:
            found = self._asked(child, question)
            with self._lock:
                self._kept[key] = found
                while sum(size for size, _ in self._kept.values()) > _KEPT_BYTES and len(self._kept) > 1:
                    self._kept.popitem(last=False)
        if isinstance(found[1], str):
            raise ConfigError(f"response_format cannot be kept to: {found[1]}")
        assert isinstance(found[1], xgrammar.CompiledGrammar)
        return found[1]

    def _asked(self, child: Child, question: dict[str, Any]) -> tuple[int, Any]:
        import xgrammar

        answer = child.ask(question)
        if (text := answer.get("compiled")) is not None:
            return len(text), xgrammar.CompiledGrammar.deserialize_json(text, self._info)
        bounds = f"its grammar takes more than {CPU_SECONDS:g} s of CPU time or {MEMORY_BYTES >> 20} MiB"
        return _KEPT_ERRORS_BYTES, escaped(answer.get("wrong", bounds), 300)


def _question(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What to compile, checked."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"schema": {"type": "object"}}
    if kind == "json_schema":
        asked = given.get("json_schema")
        schema = asked.get("schema", {}) if isinstance(asked, Mapping) else None
        if not isinstance(schema, Mapping):
            raise ConfigError(f"response_format.json_schema must have a schema, an object, got {shown(asked)}")
        check_schema("response_format.json_schema.schema", schema)
        return {"schema": schema}
    if kind == "structural_tag":
        for schema in schemas_of(given):
            check_schema("parameters", schema)
        return {"structural_tag": given}
    raise ConfigError(f"response_format.type must be text, json_object or json_schema, got {escaped(shown(kind))}")


class _Masks:
    """Which tokens may come next in the answers of one request. For one thread at a time.

    Args:
        grammar: compiled.
        stop_tokens: which may come where the answer is complete.
    """

    def __init__(self, grammar: Any, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        self._grammar, self._vocab_size, self._stop_tokens = grammar, vocab_size, stop_tokens
        self._matchers: dict[tuple[int, ...], Any] = {}  # by answer so far; samples of equal ones share one

    def __call__(self, answer: Sequence[int]) -> torch.Tensor:
        """32 tokens to an int32, ``[ceil(vocab_size / 32)]``.

        Raises:
            ConfigError: the answer does not keep to the grammar, or the next token takes more than a second to find.
        """
        import xgrammar

        begin = time.thread_time()
        matcher = self._matcher(tuple(answer))
        mask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        if matcher.is_terminated():
            mask.zero_()
            for token in self._stop_tokens:
                mask[0, token // 32] |= 1 << token % 32 if token % 32 < 31 else -(1 << 31)
        else:
            matcher.fill_next_token_bitmask(mask)
        if (taken := time.thread_time() - begin) > _TOKEN_CPU_S:  # everybody's next token has waited for it
            raise ConfigError(f"the grammar of response_format took {taken:.1f} s for one token; make it simpler")
        return mask[0]

    def _matcher(self, answer: tuple[int, ...]) -> Any:
        """One that has read the answer."""
        import xgrammar

        matcher = self._matchers.get(answer)
        if matcher is None:
            matcher = self._matchers.pop(answer[:-1], None) if answer else None
            news = answer[-1:]
            if matcher is None:
                matcher, news = xgrammar.GrammarMatcher(self._grammar), answer
            for token in news:
                if not matcher.accept_token(token):
                    raise ConfigError(f"token {token} of the answer does not keep to the grammar of response_format")
            self._matchers[answer] = matcher
        return matcher
