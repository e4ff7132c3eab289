"""Tokens over a real socket of the real event loop, to a client that is slower than they come."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState

from gateway.connection import Connection
from gateway.outlet import Outlet
from gateway.stream import TokenStream, write
from gateway.wire import WIRE
from protos.core.contract import TokenLogprob

TOKENS = 10_000
SMALL_BUFFER = 16_384


class Client:
    """It may read between any two tokens, before the loop knows that there is room again."""

    def __init__(self, address: Any) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        self.socket.connect(address)
        self.socket.setblocking(False)
        self.socket.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        self.received = b""

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.received += self.socket.recv(SMALL_BUFFER)

    async def read_to_end(self) -> None:
        while part := await asyncio.get_running_loop().sock_recv(self.socket, SMALL_BUFFER):
            self.received += part


class Teller:
    """An application that counts to TOKENS, one per token. What comes while the socket is full, it keeps."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.withheld: list[str] = []
        self.kept = 0
        self.has_told = asyncio.Event()

    def on_overrun(self) -> None:
        raise AssertionError("nothing is charged here")

    def delta(
        self, text: str, token_count: int, choice: int, logprobs: Sequence[TokenLogprob] | None, now_ns: int
    ) -> None:
        self.withheld.append(text)
        self.kept += 1

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with asyncio.TaskGroup() as tasks:
            self.outlet = outlet = Outlet(send, tasks, time.monotonic_ns, scope[WIRE])
            self.stream = stream = TokenStream(self)
            stream.charged_tokens = TOKENS
            outlet.on_drained, outlet.on_closed = self.open, stream.close
            outlet.start(200, [])
            self.open()
            chunks: list[bytes] = []
            for number in range(TOKENS):
                if chunk := stream.token(f"{number:100} ", 1, number):
                    chunks.append(chunk)
                if number % 3 == 0 or not chunk:  # steps of up to three rows
                    write([stream] * len(chunks), chunks)
                    chunks.clear()
                if number % 50 == 0:
                    self.client.read()
                if number % 500 == 0:
                    await asyncio.sleep(0)
            write([stream] * len(chunks), chunks)
            self.has_told.set()
            await outlet.unblocked()
            outlet.finish()

    def open(self) -> None:
        text, self.withheld = "".join(self.withheld), []
        if text:
            self.outlet.push(text.encode())
        connection = self.outlet.socket
        if connection is not None:
            self.stream.open(connection, b"", b"")


async def tell() -> tuple[Teller, bytes]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    client = Client(listener.getsockname())
    teller = Teller(client)
    config = uvicorn.Config(teller, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    connect = functools.partial(Connection, config, ServerState(), {})
    server = await asyncio.get_running_loop().create_server(connect, sock=listener)
    with client.socket:
        await teller.has_told.wait()
        await client.read_to_end()
    server.close()
    return teller, client.received


def test_tokens_that_the_socket_takes_and_those_that_it_does_not_arrive_once_and_in_order() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        teller, answer = runner.run(asyncio.wait_for(tell(), 20))
    body = re.sub(rb"[0-9a-f]+\r\n(.*?)\r\n", rb"\1", answer.partition(b"\r\n\r\n")[2], flags=re.DOTALL)
    assert [int(number) for number in body.replace(b'"', b"").split()] == list(range(TOKENS))
    assert 0 < teller.kept < TOKENS, "both ways were not used"
