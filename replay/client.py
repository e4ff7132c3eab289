"""A lean HTTP/1.1 client that stamps what it sees: one Exchange per request, over kept-alive connections.

Own code because the generator shares the machine with what it measures: general clients cost several hundred
microseconds per streamed event, this one a few.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import cast

import httptools
import msgspec

from protos.core.telemetry import REJECT_REASON, REQUEST_ID, WORKER
from replay.answer import Answer, Timing, Usage, answer_decoder
from replay.sse import SseParser
from replay.target import Target

IDLE_SECONDS = 2.0
"""Younger than any server's keep-alive in use, so that a request never meets a connection that is being closed."""
BODY_LIMIT_BYTES = 64 * 1024 * 1024
MESSAGE_CHARS = 300


class Exchange(msgspec.Struct, kw_only=True):
    """What happened with one request on the wire. `*_ns` are of this process's monotonic clock, 0 for never.

    `error_kind` is None for a complete answer of status 200; else one of connect_refused, connect_timeout, connect,
    timeout, disconnected, truncated, bad_response, error_event, http_<status>, cancelled.
    """

    sent_ns: int = 0
    """The request was handed to the socket."""
    first_byte_ns: int = 0
    first_content_ns: int = 0
    last_content_ns: int = 0
    done_ns: int = 0
    status: int = 0
    content_events: int = 0
    gaps_ns: list[int] = []
    """Times between content events."""
    usage: Usage | None = None
    timing: Timing | None = None
    error_kind: str | None = None
    error: str | None = None
    reject_reason: str | None = None
    request_id: str = ""
    worker: str = ""
    body: bytes = b""
    """Of an answer that is no stream."""

    def fail(self, kind: str, message: str = "") -> None:
        """The first failure counts."""
        if self.error_kind is None:
            self.error_kind = kind
            self.error = message[:MESSAGE_CHARS] or None


class Client:
    """Connections to one target. Owns the idle ones; an Exchange owns its connection while it runs."""

    def __init__(self, target: Target, *, connect_timeout_s: float, timeout_s: float) -> None:
        self._target = target
        self._tls: ssl.SSLContext | None = target.tls()
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._idle: list[tuple[_Connection, float]] = []

    async def post(
        self, path: str, headers: Mapping[str, str], body: bytes, *, cancel_after_s: float | None = None
    ) -> Exchange:
        """Send and read to the end. What goes wrong on the wire is in the Exchange, not raised.

        `cancel_after_s` drops the connection then, as the recorded client did.
        """
        return await self._run(self._head("POST", path, headers, len(body)) + body, cancel_after_s)

    async def get(self, path: str, headers: Mapping[str, str]) -> Exchange:
        return await self._run(self._head("GET", path, headers, None), None)

    def close(self) -> None:
        for connection, _ in self._idle:
            connection.abort()
        self._idle.clear()

    def _head(self, method: str, path: str, headers: Mapping[str, str], length: int | None) -> bytes:
        lines = [f"{method} {self._target.path}{path} HTTP/1.1", f"host: {self._target.authority}"]
        if length is not None:
            lines += ["content-type: application/json", f"content-length: {length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")

    async def _run(self, data: bytes, cancel_after_s: float | None) -> Exchange:
        exchange = Exchange(gaps_ns=[])
        try:
            connection = await self._connection()
        except TimeoutError:
            exchange.fail("connect_timeout", f"no connection within {self._connect_timeout_s:g} s")
        except ConnectionRefusedError:
            exchange.fail("connect_refused", "connection refused")
        except OSError as error:
            exchange.fail("connect", error.strerror or str(error))
        else:
            await self._use(connection, exchange, data, cancel_after_s)
        exchange.done_ns = exchange.done_ns or time.monotonic_ns()
        return exchange

    async def _use(
        self, connection: _Connection, exchange: Exchange, data: bytes, cancel_after_s: float | None
    ) -> None:
        is_patient = cancel_after_s is None or cancel_after_s > self._timeout_s
        limit_s = self._timeout_s if cancel_after_s is None or is_patient else cancel_after_s
        try:
            async with asyncio.timeout(limit_s):
                await connection.run(exchange, data)
        except TimeoutError:
            if is_patient:
                exchange.fail("timeout", f"no complete answer within {limit_s:g} s")
            else:
                exchange.fail("cancelled")
        finally:
            if connection.is_reusable:
                self._idle.append((connection, time.monotonic()))
            else:
                connection.abort()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection, since = self._idle.pop()
            if connection.is_reusable and time.monotonic() - since < IDLE_SECONDS:
                return connection
            connection.abort()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await loop.create_connection(
                _Connection, self._target.host, self._target.port, ssl=self._tls
            )
        return connection


class _Connection(asyncio.Protocol):
    """One socket, one exchange at a time. The httptools parser calls the `on_*` methods from `data_received`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._sse: SseParser | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._is_until_close = True
        self._is_ended = False
        self._now_ns = 0
        self._is_alive = False

    @property
    def is_reusable(self) -> bool:
        return self._is_alive and self._exchange is None

    async def run(self, exchange: Exchange, data: bytes) -> None:
        """Returns when the answer is complete or the connection is gone."""
        assert self._transport is not None
        assert self._exchange is None
        if not self._is_alive:  # a server may close at once, or talk, before this task runs again
            exchange.fail("disconnected", "the server closed the connection before the request was sent")
            return
        self._exchange = exchange
        self._sse = None
        self._body, self._body_bytes = [], 0
        self._is_until_close, self._is_ended = True, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        exchange.sent_ns = time.monotonic_ns()
        await self._done

    def abort(self) -> None:
        self._is_alive = False
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting
        self._is_alive = True

    def data_received(self, data: bytes) -> None:
        self._now_ns = time.monotonic_ns()
        exchange = self._exchange
        if exchange is None:
            self.abort()  # a server that talks unasked
            return
        if not exchange.first_byte_ns:
            exchange.first_byte_ns = self._now_ns
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish("bad_response", f"not HTTP/1.1: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._is_alive = False
        exchange = self._exchange
        if exchange is None:
            return
        self._now_ns = time.monotonic_ns()
        if error is None and exchange.status and self._is_until_close:
            self.on_message_complete()  # an answer without a length ends with its connection
        else:
            self._finish("disconnected", str(error) if error else "the server closed the connection")

    # ---- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        match name.lower().decode("latin-1"):
            case "content-type" if value.lower().startswith(b"text/event-stream"):
                self._sse = SseParser()
            case "content-length" | "transfer-encoding":
                self._is_until_close = False
            case header if header == REJECT_REASON:
                exchange.reject_reason = value.decode("latin-1")
            case header if header == REQUEST_ID:
                exchange.request_id = value.decode("latin-1")
            case header if header == WORKER:
                exchange.worker = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if self._sse is None or exchange.status != 200:
            self._body_bytes += len(data)
            if self._body_bytes > BODY_LIMIT_BYTES:
                self._finish("bad_response", "the answer is too long")
            else:
                self._body.append(data)
            return
        for event in self._sse.feed(data):
            self._on_event(exchange, event)

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if exchange is None or (100 <= exchange.status < 200):
            return
        if self._sse is not None and exchange.status == 200:
            if not self._is_ended:
                exchange.fail("truncated", "the stream ended without [DONE]")
        else:
            self._on_whole(exchange, b"".join(self._body))
        self._is_alive = self._is_alive and self._parser.should_keep_alive()
        self._finish()

    # ---- the answer

    def _on_event(self, exchange: Exchange, event: bytes) -> None:
        if event == b"[DONE]":
            self._is_ended = True
            return
        try:
            answer = answer_decoder.decode(event)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            exchange.fail("bad_response", f"event: {error}")
            return
        if answer.error is not None:
            exchange.fail("error_event", answer.error_text or "")
        self._on_answer(exchange, answer)

    def _on_whole(self, exchange: Exchange, body: bytes) -> None:
        exchange.body = body
        try:
            answer = answer_decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            answer = Answer()
            if exchange.status == 200:
                exchange.fail("bad_response", f"body: {error}")
        if exchange.status != 200:
            exchange.fail(f"http_{exchange.status}", answer.error_text or "")
        self._on_answer(exchange, answer)

    def _on_answer(self, exchange: Exchange, answer: Answer) -> None:
        if answer.has_content:
            if exchange.first_content_ns:
                exchange.gaps_ns.append(self._now_ns - exchange.last_content_ns)
            else:
                exchange.first_content_ns = self._now_ns
            exchange.last_content_ns = self._now_ns
            exchange.content_events += 1
        if answer.usage is not None:
            exchange.usage = answer.usage
        if answer.tidegate is not None:
            exchange.timing = answer.tidegate

    def _finish(self, error_kind: str | None = None, message: str = "") -> None:
        exchange, done = self._exchange, self._done
        if exchange is None or done is None:
            return
        self._exchange = self._done = None
        exchange.done_ns = self._now_ns
        if error_kind is not None:
            self._is_alive = False
            exchange.fail(error_kind, message)
        if not done.done():
            done.set_result(None)
