"""The HTTP server: uvicorn, with a short way to the socket for what a stream repeats ten thousand times a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import uvicorn
from litestar.types import ASGIApp
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from gateway.connection import Connection

WIRE = "tidegate.wire"
"""Key of the ASGI scope under which a request finds its Wire."""
BACKLOG = 4096
LAST_WORDS_SECONDS = 5
"""How long connections may take to close after the drain."""
SIZES = tuple(b"%x\r\n" % size for size in range(2048))
_encode = msgspec.json.Encoder().encode


class Wire:
    """The socket under a response whose head has been sent with chunked encoding.

    An ASGI message per chunk is a coroutine, a dict and a dozen checks: more than all else that a token costs.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_full(self) -> bool:
        """Too much is waiting for the client's socket: nothing should be written until `drained`."""
        return self._cycle.flow.write_paused and not self._cycle.disconnected

    async def drained(self) -> None:
        await self._cycle.flow.drain()

    def write(self, body: bytes) -> None:
        """One chunk, not empty. Nothing happens when the client has left."""
        if not self._cycle.disconnected:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def text_writer(self, opening: bytes, closing: bytes, on_full: Callable[[], None]) -> Callable[[str], None]:
        """`write(opening + JSON of the text + closing)` with everything that can be looked up looked up before."""
        cycle, flow, write = self._cycle, self._cycle.flow, self._cycle.transport.write
        fixed = len(opening) + len(closing)
        closing += b"\r\n"

        def write_text(text: str) -> None:
            if cycle.disconnected:
                return
            encoded = _encode(text)
            size = fixed + len(encoded)
            write((SIZES[size] if size < 2048 else b"%x\r\n" % size) + opening + encoded + closing)
            if flow.write_paused:
                on_full()

        return write_text


class _Protocol(Connection):
    """One connection."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        scope: dict[str, Any] = cycle.scope  # type: ignore[assignment]
        scope[WIRE] = Wire(cycle)
        super()._start_asgi_task(cycle, app)


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
