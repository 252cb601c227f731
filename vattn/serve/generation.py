"""Requests of the engine behind one HTTP request: from tokens to pieces of text, for each choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..engine import AsyncEngine
from ..errors import ConfigError, QueueFull
from ..requests import Request, StepToken, checked_request
from .errors import ApiError
from .text import TextStream

__all__ = ["Choice", "Generation", "Piece", "ToolReader"]

_RETRY_AFTER_S = 1


class ToolReader(Protocol):
    """Finds calls of tools in a text that comes in pieces."""

    def push(self, text: str) -> list[dict[str, Any]]: ...
    def flush(self) -> list[dict[str, Any]]: ...


@dataclass(slots=True)
class Piece:
    """What is new of one choice.

    Attributes:
        deltas: as of OpenAI's chunks: ``{"content": ...}`` or ``{"tool_calls": ...}``.
        tokens: those that came since the last piece, where log-probabilities are wanted.
        finish_reason: with the last piece.
    """

    index: int
    deltas: list[dict[str, Any]]
    tokens: list[StepToken]
    finish_reason: str | None


@dataclass(slots=True)
class Choice:
    """One of the answers in the making.

    Args:
        index: its number in the response.
        text: its text so far.
        tools: finds calls in the text; None where there are none.
        wants_tokens: keep tokens for log-probabilities.
    """

    index: int
    text: TextStream
    tools: ToolReader | None = None
    wants_tokens: bool = False
    num_tokens: int = 0
    finish_reason: str | None = None
    _tokens: list[StepToken] = field(default_factory=list)
    _has_calls: bool = False

    def push(self, new: StepToken, stop_tokens: Collection[int]) -> Piece | None:
        """Another token, or the end, of this sample. None while there is nothing to show."""
        if self.finish_reason is not None:  # it met a stop string; others of the request go on
            return None
        text = ""
        if new.token is not None:
            self.num_tokens += 1
            if not (new.finish_reason == "stop" and new.token in stop_tokens):
                text = self.text.push(new.token)
                if self.wants_tokens:
                    self._tokens.append(new)
        self.finish_reason = "stop" if self.text.stopped is not None else new.finish_reason
        if self.finish_reason is not None:
            text += self.text.finish()
        deltas = self._deltas(text)
        if self._has_calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        if not deltas and self.finish_reason is None:
            return None
        piece = Piece(self.index, deltas, self._tokens, self.finish_reason)
        self._tokens = []
        return piece

    def _deltas(self, text: str) -> list[dict[str, Any]]:
        if self.tools is None:
            return [{"content": text}] if text else []
        deltas = self.tools.push(text) if text else []
        if self.finish_reason is not None:
            deltas += self.tools.flush()
        self._has_calls = self._has_calls or any("tool_calls" in delta for delta in deltas)
        return deltas


class Generation:
    """The samples of one or several prompts, merged.

    Args:
        serving: runs them.
        requests: one a prompt, with the same number of samples.
        choices: of all samples, those of a prompt side by side.
    """

    def __init__(self, serving: AsyncEngine, requests: Sequence[Request], choices: Sequence[Choice]) -> None:
        self._serving, self._requests, self.choices = serving, requests, choices
        self._first: list[asyncio.Future[StepToken | None]] = []
        self._streams: list[AsyncGenerator[StepToken, None]] = []
        self._num_cached = [0] * len(requests)

    async def start(self) -> None:
        """Submit all of it, or nothing.

        Raises:
            ApiError: 400 for a wrong value, 429 where the queue is full, 503 where the engine takes nothing.
        """
        try:
            for request in self._requests:
                stream: Any = self._serving.stream(request)
                self._streams.append(stream)
                first = asyncio.ensure_future(_first_of(stream))
                self._first.append(first)
                # A stream submits its request before it first waits: one turn of the event loop.
                await asyncio.sleep(0)
                if first.done() and not first.cancelled() and (error := first.exception()) is not None:
                    raise self._refusal(error, request)
        except BaseException:
            await self.close()
            raise

    def _refusal(self, error: BaseException, request: Request) -> BaseException:
        if isinstance(error, QueueFull):
            return ApiError(
                429,
                f"as many requests wait as may ({error.max_waiting}); send it again later",
                code="queue_full",
                headers={"retry-after": str(_RETRY_AFTER_S)},
            )
        if isinstance(error, ConfigError):
            try:
                checked_request(request, vocab_size=self._serving.engine.model.config.vocab_size)
            except ConfigError as said:
                return ApiError.of_field(said, "prompt")
        return failure(error)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Of all choices, as they come. Closing it cancels what still runs.

        Raises:
            ApiError: 503 where the engine failed, 504 at the deadline.
        """
        num_open, samples = len(self.choices), self._requests[0].n
        stop_tokens = self._requests[0].stop_tokens
        try:
            async with aclosing(self._merged()) as tokens:
                async for number, new in tokens:
                    if isinstance(new.error, ConfigError) and self._requests[0].allowed_tokens is not None:
                        raise ApiError(400, str(new.error), param="response_format", code="invalid_value")
                    if new.finish_reason == "error":
                        raise failure(new.error)
                    if new.finish_reason == "deadline":
                        raise ApiError(504, "the request took longer than this server allows", code="timeout")
                    if new.index == 0:  # the others begin with what it computed
                        self._num_cached[number] = new.num_cached
                    choice = self.choices[number * samples + new.index]
                    was_open = choice.finish_reason is None
                    if (piece := choice.push(new, stop_tokens)) is not None:
                        yield piece
                    num_open -= was_open and choice.finish_reason is not None
                    if not num_open:
                        return
            raise failure(None)  # somebody else cancelled it
        except ApiError:
            raise
        except Exception as error:
            raise failure(error) from error
        finally:
            await self.close()

    async def _merged(self) -> AsyncGenerator[tuple[int, StepToken], None]:
        if len(self._streams) == 1:
            if (new := await self._first[0]) is not None:
                yield 0, new
                async for new in self._streams[0]:
                    yield 0, new
            return
        queue: asyncio.Queue[tuple[int, StepToken | Exception | None]] = asyncio.Queue()
        readers = [asyncio.ensure_future(self._read(number, queue)) for number in range(len(self._streams))]
        try:
            num_open = len(readers)
            while num_open:
                number, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield number, item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _read(self, number: int, queue: asyncio.Queue[Any]) -> None:
        try:
            new = await self._first[number]
            while new is not None:
                queue.put_nowait((number, new))
                new = await anext(self._streams[number], None)
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    async def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        for first in self._first:
            first.cancel()
        await asyncio.gather(*self._first, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(request.prompt_tokens) for request in self._requests)

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that were not computed for these requests. Known with the first tokens."""
        return sum(self._num_cached)

    @property
    def num_tokens(self) -> int:
        """Of all choices so far."""
        return sum(choice.num_tokens for choice in self.choices)


async def _first_of(stream: AsyncIterator[StepToken]) -> StepToken | None:
    return await anext(stream, None)


def failure(error: BaseException | None) -> ApiError:
    """For the client, with what the engine raised as its cause, which is for the log."""
    found = ApiError(503, "the engine failed at this request; the server's log says why", code="engine_error")
    found.__cause__ = error
    return found
