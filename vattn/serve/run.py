"""A server from its socket to its end: uvicorn, with a line when it is ready and two signals to stop it."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..engine import AsyncEngine
from ..errors import ConfigError, VattnError
from .app import create_app
from .limits import MAX_HEADER_BYTES, Connection
from .service import Service, Settings

if TYPE_CHECKING:
    from ..engine import Engine
    from ..models import Tokenizer

__all__ = ["is_loopback", "listening_socket", "serve"]

_LOOK_S = 5.0
_LAST_WORDS_S = 5.0  # for requests that were cut off to say so
Ready = Callable[[str, uvicorn.Server], None]


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket at that address, on which nobody listens yet, so that clients are refused until the server is ready.

    Raises:
        ConfigError: there is no such address on this machine, or another program has it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        opened = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is no address: {error}") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror}; choose another --port") from error
    return opened


def is_loopback(opened: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    address = opened.getsockname()[0]
    return address == "::1" or address.startswith("127.")


def serve(engine: Engine, tokenizer: Tokenizer, settings: Settings, opened: socket.socket, ready: Ready) -> None:
    """Answer requests until a signal asks to stop: then what is under way is finished, or cut off by a second one.

    Args:
        engine: nobody else steps it meanwhile.
        tokenizer: of its model.
        settings: see there.
        opened: where to listen; closed at the end.
        ready: is called once requests are taken, with the URL and the server: its ``should_exit`` acts as a signal.

    Raises:
        KeyboardInterrupt: it was SIGINT that asked.
        VattnError: a second signal cut requests off.
        ConfigError: another program listens there.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # idle connections must not use up the few that shells give
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)) if hard > 0 else soft, hard))
    asyncio.run(_serve(engine, tokenizer, settings, opened, ready))


async def _serve(engine: Engine, tokenizer: Tokenizer, settings: Settings, opened: socket.socket, ready: Ready) -> None:
    serving = AsyncEngine(engine)
    app = create_app(serving, tokenizer, settings)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(Connection.idle_s),
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    logging.getLogger("uvicorn.access").disabled = True  # its lines have the query; the guard writes others
    server = _Server(config, service, ready)
    looking = asyncio.ensure_future(_look(service))
    try:
        await server.serve(sockets=[opened])
    except OSError as error:
        raise ConfigError(f"cannot listen: {error.strerror}; choose another --port") from error
    finally:
        looking.cancel()
        num_cut = len(server.server_state.tasks)
        await serving.close(drain=not server.force_exit)
        if tasks := set(server.server_state.tasks):  # they tell their clients so; cancelled, each would log a traceback
            await asyncio.wait(tasks, timeout=_LAST_WORDS_S)
        service.close()
        opened.close()
    if server.force_exit and num_cut:
        raise VattnError(f"a second signal cut off {num_cut} request{'s' * (num_cut > 1)}")
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt


async def _look(service: Service) -> None:
    while True:
        service.health.look()
        await asyncio.sleep(_LOOK_S)


class _Server(uvicorn.Server):
    """uvicorn's, which says when it is ready, and takes SIGTERM as it takes SIGINT."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Ready) -> None:
        super().__init__(config)
        self.signal: int | None = None
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", self)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's, which raises the signals once more when the server has ended.
        self.force_exit, self.should_exit = self.should_exit, True
        self._service.health.is_closing = True
        self.signal = sig
