"""Replicas of an engine on the machines of a Ray cluster, behind one address.

``serve run vattn.serve.ray:build_app model=smollm2 num_replicas=2``. Ray Serve starts, watches, drains and replaces the
replicas. A front checks keys and bodies, and sends a request to the replica that has its prompt's beginning stored.
Clients must send the key that the environment variable ``VATTN_API_KEY`` of the front holds. Without one it does not
start, unless ``no_api_key`` says so.
"""

# Annotations are values here: Ray reads that of build_app, and pydantic those of Options.
import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ByteSize, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import AsyncEngine, Engine
from ..errors import ConfigError
from .app import create_app
from .errors import ApiError, response_of
from .limits import Guard
from .metrics import merged
from .ray_router import prefix_of
from .service import Service, Settings
from .streams import broken_off

__all__ = ["Options", "build_app"]

_log = logging.getLogger("vattn.serve")
_ATTEMPTS = 5  # at a request of which the client has seen nothing
_PAUSE_S = 0.1  # behind the first where no replica could be asked; twice as long behind each other
_METRICS_S = 10.0
_MAX_AT_FRONT = 100_000  # requests; the replicas bound how many there are
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")


class Options(BaseModel):
    """What ``serve run`` takes, as ``name=value``.

    Attributes:
        model: ``smollm2``, a folder or a .gguf file that every machine has.
        served_model_name: for clients; the default is ``model``.
        num_replicas: of the engine; ``auto`` lets Ray choose by load.
        num_fronts: processes that check requests and send them on.
        num_cpus, num_gpus: that Ray reserves for each replica. It runs on the GPU where ``num_gpus`` is above 0.
        dtype: of weights and cache; the default is bfloat16 on a GPU and float32 on the CPU.
        memory_limit: physical memory for a replica's cache, as ``20GiB``.
        max_model_len: tokens of prompt and answer; the default is the most possible.
        max_num_seqs: requests at a replica at a time, computed together.
        max_queue: requests at a front that wait for a replica; more get 429.
        max_body_size: of a request.
        no_api_key: let everybody in who can reach the address.
        request_timeout: seconds after which a request ends.
        drain_timeout: seconds that a replica which is to stop may take for the requests that it has.
        health_period: seconds from one look at a replica's health to the next.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2"
    served_model_name: str = ""
    num_replicas: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    num_fronts: int = Field(1, ge=1)
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    memory_limit: ByteSize | None = Field(None, gt=0)
    max_model_len: int | None = Field(None, ge=2)
    max_num_seqs: int = Field(64, ge=1)
    max_queue: int = Field(256, ge=1)
    max_body_size: ByteSize = Field(ByteSize(8 << 20), gt=0)
    no_api_key: bool = False
    request_timeout: float = Field(600.0, gt=0)
    drain_timeout: float = Field(600.0, ge=0)
    health_period: float = Field(10.0, gt=0)


def build_app(args: Options) -> Application:
    """The application, for ``serve run``, ``serve.run`` and the ``import_path`` of a Serve config."""
    options = args

    def build_front() -> ASGIApp:
        return _front(options)

    replica: Any = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=options.num_replicas,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        max_ongoing_requests=options.max_num_seqs,
        max_queued_requests=options.max_queue,
        graceful_shutdown_timeout_s=options.drain_timeout,
        health_check_period_s=options.health_period,
        request_router_config={"request_router_class": "vattn.serve.ray_router:PrefixRouter"},
    )
    front: Any = serve.deployment(
        serve.ingress(build_front)(),
        name="Front",
        num_replicas=options.num_fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_AT_FRONT,
        graceful_shutdown_timeout_s=options.drain_timeout,
    )
    app: Application = front.bind(replica.bind(options))
    return app


@dataclass(frozen=True)
class _Asked:
    """A request on its way to a replica.

    Attributes:
        scope: of ASGI, what of it can be sent.
        body: all of it.
    """

    scope: Mapping[str, Any]
    body: bytes


class Replica:
    """An engine with OpenAI's interface over it, of which Ray Serve runs as many as it is told."""

    def __init__(self, options: Options) -> None:
        from vattn.models.loader import find, load_tokenizer

        path = find(options.model)
        device = torch.device("cuda" if options.num_gpus else "cpu")
        dtype = getattr(torch, options.dtype or ("bfloat16" if options.num_gpus else "float32"))
        # Nothing closes it: the process ends with the replica, after what is under way.
        self._opened = ExitStack()
        engine = Engine(
            _loaded(path, device, dtype, self._opened),
            max_batch=options.max_num_seqs,
            memory_limit=options.memory_limit,
            max_waiting=max(256, 4 * options.max_num_seqs),
        )
        longest = min(engine.longest, engine.cache.layout.max_seq_len)
        if options.max_model_len is not None and options.max_model_len > longest:
            raise ConfigError(f"max_model_len {options.max_model_len} exceeds the {longest} tokens that are possible")
        settings = Settings(
            model_names=(options.served_model_name or options.model,),
            max_model_len=options.max_model_len or longest,
            request_timeout_s=options.request_timeout,
            max_body_bytes=options.max_body_size,
            is_local=False,  # the front has looked who asks
        )
        engine.warm_up()
        self._app = create_app(AsyncEngine(engine), load_tokenizer(path), settings)
        self._service: Service = self._app.state.service
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(
        self, asked: _Asked, prefix: bytes
    ) -> AsyncGenerator[tuple[int, list[tuple[bytes, bytes]]] | bytes, None]:
        """Status and headers, then the body in parts. Closing it ends the request. The prefix is for the router."""
        sent: asyncio.Queue[Message | Exception] = asyncio.Queue(1)
        came = [{"type": "http.request", "body": asked.body, "more_body": False}]

        async def receive() -> Message:
            if came:
                return came.pop()
            await asyncio.Event().wait()  # until the task is cancelled
            raise AssertionError

        async def run() -> None:
            try:
                await self._app(dict(asked.scope), receive, sent.put)
                end: Exception = RuntimeError("the answer ended before its last part")  # not read behind the last part
            except Exception as error:  # whoever reads the parts raises it, behind those that were sent
                end = error
            await sent.put(end)

        running = asyncio.ensure_future(run())
        try:
            while True:
                message = await sent.get()
                if isinstance(message, Exception):
                    raise message
                if message["type"] == "http.response.start":
                    yield message["status"], [*message["headers"], (b"x-vattn-replica", self._name)]
                elif message.get("body"):
                    yield message["body"]
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    break
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def metrics(self) -> tuple[str, bytes]:
        """This replica's name, and its metrics as Prometheus reads them."""
        return self._name.decode(), self._service.metrics.render()[0]

    async def check_health(self) -> None:
        """Raises where the engine cannot serve. Ray Serve then sends no more requests here, and starts another."""
        trouble = await self._service.health.trouble()
        if trouble is not None:
            raise RuntimeError(trouble)


def _loaded(path: Any, device: torch.device, dtype: torch.dtype, opened: ExitStack) -> Any:
    """vattn's own model where it computes this architecture, else transformers'."""
    from vattn.models.config_files import OtherArithmetic
    from vattn.models.loader import load_model

    try:
        return load_model(path, device, dtype)
    except OtherArithmetic as refused:
        if not path.is_dir():
            raise
        from ..hf.loader import load

        return opened.enter_context(load(path, device, dtype, refused))


def api_keys(options: Options) -> list[str]:
    """Those that clients must send one of.

    Raises:
        ConfigError: there is none, or no usable one, and nobody said that everybody may come in.
    """
    key = os.environ.get("VATTN_API_KEY")
    if options.no_api_key:
        if key:
            raise ConfigError("no_api_key is set and VATTN_API_KEY holds a key; give one of them")
        return []
    if key is None or not key.strip() or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "the environment variable VATTN_API_KEY of this Ray worker holds no key of printable ASCII without spaces: "
            "set it where Ray is started (ray start), or pass no_api_key=true to let everybody in"
        )
    return [key]


def _front(options: Options) -> ASGIApp:
    replicas = serve.get_deployment_handle("Replica", serve.get_replica_context().app_name)
    return Guard(
        _Front(replicas),
        keys=api_keys(options),
        max_body_bytes=options.max_body_size,
        body_timeout_s=Settings.body_timeout_s,
        is_local=False,
        observe=lambda route, status: None,  # Ray Serve counts requests
    )


class _Front:
    """Sends requests to replicas, and once more where a replica is lost before its client has seen anything."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._all, self._one = replicas, replicas.options(method_name="answer", stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return None
        body = (await receive())["body"]
        if (scope["method"], scope["path"]) == ("GET", "/metrics"):
            return await (await self._metrics())(scope, receive, send)
        asked = _Asked({key: scope[key] for key in _SCOPE if key in scope}, body)
        work = asyncio.ensure_future(self._answer(asked, prefix_of(body), send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        return None if work.cancelled() else work.result()

    async def _metrics(self) -> Response:
        """Of the replicas that answer."""
        try:
            told = self._all.broadcast("metrics")
            found = await told.results_async(timeout_s=_METRICS_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError) as error:
            _log.warning("no metrics: %s", error)
            found = []
        for lost in (each for each in found if isinstance(each, BaseException)):
            _log.warning("no metrics of a replica: %s", lost)
        texts = dict(each for each in found if not isinstance(each, BaseException))
        if not texts:
            return response_of(ApiError(503, f"no metrics from the replicas within {_METRICS_S:g} s"))
        return Response(merged(texts), media_type=CONTENT_TYPE_LATEST)

    async def _answer(self, asked: _Asked, prefix: bytes, send: Send) -> None:
        for attempt in range(_ATTEMPTS):
            start: Message | None = None  # kept back until there is something to follow it
            has_begun = False
            response: Any = self._one.remote(asked, prefix=prefix)
            try:
                async for part in response:
                    if isinstance(part, tuple):
                        start = {"type": "http.response.start", "status": part[0], "headers": part[1]}
                        continue
                    if not has_begun:
                        has_begun = True
                        await send(start or {})
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                if not has_begun:
                    await send(start or {})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            except BackPressureError:
                error = ApiError(429, "the queue is full; send it again later", code="queue_full")
                error.headers = {"retry-after": "1"}
                break
            except DeploymentUnavailableError as failed:
                _log.warning("no replica for a request, attempt %d of %d: %s", attempt + 1, _ATTEMPTS, failed)
                error = ApiError(503, "no replica takes requests; send it again later", code="no_replica")
                if attempt + 1 < _ATTEMPTS:
                    await asyncio.sleep(_PAUSE_S * 2**attempt)
            except RayActorError as lost:
                _log.warning("a replica was lost at a request, attempt %d of %d: %s", attempt + 1, _ATTEMPTS, lost)
                error = ApiError(503, "the replica that answered was lost", code="replica_lost")
                if has_begun:
                    await send({"type": "http.response.body", "body": broken_off(error), "more_body": False})
                    return
            finally:
                response.cancel()
        await response_of(error)(asked.scope, _nothing, send)  # type: ignore[arg-type]


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    raise AssertionError
