"""One connection in virtual time: what a client may take its time for, and what breaks it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from gateway.connection import HEAD_BYTES, PIPELINED_REQUESTS, READ_SECONDS, Awaited, Connection
from tests.gateway.fakes import in_virtual_time, settle_down

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: x\r\n"
App = Callable[[Any, Any, Any], Awaitable[None]]


class FakeTransport(asyncio.Transport):
    """`unread_bytes` wait for a client that does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.unread_bytes = 0
        self.ended: str | None = None
        self.has_said_eof = False
        self.protocol: Connection

    def write(self, data: Any) -> None:
        assert self.ended is None, "written after the end"
        self.written += data

    @property
    def answers(self) -> int:
        return len(re.findall(rb"HTTP/1\.1 \d{3} ", self.written))

    def is_closing(self) -> bool:
        return self.ended is not None

    def close(self) -> None:
        if self.ended is None:
            self.ended = "closed"
            if not self.unread_bytes:
                self.protocol.connection_lost(None)

    def abort(self) -> None:
        was_closing, self.ended = self.is_closing(), "aborted"
        if not was_closing or self.unread_bytes:
            self.protocol.connection_lost(None)

    def write_eof(self) -> None:
        self.has_said_eof = True

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0, "tokens would overtake what waits in a buffer"

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def connect(app: App) -> tuple[Connection, FakeTransport]:
    config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    connection, transport = Connection(config, ServerState(), {}), FakeTransport()
    transport.protocol = connection
    connection.connection_made(transport)
    return connection, transport


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def answer_when_read(scope: Any, receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        if not message["more_body"]:
            return await answer(scope, receive, send)


class Stream:
    """An application that streams until it is told to end, or its client leaves."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.end = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers.append(scope["headers"])
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"tok", "more_body": True})
        waits = [asyncio.ensure_future(self._hear(receive)), asyncio.ensure_future(self.end.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.end.is_set():
            await send({"type": "http.response.body", "body": b"end"})

    async def _hear(self, receive: Any) -> None:
        self.heard.append((await receive())["type"])


async def ends_after(transport: FakeTransport, seconds: float, how: str) -> None:
    await asyncio.sleep(seconds - 0.1)
    assert transport.ended is None
    await asyncio.sleep(0.2)
    assert transport.ended == how


# ---------------------------------------------------------------- time


@in_virtual_time
async def test_a_client_that_says_nothing_is_closed() -> None:
    _, transport = connect(answer)
    await ends_after(transport, Awaited.HEAD.value, "closed")
    assert transport.written == b""


@in_virtual_time
async def test_a_head_that_trickles_is_408() -> None:
    connection, transport = connect(answer)
    for byte in GET[:19]:
        connection.data_received(bytes([byte]))
        await asyncio.sleep(1)
    assert transport.written == b""
    await asyncio.sleep(1.1)
    assert transport.written.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in transport.written
    assert transport.has_said_eof
    await ends_after(transport, Awaited.CLOSE.value - 0.1, "aborted")


@in_virtual_time
async def test_a_head_in_single_bytes_is_read() -> None:
    connection, transport = connect(answer)
    for byte in GET:
        connection.data_received(bytes([byte]))
    await settle_down()
    assert transport.written.endswith(b"\r\n\r\nok")


@in_virtual_time
async def test_an_idle_connection_is_closed_and_a_request_starts_its_time_anew() -> None:
    connection, transport = connect(answer)
    for _ in range(2):
        connection.data_received(GET)
        await asyncio.sleep(Awaited.NEXT_REQUEST.value - 1)
    assert transport.written.count(b"ok") == 2
    await ends_after(transport, 1, "closed")


@in_virtual_time
async def test_an_application_may_take_its_time() -> None:
    stream = Stream()
    connection, transport = connect(stream)
    connection.data_received(POST + b"Content-Length: 2\r\n\r\n{}")
    await asyncio.sleep(3600)
    assert transport.ended is None
    assert stream.heard == []
    connection.connection_lost(None)
    await settle_down()
    assert stream.heard == ["http.disconnect"]


@in_virtual_time
async def test_the_rest_of_an_answered_body_is_not_waited_for_forever() -> None:
    connection, transport = connect(answer)
    connection.data_received(POST + b"Content-Length: 100\r\n\r\n")
    await settle_down()
    for _ in range(9):
        connection.data_received(b"x")
        await asyncio.sleep(1)
    await ends_after(transport, Awaited.REST_OF_BODY.value - 9, "aborted")


@in_virtual_time
async def test_the_rest_of_an_answered_body_leaves_the_connection_usable() -> None:
    connection, transport = connect(answer)
    connection.data_received(POST + b"Content-Length: 100\r\n\r\n")
    await settle_down()
    connection.data_received(b"x" * 100)
    await asyncio.sleep(Awaited.REST_OF_BODY.value + 1)
    connection.data_received(GET)
    await settle_down()
    assert transport.written.count(b"ok") == 2


@in_virtual_time
async def test_a_client_that_does_not_read_its_last_bytes_is_aborted() -> None:
    connection, transport = connect(answer)
    transport.unread_bytes = 1
    connection.data_received(GET)
    await ends_after(transport, Awaited.NEXT_REQUEST.value, "aborted")
    connection, transport = connect(answer)
    transport.unread_bytes = 1
    connection.data_received(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    await asyncio.sleep(Awaited.CLOSE.value - 0.1)
    assert transport.ended == "closed"
    await asyncio.sleep(0.2)
    assert transport.ended == "aborted"


@in_virtual_time
async def test_a_full_socket_that_is_not_read_is_aborted() -> None:
    stream = Stream()
    connection, transport = connect(stream)
    connection.data_received(GET)
    await settle_down()
    connection.pause_writing()
    await asyncio.sleep(READ_SECONDS - 1)
    connection.resume_writing()
    await asyncio.sleep(READ_SECONDS)
    connection.pause_writing()
    await ends_after(transport, READ_SECONDS, "aborted")
    await settle_down()
    assert stream.heard == ["http.disconnect"]


@in_virtual_time
async def test_an_application_that_gives_its_client_up_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def give_up(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    with caplog.at_level(logging.INFO):
        connection, transport = connect(give_up)
        connection.data_received(GET)
        await settle_down()
    assert transport.ended == "aborted"
    assert caplog.records == []


# ---------------------------------------------------------------- what cannot be understood


@in_virtual_time
async def test_garbage_behind_a_request_does_not_get_into_its_answer() -> None:
    stream = Stream()
    connection, transport = connect(stream)
    connection.data_received(GET + b"garbage\r\n\r\n")
    await settle_down()
    connection.data_received(b"more of it")
    assert b" 400 " not in transport.written
    stream.end.set()
    await settle_down()
    assert transport.written.endswith(b"3\r\nend\r\n0\r\n\r\n")
    assert transport.ended == "closed"


@in_virtual_time
async def test_garbage_in_a_body_is_400_and_the_application_hears_that_its_client_left() -> None:
    connection, transport = connect(answer_when_read)
    connection.data_received(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    await settle_down()
    assert transport.written.startswith(b"HTTP/1.1 400 ")
    assert transport.answers == 1
    assert transport.has_said_eof
    await ends_after(transport, Awaited.CLOSE.value, "aborted")


@in_virtual_time
async def test_garbage_in_a_body_that_has_been_answered_is_no_second_answer() -> None:
    connection, transport = connect(answer)
    connection.data_received(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    await settle_down()
    connection.data_received(b"zz\r\n")
    await settle_down()
    assert transport.answers == 1
    assert transport.has_said_eof


@in_virtual_time
async def test_a_head_without_end_is_431_before_it_is_large() -> None:
    connection, transport = connect(answer)
    connection.data_received(b"GET / HTTP/1.1\r\nx-a: ")
    sent = 0
    while not transport.written:
        connection.data_received(b"a" * 1000)
        sent += 1000
    assert sent <= HEAD_BYTES + 1000
    assert transport.written.startswith(b"HTTP/1.1 431 ")
    connection.data_received(b"a" * 1000)  # is not listened to
    assert transport.answers == 1


@in_virtual_time
async def test_many_requests_on_one_connection_are_not_one_large_head() -> None:
    connection, transport = connect(answer)
    for _ in range(3 * HEAD_BYTES // len(GET)):
        connection.data_received(GET)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert transport.ended is None
    assert b" 431 " not in transport.written


@in_virtual_time
async def test_trailers_are_no_headers() -> None:
    stream = Stream()
    connection, _ = connect(stream)
    connection.data_received(POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
    await settle_down()
    assert [name for name, _ in stream.headers[0]] == [b"host", b"transfer-encoding"]
    connection.connection_lost(None)


# ---------------------------------------------------------------- pipelined


@in_virtual_time
async def test_pipelined_requests_are_answered_in_order_and_only_so_many_wait() -> None:
    stream = Stream()
    connection, transport = connect(stream)
    connection.data_received(GET * 3)
    await settle_down()
    stream.end.set()
    await settle_down()
    assert transport.answers == 3
    assert transport.ended is None
    stream.end.clear()
    connection.data_received(GET * (PIPELINED_REQUESTS + 2))
    await settle_down()
    assert not connection.pipeline
    stream.end.set()
    await settle_down()
    assert transport.answers == 4
    assert transport.ended == "closed"


@in_virtual_time
async def test_the_running_request_hears_that_its_client_left_although_others_wait_behind_it() -> None:
    stream = Stream()
    connection, _ = connect(stream)
    connection.data_received(GET * 3)
    await settle_down()
    connection.connection_lost(None)
    await settle_down()
    assert stream.heard == ["http.disconnect"]
    assert len(stream.headers) == 1


# ---------------------------------------------------------------- offers of another protocol


@pytest.mark.parametrize("connection_header", [b"Upgrade, HTTP2-Settings", b"upgrade, close"])
def test_an_offer_to_upgrade_is_not_taken_and_its_body_is_read(connection_header: bytes) -> None:
    @in_virtual_time
    async def test() -> None:
        stream = Stream()
        stream.end.set()
        connection, transport = connect(stream)
        head = POST + b"Connection: %b\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n" % connection_header
        for byte in head:
            connection.data_received(bytes([byte]))
        connection.data_received(b"{}")
        await settle_down()
        assert transport.written.startswith(b"HTTP/1.1 200 ")
        assert [name for name, _ in stream.headers[0]] == [b"host", b"connection", b"content-length"]

    test()
