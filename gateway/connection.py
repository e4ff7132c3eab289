"""One client's connection: HTTP/1.1 within bounds of size and time, and what breaks them refused in OpenAI's words.

uvicorn bounds neither heads, trailers and pipelined requests, nor the time that a client takes for them, nor how long
an answer waits for a client that does not read. Bodies are the pipeline's: it knows their limit.
"""

from __future__ import annotations

import asyncio
import enum
import functools
from typing import Any

import httptools
from uvicorn._types import ASGI3Application, ASGISendCallable
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.answers import render_error
from gateway.wire import WIRE, Wire
from protos.core.errors import BodyTimeout, HeadersTooLarge, InvalidRequest, RequestError

HEAD_BYTES = 64 * 1024
HEAD_FIELDS = 128
PIPELINED_REQUESTS = 64
READ_SECONDS = 120.0
"""How long a full socket may take to be read down."""


@enum.unique
class Awaited(enum.Enum):
    """What the client has to do next; the value is how many seconds it has."""

    HEAD = 20.0
    NEXT_REQUEST = 75.0
    REST_OF_BODY = 10.0
    """Of a request that has been answered: a connection closed before would take the answer with it."""
    CLOSE = 15.0
    """After the last answer: read it, and close."""


class Connection(HttpToolsProtocol):
    """States are those of the parser and of `_running`; `_await` is called wherever they change."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Full is what the client's socket does not take, not what a buffer before it does not: tokens go to the socket
        # itself, and must not overtake what waits here.
        transport.set_write_buffer_limits(high=0)
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the one that was read last."""
        self._wire: Wire | None = None
        """Of `_running`."""
        self._is_in_head = True
        self._is_deaf = False
        """What the client sends is not listened to any more."""
        self._unframed_bytes = 0
        """Read since the last part of a body: heads, trailers, chunk extensions."""
        self._unoffered = b""
        """Head of a request that offered to change the protocol, as it is read once more."""
        self._awaited: Awaited | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._await(Awaited.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        self._note_read()
        self.pipeline.clear()
        if self._running is not None:
            self._leave(self._running)
        super().connection_lost(exc)

    # -- what the client sends

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unframed_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            raised = error.__context__  # by us, while it parsed
            is_ours = isinstance(raised, RequestError)
            self._refuse(raised if is_ours else InvalidRequest("not a valid HTTP/1.1 request", code="invalid_http"))
            return
        if self._unframed_bytes > HEAD_BYTES:
            self._refuse(_too_large())
        else:
            self._await(self._next())

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._unoffered + data[upgrade.args[0] :]
                self._unoffered = b""
                self.parser = _new_parser(self)  # the old one is through when the head says `connection: close`
            else:
                return

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # not a trailer: those are nobody's business
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._unoffered = self._without_offer()
            return
        self._is_in_head = False
        if len(self.headers) > HEAD_FIELDS or (self._unframed_bytes > HEAD_BYTES and self._head_bytes() > HEAD_BYTES):
            raise _too_large()
        if len(self.pipeline) >= PIPELINED_REQUESTS:
            raise InvalidRequest("too many requests sent ahead", code="invalid_http")
        self._unframed_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unframed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._unoffered:
            return
        self._unframed_bytes = 0
        self.cycle.more_body = False
        super().on_message_complete()

    def _without_offer(self) -> bytes:
        """The head again, less its offer of another protocol: the parser would skip the body, as if we had taken it."""
        if self.parser.get_method() == b"CONNECT":
            raise InvalidRequest("CONNECT is for proxies", code="invalid_http")
        head = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        head += [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*head, b"", b""])

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _should_upgrade(self) -> bool:
        return False

    # -- what it gets

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        scope: dict[str, Any] = cycle.scope  # type: ignore[assignment]
        if _knows_chunks(scope):
            self._wire = scope[WIRE] = Wire(cycle)
        else:
            self._wire = None
        super()._start_asgi_task(cycle, functools.partial(self._answer, cycle, app))

    async def _answer(
        self, cycle: RequestResponseCycle, app: ASGI3Application, scope: Any, receive: Any, send: Any
    ) -> None:
        try:
            await app(scope, receive, send if WIRE in scope else functools.partial(_send_unframed, cycle, send))
        finally:
            scope.pop(WIRE, None)  # which knows the cycle, which knows the scope: left so, it would be the collector's
        if not (cycle.response_complete or cycle.disconnected):  # given up: the client does not read
            cycle.disconnected = True
            self.transport.abort()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._await(Awaited.CLOSE)
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._await(self._next())

    def _refuse(self, error: RequestError) -> None:
        """From here on nothing that the client sends can be understood."""
        self._is_deaf = True
        self.pipeline.clear()
        running = self._running
        if running is not None and not running.response_complete and not running.more_body:
            running.keep_alive = False  # a whole request came before, its answer is the last one
            return
        is_answered = running is not None and running.more_body and running.response_started
        if not is_answered:
            self.transport.write(_render(error))
        if running is not None:
            self._leave(running)
        self._close()

    def _leave(self, cycle: RequestResponseCycle) -> None:
        """The application hears that the client left."""
        cycle.disconnected = True
        cycle.message_event.set()
        if self._wire is not None:
            self._wire.on_left()

    def _close(self) -> None:
        """Say that nothing more comes, and let the client close: what it still sends would reset the answer away."""
        self._is_deaf = True
        if not self.transport.is_closing():
            self.transport.write_eof()
            self._await(Awaited.CLOSE)

    # -- time

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)
        if self._wire is not None:
            self._wire.on_full()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._note_read()

    def _note_read(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    def _next(self) -> Awaited | None:
        """What the client has to do; None while the application is at work."""
        if self._is_in_head:
            return Awaited.HEAD
        if self._running is None or not self._running.response_complete:
            return None
        return Awaited.REST_OF_BODY if self.cycle.more_body else Awaited.NEXT_REQUEST

    def _await(self, awaited: Awaited | None) -> None:
        if awaited is self._awaited:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._awaited = awaited
        self._timer = None if awaited is None else self.loop.call_later(awaited.value, self._end_wait)

    def _end_wait(self) -> None:
        if self._awaited is Awaited.HEAD and self._unframed_bytes:
            self._refuse(BodyTimeout(f"the head did not arrive within {Awaited.HEAD.value:g} s"))
        elif self._awaited in (Awaited.HEAD, Awaited.NEXT_REQUEST) and not self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()


def _knows_chunks(scope: dict[str, Any]) -> bool:
    """Clients of HTTP/1.0 take the end of the connection for the end of a body, and the sizes of chunks for text."""
    return str(scope["http_version"]) >= "1.1"


async def _send_unframed(cycle: RequestResponseCycle, send: ASGISendCallable, message: Any) -> None:
    """uvicorn's `send`, which would write a body of no declared length in chunks."""
    if message["type"] == "http.response.start":
        cycle.chunked_encoding = False
    else:
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


def _new_parser(connection: Connection) -> httptools.HttpRequestParser:
    """As uvicorn makes it."""
    parser = httptools.HttpRequestParser(connection)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"the headers exceed {HEAD_FIELDS} fields or {HEAD_BYTES} bytes")


def _render(error: RequestError) -> bytes:
    body = render_error(error)
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[error.http_status] + head + body
