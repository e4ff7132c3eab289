"""The HTTP server: uvicorn, with connections of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn
from litestar.types import ASGIApp

from gateway.connection import Connection

BACKLOG = 4096
LAST_WORDS_SECONDS = 5
"""How long connections may take to close after the drain."""


class Server(uvicorn.Server):
    """Signals belong to the root, which drains first."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
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

    def part(self) -> None:
        """From here on an answer is the last one of its connection: who is refused must not come back by the same."""
        self.config.encoded_headers = [(b"connection", b"close")]
        self.server_state.default_headers = self.config.encoded_headers  # uvicorn itself does so once a second
