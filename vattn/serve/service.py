"""From a request of OpenAI's interface to its answer: prompt, generation, format."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic_core import to_json

from ..engine import AsyncEngine
from ..errors import ConfigError
from ..models.token_length import TooLong
from ..requests import Request
from . import chat, tools
from .errors import ApiError
from .formats import ChatFormat, CompletionFormat, usage_of
from .generation import Choice, Generation, ToolReader
from .grammar import Grammars
from .health import Health
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest, GenerationRequest, TokenizeRequest
from .streams import DONE, EventStream, broken_off, event, unless_gone
from .text import TextStream

if TYPE_CHECKING:
    from ..models import Tokenizer

__all__ = ["Service", "Settings"]

_log = logging.getLogger("vattn.serve")
_Result = TypeVar("_Result")
_MAX_STOP_TOKENS = 16  # of the engine
_GRACE_S = 5.0  # after its deadline an engine that works has ended a request


@dataclass(frozen=True)
class Settings:
    """What a server is told.

    Attributes:
        model_names: under which clients may ask; the first is the one that answers bear.
        max_model_len: tokens of prompt and answer at most.
        keys: any of which a client must show; none for no keys.
        request_timeout_s: after which a request ends.
        max_body_bytes, body_timeout_s: of what comes in.
        is_local: answer only requests that name this machine as their host.
    """

    model_names: tuple[str, ...]
    max_model_len: int
    keys: tuple[str, ...] = ()
    request_timeout_s: float = 600.0
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    is_local: bool = True


@dataclass(frozen=True)
class _Asked:
    """Prompts as tokens, from which field, and how their answers are to be formed and read."""

    field: str
    prompts: Sequence[Sequence[int]]
    form: dict[str, Any] | None
    skip_special: bool
    new_reader: Callable[[], ToolReader] | None = None


class _Reader:
    """Finds calls of tools in an answer: all, or the first."""

    def __init__(self, parser: tools.ToolParser, names: Collection[str], several: bool) -> None:
        self._stream, self._several = parser.stream(names), several

    def push(self, text: str) -> list[dict[str, Any]]:
        return self._wanted(self._stream.push(text))

    def flush(self) -> list[dict[str, Any]]:
        return self._wanted(self._stream.flush())

    def _wanted(self, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            each for each in deltas if self._several or all(not call["index"] for call in each.get("tool_calls", ()))
        ]


class Service:
    """Answers requests with one model.

    Args:
        serving: the engine.
        tokenizer: of its model.
        settings: see there.
    """

    def __init__(self, serving: AsyncEngine, tokenizer: Tokenizer, settings: Settings) -> None:
        self.serving, self.tokenizer, self.settings = serving, tokenizer, settings
        self.health = Health(serving)
        self.metrics = Metrics(serving.engine, settings.model_names[0])
        self._grammars = Grammars(tokenizer, serving.engine.model.config.vocab_size)
        # One thread: a tokenizer serves one caller at a time, and the chat template's process too.
        self._worker = ThreadPoolExecutor(1, "vattn-prompts")
        self._compiler = ThreadPoolExecutor(1, "vattn-grammars")  # of its own, as it may take seconds
        self._num_preparing = 0
        self._max_queue = serving.engine.max_waiting or 1 << 20  # of prompts that wait for their tokens as well

    # -- the three calls -----------------------------------------------------------------------------------------
    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        """``/v1/chat/completions``."""
        name = self._begin(body.model)
        style = ChatFormat(name, self.tokenizer, bool(body.logprobs))
        asked = await self._prepared(http, lambda: self._asked(body), "messages")
        return await self._respond(body, asked, style, http)

    def _asked(self, body: ChatRequest) -> _Asked:
        """What a chat comes to, before the engine. In the worker's thread."""
        variables = dict(body.chat_template_kwargs or {})
        if body.add_generation_prompt is not None:
            variables["add_generation_prompt"] = body.add_generation_prompt
        given, choice, several = body.tools or [], body.tool_choice or "auto", body.parallel_tool_calls is not False
        chosen = tools.checked_tools(given, choice)
        form, new_reader = body.response_format, None
        skip_special = body.skip_special_tokens is not False
        if chosen:
            parser = tools.parser_for(self.tokenizer)
            if parser is None:
                raise ConfigError("tools are not possible: in which form this model writes calls is not known here")
            form = tools.grammar_for(given, choice, parser, several) or form
            skip_special = skip_special and parser.skip_special
            names = [tool["function"]["name"] for tool in chosen]
            new_reader = partial(_Reader, parser, names, several)
        most = self.settings.max_model_len - 1
        tokens = chat.prompt_tokens(self.tokenizer, body.messages, chosen or None, most, **variables)
        return _Asked("messages", [tokens], form, skip_special, new_reader)

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Response:
        """``/v1/completions``."""
        name = self._begin(body.model)

        def encode() -> _Asked:
            most = self.settings.max_model_len - 1
            prompts = [self.tokenizer.encode(each, most) if isinstance(each, str) else each for each in body.prompt]
            return _Asked("prompt", prompts, body.response_format, body.skip_special_tokens is not False)

        style = CompletionFormat(name, self.tokenizer, body.logprobs is not None)
        return await self._respond(body, await self._prepared(http, encode, "prompt"), style, http)

    async def tokenize(self, body: TokenizeRequest, http: HttpRequest) -> dict[str, Any]:
        """``/tokenize``, as vLLM's."""
        self._begin(body.model)

        def encode() -> list[int]:
            if body.prompt is not None:
                return self.tokenizer.encode(body.prompt)
            assert body.messages is not None
            variables = {**(body.chat_template_kwargs or {}), "add_generation_prompt": body.add_generation_prompt}
            return chat.prompt_tokens(self.tokenizer, body.messages, body.tools, **variables)

        tokens = await self._prepared(http, encode, "prompt" if body.messages is None else "messages")
        found: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": self.settings.max_model_len,
            "tokens": tokens,
            "token_strs": None,
        }
        if body.return_token_strs:
            found["token_strs"] = [self.tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]
        return found

    # -- on the way to the engine --------------------------------------------------------------------------------
    def _begin(self, model: str | None) -> str:
        """The name that the answer bears."""
        if self.health.is_closing:
            raise _shutting_down()
        if model is not None and model not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            raise ApiError(404, f"this server has no such model; it has {known}", param="model", code="model_not_found")
        return model or self.settings.model_names[0]

    async def _prepared(
        self, http: HttpRequest, make: Callable[[], _Result], field: str, worker: ThreadPoolExecutor | None = None
    ) -> _Result:
        """What ``make`` returns in the worker's thread; ApiError 429 where too many wait for it."""
        if self._num_preparing >= self._max_queue:
            raise ApiError(429, "too many prompts wait to be read; send it again later", headers={"retry-after": "1"})
        self._num_preparing += 1
        try:
            made = asyncio.get_running_loop().run_in_executor(worker or self._worker, make)
            return await unless_gone(http.receive, _awaited(made), self.settings.request_timeout_s)
        except TooLong as error:
            raise _wrong(field, str(error), "context_length_exceeded") from error
        except ConfigError as error:
            raise ApiError.of_field(error, field) from error
        finally:
            self._num_preparing -= 1

    def _generation(self, body: GenerationRequest, asked: _Asked, grammars: Sequence[Any]) -> Generation:
        """Of requests with the client's settings."""
        prompts = asked.prompts
        longest = max(map(len, prompts))
        room = self.settings.max_model_len - longest
        most = body.token_limit
        if room < 1 or (most is not None and most > room):
            wanted = "" if most is None else f" and {most} new ones"
            said = f"{longest} tokens of prompt{wanted}; {self.settings.max_model_len} together are possible"
            raise _wrong(asked.field if room < 1 else body.limit_field, said, "context_length_exceeded")
        num_answers = body.num_samples * len(prompts)
        if num_answers > self._max_queue:
            raise _wrong("n", f"{num_answers} answers are more than may wait, which are {self._max_queue}")
        stops = {*(() if body.ignore_eos else self.tokenizer.stop_tokens), *(body.stop_token_ids or ())}
        if len(stops) > _MAX_STOP_TOKENS:
            raise _wrong("stop_token_ids", f"{len(stops)} with the model's own; {_MAX_STOP_TOKENS} are accepted")
        sampling = body.sampling(secrets.randbits(63))
        requests = [
            Request(
                prompt_tokens=prompt,
                max_new_tokens=room if most is None else most,
                sampling=sampling,
                stop_tokens=tuple(stops),
                num_logprobs=body.num_logprobs,
                n=body.num_samples,
                priority=-(body.priority or 0),  # vLLM's lower ones come first
                deadline_s=self.settings.request_timeout_s,
                allowed_tokens=grammar,
                cache_salt=body.cache_salt or body.user or None,  # an empty user is none
            )
            for prompt, grammar in zip(prompts, grammars, strict=True)
        ]
        choices = [
            Choice(
                index,
                TextStream(self.tokenizer, body.stop, asked.skip_special),
                None if asked.new_reader is None else asked.new_reader(),
                body.num_logprobs is not None,
            )
            for index in range(num_answers)
        ]
        return Generation(self.serving, requests, choices)

    # -- and back ------------------------------------------------------------------------------------------------
    async def _respond(
        self, body: GenerationRequest, asked: _Asked, style: ChatFormat | CompletionFormat, http: HttpRequest
    ) -> Response:
        grammars: Sequence[Any] = [None] * len(asked.prompts)
        if (form := asked.form) is not None:
            if body.ignore_eos or body.min_tokens:
                raise _wrong(
                    "ignore_eos" if body.ignore_eos else "min_tokens", "a given form says where an answer ends"
                )

            def compiled() -> list[Any]:
                return [self._grammars.for_format(form) for _ in asked.prompts]

            grammars = await self._prepared(http, compiled, "response_format", self._compiler)
        generation = self._generation(body, asked, grammars)
        with self._noted():
            await generation.start()
        timeout_s = self.settings.request_timeout_s + _GRACE_S
        close = partial(self._end, generation, style)
        if body.stream:
            return EventStream(self._events(body, generation, style), close, timeout_s)
        try:
            answer = await unless_gone(http.receive, self._collected(generation, style), timeout_s)
        finally:
            await close()
        return Response(to_json(answer), media_type="application/json")

    async def _collected(self, generation: Generation, style: ChatFormat | CompletionFormat) -> dict[str, Any]:
        with self._noted():
            async for piece in generation.pieces():
                style.add(piece)
        return style.answer(generation.choices, usage_of(generation))

    async def _events(
        self, body: GenerationRequest, generation: Generation, style: ChatFormat | CompletionFormat
    ) -> AsyncGenerator[bytes, None]:
        options = body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        with_all = options is not None and bool(options.continuous_usage_stats)
        try:
            with self._noted():
                async for piece in generation.pieces():
                    for chunk in style.chunk(piece):
                        if with_all:
                            chunk["usage"] = usage_of(generation)
                        elif with_usage:
                            chunk["usage"] = None
                        yield event(chunk)
            if with_usage:
                yield event(style.usage_chunk(usage_of(generation)))
            yield DONE
        except ApiError as error:
            yield broken_off(error)
        except Exception:
            _log.exception("a stream failed")
            yield broken_off(ApiError(500, "the server failed at this request; its log says why"))

    async def _end(self, generation: Generation, style: ChatFormat | CompletionFormat) -> None:
        await generation.close()
        self.metrics.observe_request(
            num_prompt_tokens=generation.num_prompt_tokens,
            num_new_tokens=generation.num_tokens,
            finish_reasons=[choice.finish_reason for choice in generation.choices],
            seconds=time.monotonic() - style.began_s,
        )

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            if error.code != "engine_error":
                raise
            if self.health.is_closing:
                raise _shutting_down() from error
            _log.error("the engine failed at a request", exc_info=error.__cause__)
            self.health.failed()
            raise

    def close(self) -> None:
        """End the threads, and the process that compiles grammars."""
        for worker in (self._worker, self._compiler):
            worker.shutdown(cancel_futures=True)
        self._grammars.close()


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"retry-after": "10"})


def _wrong(field: str, said: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{field}: {said}", param=field, code=code)


async def _awaited(future: Awaitable[_Result]) -> _Result:
    return await future
