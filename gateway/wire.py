"""The socket under one response, for what is written thousands of times a second.

An ASGI message per chunk is a coroutine, a dict and a dozen checks: more than all else that a token costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

WIRE = "tidegate.wire"
"""Key of the ASGI scope under which a request finds its Wire."""


class Socket(NamedTuple):
    """Of a connection that has nothing to write: bytes may go to it directly."""

    descriptor: int
    queue: Callable[[bytes], None]
    """Takes what the socket does not. The connection is full then, unless it became free meanwhile."""


class Wire:
    """Writes to a response whose head has been sent with chunked encoding. Made by the connection."""

    __slots__ = ("_cycle", "on_full", "on_left")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self.on_full: Callable[[], None] = _nothing
        """Called within the write after which nothing should be written until `drained`."""
        self.on_left: Callable[[], None] = _nothing
        """Called when the client is gone: from here on nothing may be written."""

    @property
    def is_left(self) -> bool:
        """The client is gone."""
        return self._cycle.disconnected

    def take_body(self) -> bytes | None:
        """The request's body where all of it has come, which is the rule for small ones; else it must be waited for."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    @property
    def is_full(self) -> bool:
        return self._cycle.flow.write_paused and not self._cycle.disconnected

    async def drained(self) -> None:
        await self._cycle.flow.drain()

    def write(self, body: bytes) -> None:
        """One chunk, not empty. Nothing happens when the client has left."""
        if not self._cycle.disconnected:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    @property
    def socket(self) -> Socket | None:
        """For bytes that are chunks already, until `on_full` or `on_left`; None where it is too late.

        Until `on_left` the descriptor is this connection's: only then is it closed, and may become another's.
        """
        if self._cycle.disconnected:
            return None
        transport = self._cycle.transport
        return Socket(transport.get_extra_info("socket").fileno(), transport.write)


def _nothing() -> None:
    pass
