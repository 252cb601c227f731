"""``vattn chat``: a conversation on a terminal, or with the lines of a pipe."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from ..engine import Engine, Request, Sampling
from ..errors import ConfigError
from .generate import require_sampling, require_text
from .model import loaded_model, opened_cache, place_for
from .report import Meter, format_bytes
from .text import one_line, printable

if TYPE_CHECKING:
    from ..models import Tokenizer

__all__ = ["chat"]

_STOPPED = "; stopped"
_CUT = "; cut off at its longest"


def chat(args: argparse.Namespace) -> None:
    """Run the command until its input ends.

    Raises:
        ConfigError: an option, model or device that cannot work, or a message that does not fit into the context.
    """
    if sys.stdin is None:
        raise ConfigError("stdin is closed: there are no messages to read")
    require_text("--system", args.system or "")
    require_sampling(args)
    place = place_for(args)

    from vattn.models.loader import load_tokenizer

    tokenizer = load_tokenizer(place.path)
    if not tokenizer.has_chat_template:
        raise ConfigError("this model has no chat template; vattn generate continues plain text")
    with (
        loaded_model(place) as model,
        opened_cache(place, model, 1) as cache,
        Engine(model, cache, attention=place.attention) as engine,
    ):
        conversation = _Conversation(engine, tokenizer, args)
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        while (message := _read_message(is_terminal)) is not None:
            try:
                if message.strip():
                    conversation.answer(message)
            except ConfigError as error:  # a message too long, say
                if not is_terminal:
                    raise
                print(f"vattn: {one_line(error)}", file=sys.stderr, flush=True)


def _read_message(is_terminal: bool) -> str | None:
    """The next line; None at the end of the input. On a terminal Ctrl-C drops the line that was begun."""
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - from then on input() has a history and can be edited
    while True:
        try:
            return input("> ") if is_terminal else input()
        except EOFError:
            if is_terminal:
                print()
            return None
        except UnicodeDecodeError:
            raise ConfigError("a message on stdin is not valid UTF-8") from None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()


class _Conversation:
    """What was said so far. Each answer computes all of it again: the engine keeps no K and V between requests."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        self._engine = engine
        self._meter = Meter()
        self._tokenizer = tokenizer
        self._args = args
        self._system = [] if args.system is None else [{"role": "system", "content": args.system}]
        self._turns: list[dict[str, str]] = []  # of the user and the assistant, alternating
        self._num_answers = 0
        self._capacity = engine.longest

    def answer(self, message: str) -> None:
        """Write the model's answer to a message. Ctrl-C ends it early; what was said stays in the history.

        Raises:
            ConfigError: the message leaves no room for an answer; the history is what it was.
        """
        require_text("the message", message)
        prompt, turns = self._prompt([*self._turns, {"role": "user", "content": message}])
        if num_forgotten := (len(self._turns) + 1 - len(turns)) // 2:
            self._say(f"the conversation has outgrown the cache: its oldest {num_forgotten} turns are forgotten")
        start = time.perf_counter()
        tokens, text, ending = self._generate(prompt)
        print(flush=True)
        if text or ending != _STOPPED:
            self._turns = [*turns, {"role": "assistant", "content": text}]
        seconds = time.perf_counter() - start
        in_use = format_bytes(self._meter.latest.in_use_bytes) if self._meter.latest else "nothing"
        self._say(
            f"{len(prompt)} + {len(tokens)} of at most {self._capacity} tokens in {seconds:.1f} s, {in_use} of K and V"
            f"{ending}"
        )

    def _generate(self, prompt: list[int]) -> tuple[list[int], str, str]:
        """Write an answer as it comes; returns (tokens, text, a note on how it ended)."""
        args = self._args
        request = Request(
            prompt,
            min(args.max_new_tokens, self._capacity - len(prompt)),
            Sampling(args.temperature, args.top_k, args.top_p, seed=(args.seed + self._num_answers) % 2**63),
            self._tokenizer.stop_tokens,
        )
        self._num_answers += 1
        tokens: list[int] = []
        text, ending = "", ""
        stream = self._tokenizer.stream()
        engine = self._engine
        request_id = engine.submit(request)
        try:
            while engine.has_work:
                news = engine.step()
                if engine.has_work:  # at the end its memory has been given back
                    self._meter.observe(engine.cache.stats())
                for new in news:
                    if new.token is None:
                        raise new.error or RuntimeError(f"the answer ended with {new.finish_reason}")
                    tokens.append(new.token)
                    piece = stream.push(new.token) + ("" if new.finish_reason is None else stream.finish())
                    text += piece
                    print(printable(piece), end="", flush=True)
                    ending = _CUT if new.finish_reason == "length" else ""
        except KeyboardInterrupt:
            ending = _STOPPED
        finally:
            engine.cancel(request_id)  # no effect unless something was raised
        return tokens, text, ending

    def _prompt(self, turns: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """(the conversation as tokens, its turns), without the oldest turns where all of them do not fit."""
        while True:
            prompt = self._tokenizer.encode_chat([*self._system, *turns])
            if len(prompt) < self._capacity:
                return prompt, turns
            if len(turns) == 1:
                raise ConfigError(
                    f"the message takes {len(prompt)} tokens of the {self._capacity} that the model's context and the "
                    "memory limit allow, and leaves no room for an answer"
                )
            turns = turns[2:]

    def _say(self, text: str) -> None:
        if not self._args.quiet:
            print(f"({text})", file=sys.stderr, flush=True)
