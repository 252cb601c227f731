"""Errors as OpenAI's interface reports them: one object with a message, the field, and a code."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ..arguments import escaped

__all__ = ["ApiError", "error_object", "install", "response_of"]

_log = logging.getLogger("vattn.serve")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
# Where an error names a field of ``vattn.Request`` rather than that of the interface.
_PLAIN_FIELDS = {"n", "seed", "temperature", "tools", "messages", "priority", "prompt"}
_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_logprobs": "top_logprobs",
    "stop_tokens": "stop_token_ids",
    "prompt_tokens": "prompt",
    "template_kwargs": "chat_template_kwargs",
}


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        message: says what to change.
        param: the field that is wrong, if it is one.
        code: a name for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @classmethod
    def of_field(cls, error: Exception, default: str | None = None) -> ApiError:
        """A ConfigError about a value of the request: it begins with the field that it is about."""
        message = str(error)
        for inside, outside in _FIELDS.items():
            message = message.replace(inside, outside)
        named = re.match(r"(?:the keys of )?((?:[a-z_]+(?:\[\d+\])*\.?)+)(?<!\.)(?=:? )", message)
        known = named is not None and ("_" in named[1] or "[" in named[1] or named[1] in _PLAIN_FIELDS)
        return cls(400, message, param=named[1] if named and known else default, code="invalid_value")


def error_object(error: ApiError) -> dict[str, Any]:
    """As OpenAI's."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def response_of(error: ApiError) -> Response:
    """With ASCII only: a message may hold what UTF-8 cannot."""
    return Response(json.dumps(error_object(error)), error.status, error.headers, "application/json")


def install(app: FastAPI) -> None:
    """Let every error of the app be one of these objects."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> Response:
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return response_of(_of_validation(error))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {escaped(request.url.path)}"
        said = {404: f"there is no {where}", 405: f"{where} is not allowed", 400: "the body is not JSON"}
        headers = None if error.headers is None else dict(error.headers)
        return response_of(ApiError(error.status_code, said.get(error.status_code, str(error.detail)), headers=headers))

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:  # its traceback goes to the log
        return response_of(ApiError(500, "the server failed at this request; its log says why"))


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong. What the client sent is not repeated."""
    first = error.errors()[0]
    kind, where = first["type"], first["loc"][1:]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be parsed')}")
    if not where:
        said = first["msg"].removeprefix("Value error, ") if kind == "value_error" else "the body must be a JSON object"
        first_word = said.split()[0]
        return ApiError(400, said, param=first_word if "_" in first_word or first_word == "n" else None)
    field = escaped("".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)[1:])
    if kind == "extra_forbidden":
        return ApiError(400, f"{field} is not a parameter of this interface", param=field, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{field} is missing", param=field, code="missing_required_parameter")
    said = first["msg"].removeprefix("Value error, ")
    said = said if said.startswith(field) else f"{field}: {said[:1].lower()}{said[1:]}"
    return ApiError(400, said, param=field, code="invalid_value")
