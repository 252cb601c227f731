"""The routes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from . import errors, status
from .errors import ApiError
from .limits import Guard
from .protocol import ChatRequest, CompletionRequest, TokenizeRequest
from .service import Service

if TYPE_CHECKING:
    from ..engine import AsyncEngine
    from ..models import Tokenizer
    from .service import Settings

__all__ = ["create_app"]


def create_app(serving: AsyncEngine, tokenizer: Tokenizer, settings: Settings) -> FastAPI:
    """OpenAI's interface over an engine. ``app.state.service`` is what answers.

    Args:
        serving: open for as long as the app runs.
        tokenizer: of the engine's model.
        settings: see there.
    """
    # No pages of documentation, which load scripts of others, and no redirects, which trust the host that is named.
    app = FastAPI(title="vattn", openapi_url=None, redirect_slashes=False)
    service = app.state.service = Service(serving, tokenizer, settings)
    app.add_middleware(
        Guard,
        observe=service.metrics.observe_response,
        keys=settings.keys,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
        is_local=settings.is_local,
    )
    errors.install(app)
    began_s = int(time.time())

    @app.post("/v1/chat/completions")
    async def _(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/completions")
    async def _(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    @app.post("/tokenize")
    async def _(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        return await service.tokenize(body, request)

    def model(name: str) -> dict[str, Any]:
        described = {"id": name, "object": "model", "created": began_s, "owned_by": "vattn"}
        return described | {"root": settings.model_names[0], "max_model_len": settings.max_model_len}

    @app.get("/v1/models")
    async def _() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in settings.model_names]}

    @app.get("/v1/models/{name:path}")
    async def _(name: str) -> dict[str, Any]:
        if name not in settings.model_names:
            raise ApiError(404, "this server has no such model", param="model", code="model_not_found")
        return model(name)

    @app.get("/health")
    async def _() -> Response:
        trouble = await service.health.trouble()
        if trouble is not None:
            raise ApiError(503, trouble, code="unhealthy")
        return JSONResponse({})

    @app.get("/metrics")
    async def _() -> Response:
        text, kind = service.metrics.render()
        return Response(text, headers={"content-type": kind})

    @app.get("/")
    async def _() -> Response:
        headers = {"content-security-policy": status.CONTENT_SECURITY_POLICY, "x-content-type-options": "nosniff"}
        return Response(status.page(), headers=headers, media_type="text/html")

    @app.get("/status.json")
    async def _() -> Response:
        found = status.snapshot(serving.engine, settings.model_names[0])
        return JSONResponse(found, headers={"cache-control": "no-store"})

    return app
