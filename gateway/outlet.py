"""The client's end of one response.

Everything is written without waiting and without a task. An ASGI server's `send` completes at once while the socket
takes data, so its coroutine is run by hand to its first suspension; parts of a body go to the server's Wire where there
is one. Only when the socket is full does a task take over, and what comes meanwhile is kept by the caller until
`is_blocked` is over.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

from gateway.wire import Socket, Wire

log = logging.getLogger("tidegate.gateway")

Send = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]
Headers = list[tuple[bytes, bytes]]


class Outlet:
    """Owned by one request."""

    __slots__ = (
        "_blocked_since_ns",
        "_clock_ns",
        "_drainer",
        "_send",
        "_tasks",
        "_wire",
        "blocked_ns",
        "is_blocked",
        "is_started",
        "on_closed",
        "on_drained",
        "on_left",
    )

    def __init__(
        self, send: Send, tasks: asyncio.TaskGroup, clock_ns: Callable[[], int], wire: Wire | None = None
    ) -> None:
        self._send = send
        self._wire = wire
        self._tasks = tasks
        self._clock_ns = clock_ns
        self._drainer: asyncio.Task[None] | None = None
        self._blocked_since_ns = 0
        self.is_started = False
        self.is_blocked = False
        self.blocked_ns = 0
        """Time in which the client's socket took nothing."""
        self.on_drained: Callable[[], None] = _nothing
        """Called when a full socket takes data again."""
        self.on_closed: Callable[[], None] = _nothing
        """Called when `socket` must not be used any more: the socket is full, or the client is gone."""
        self.on_left: Callable[[], None] = _nothing
        """Called when the client is gone, where `tells_of_leaving`."""
        if wire is not None:
            wire.on_left = self._leave

    @property
    def tells_of_leaving(self) -> bool:
        """Without a wire, only ASGI's `receive` knows."""
        return self._wire is not None

    @property
    def is_left(self) -> bool:
        """The client is known to be gone."""
        return self._wire is not None and self._wire.is_left

    def take_body(self) -> bytes | None:
        """The request's body, where all of it has come and nobody has to wait for it."""
        return None if self._wire is None else self._wire.take_body()

    def start(self, status: int, headers: Headers) -> None:
        assert not self.is_started, "a response starts once"
        self.is_started = True
        self._run(self._send, {"type": "http.response.start", "status": status, "headers": headers})
        if self._wire is not None:
            self._wire.on_full = self._block
            if self._wire.is_full and not self.is_blocked:
                self._block()

    def push(self, data: bytes) -> None:
        """Write a part of the body. Not while `is_blocked`."""
        if self._wire is None:
            self._run(self._send, {"type": "http.response.body", "body": data, "more_body": True})
            return
        assert not self.is_blocked, "the socket is full"
        self._wire.write(data)

    @property
    def socket(self) -> Socket | None:
        """A way around `push` for HTTP chunks, until `on_closed`; None where there is none now."""
        return None if self._wire is None or self.is_blocked else self._wire.socket

    async def unblocked(self) -> None:
        """Wait until the socket takes data again."""
        while self._drainer is not None and self.is_blocked:
            await asyncio.wait([self._drainer])

    def finish(self, data: bytes = b"") -> None:
        """Write the last part of the body. Not while `is_blocked`."""
        self._let_go()
        self._run(self._send, {"type": "http.response.body", "body": data, "more_body": False})

    def close(self) -> None:
        """The request has ended: what the socket has not taken by now is given up."""
        self._let_go()
        # Who is called knows this outlet: without these links, all that a request held is freed at once.
        self.on_drained = self.on_closed = self.on_left = _nothing
        if self._wire is not None:
            self._wire.on_left = _nothing
        if self._drainer is not None and self.is_blocked:
            self._drainer.cancel()
            self._note_unblocked()

    def _run(self, send: Send, message: dict[str, Any]) -> None:
        assert not self.is_blocked, "the socket is full"
        coroutine = send(message)
        try:
            suspension = coroutine.send(None)
        except StopIteration:
            return
        self._wait(_resume(coroutine, suspension))

    def _block(self) -> None:
        """The wire is full."""
        assert self._wire is not None
        self.on_closed()
        if not self.is_blocked:  # else the one who waits already waits on
            self._wait(self._wire.drained())

    def _let_go(self) -> None:
        """Nothing follows that a full socket would hold up."""
        self.on_closed()
        if self._wire is not None:
            self._wire.on_full = _nothing

    def _leave(self) -> None:
        self.on_closed()
        self.on_left()

    def _wait(self, writing: Awaitable[None]) -> None:
        self.is_blocked = True
        self._blocked_since_ns = self._clock_ns()
        self._drainer = self._tasks.create_task(self._drain(writing))

    async def _drain(self, writing: Awaitable[None]) -> None:
        try:
            await writing
            while self._wire is not None and self._wire.is_full:
                await self._wire.drained()
        except OSError as error:
            log.info("client left: %s", error)  # `receive` tells the pipeline
        self._note_unblocked()
        self.on_drained()

    def _note_unblocked(self) -> None:
        self.blocked_ns += self._clock_ns() - self._blocked_since_ns
        self.is_blocked = False


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, None], suspension: Any) -> Generator[Any, Any, None]:
    """Go on, in a task, with a coroutine that has already suspended once."""
    while True:
        try:
            value = yield suspension
        except BaseException as error:
            go_on = functools.partial(coroutine.throw, error)
        else:
            go_on = functools.partial(coroutine.send, value)
        try:
            suspension = go_on()
        except StopIteration:
            return


def _nothing() -> None:
    pass
