"""The HTTP server: uvicorn, with connections of our own and a short way to their sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from litestar.types import ASGIApp
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from gateway.connection import Connection
from gateway.wire import WIRE, Wire

BACKLOG = 4096
LAST_WORDS_SECONDS = 5
"""How long connections may take to close after the drain."""


class _Protocol(Connection):
    """One connection, whose requests find their Wire."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._wire: Wire | None = None
        super().connection_made(transport)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        scope: dict[str, Any] = cycle.scope  # type: ignore[assignment]
        self._wire = scope[WIRE] = Wire(cycle)
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._wire is not None:
            self._wire.on_full()

    def _leave(self, cycle: RequestResponseCycle) -> None:
        super()._leave(cycle)
        if self._wire is not None:
            self._wire.on_left()


class Server(uvicorn.Server):
    """Signals belong to the root, which drains first."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="on",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=LAST_WORDS_SECONDS,
                backlog=BACKLOG,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
