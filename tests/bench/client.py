"""Closed-loop load over raw sockets: cheap enough to share a core with the source and still keep the pace.

Each connection keeps one request in flight and sends the next when the answer is complete. An answer counts only when
it is whole: status 200, `[DONE]` seen where it streams, and as many completion tokens in `usage` as were asked for.
"""

from __future__ import annotations

import asyncio
import collections
import json
import re
import sys
import time
from collections.abc import Sequence

import msgspec

CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
LAST_CHUNK = b"0\r\n\r\n"
ERROR_TEXT_BYTES = 200


class Request(msgspec.Struct, frozen=True):
    """What every connection sends, again and again."""

    path: str
    body: bytes
    tokens: int
    is_stream: bool

    def encode(self, port: int) -> bytes:
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


class Answer(msgspec.Struct, frozen=True):
    """One finished request. `first_ns` is the first event with content; 0 where nothing came. Monotonic clock."""

    sent_ns: int
    first_ns: int
    last_ns: int
    events: int
    tokens: int
    error: str = ""


class Count(msgspec.Struct, frozen=True):
    """Totals since the start of a load; the difference of two is a window."""

    at_ns: int
    events: int
    reads: int
    bytes: int
    answers: int
    errors: int


def chat_request(*, model: str, prompt: str, tokens: int, is_stream: bool) -> Request:
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": is_stream,
    }
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    return Request("/v1/chat/completions", json.dumps(body).encode(), tokens, is_stream)


class Load:
    """`streams` connections to one port; `requests` are taken in turn by all of them, again and again or `is_once`."""

    def __init__(self, port: int, requests: Sequence[Request], streams: int, *, is_once: bool = False) -> None:
        self.answers: list[Answer] = []
        self.events = self.reads = self.bytes = self.errors = 0
        self.first_reads = 0
        self.gaps_ns: list[int] = []
        self.is_stopping = False
        self._port = port
        self._requests = requests
        self._encoded = [request.encode(port) for request in requests]
        self._next = 0
        self._limit = len(requests) if is_once else sys.maxsize
        self._connections = [_Connection(self, is_sampled=index % 32 == 0) for index in range(streams)]
        self._idle = asyncio.Event()
        self._busy = 0

    async def start(self, ramp_s: float) -> None:
        """Open all connections, their first requests spread evenly over `ramp_s`."""
        started_s = asyncio.get_running_loop().time()
        for index, connection in enumerate(self._connections):
            await asyncio.sleep(started_s + index * ramp_s / len(self._connections) - asyncio.get_running_loop().time())
            await self._connect(connection)
            connection.send()

    async def stop(self, timeout_s: float) -> None:
        """Let what is in flight finish, send nothing more, and close. What does not finish is an error."""
        self.is_stopping = True
        await self.wait(timeout_s)

    async def wait(self, timeout_s: float) -> None:
        """Until nothing is in flight, which without `stop` is when the requests of `is_once` are answered; close."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._busy:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            pass
        self.abort("did not finish")

    def abort(self, reason: str = "") -> None:
        """Close every connection now; a request still in flight becomes an error when there is a `reason`."""
        self.is_stopping = True
        for connection in self._connections:
            connection.close(reason)

    def count(self) -> Count:
        return Count(time.monotonic_ns(), self.events, self.reads, self.bytes, len(self.answers), self.errors)

    def take_request(self) -> tuple[Request, bytes]:
        index = self._next % len(self._requests)
        self._next += 1
        self._busy += 1
        return self._requests[index], self._encoded[index]

    def settle(self, connection: _Connection, answer: Answer) -> None:
        self._busy -= 1
        self.answers.append(answer)
        if answer.error:
            self.errors += 1
        if not (self.is_stopping or answer.error or self._next >= self._limit):
            connection.send()
        elif not self._busy:
            self._idle.set()

    async def _connect(self, connection: _Connection) -> None:
        await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", self._port)


class _Connection(asyncio.Protocol):
    """Counts events as they pass; looks at their content only when the answer ends."""

    def __init__(self, load: Load, *, is_sampled: bool) -> None:
        self._load = load
        self._is_sampled = is_sampled
        self._recent: collections.deque[bytes] = collections.deque(maxlen=6)
        self._transport: asyncio.Transport | None = None
        self._request: Request | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(f"connection lost: {exc}" if exc else "connection closed")

    def send(self) -> None:
        assert self._transport is not None
        self._request, encoded = self._load.take_request()
        self._recent.clear()
        self._sent_ns = time.monotonic_ns()
        self._first_ns = self._previous_ns = 0
        self._events = 0
        self._has_head = False
        self._left_bytes = 0
        self._transport.write(encoded)

    def close(self, reason: str) -> None:
        transport, self._transport = self._transport, None
        if reason:
            self._end(reason)
        self._request = None
        if transport is not None:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._request is None:
            return
        load = self._load
        load.reads += 1
        load.bytes += len(data)
        self._recent.append(data)
        events = data.count(b"data: ")
        load.events += events
        self._events += events
        if self._request.is_stream and events:
            self._note_time(data)
        if not self._has_head:
            data = self._read_head()
            if not self._has_head:
                return
        if self._left_bytes:
            self._left_bytes -= len(data)
            if self._left_bytes <= 0:
                self._finish()
        elif data.endswith(LAST_CHUNK) or b"".join(self._recent).endswith(LAST_CHUNK):
            self._finish()

    def _note_time(self, data: bytes) -> None:
        if not self._first_ns:
            if b'"content":""' in data and data.count(b'"content":') == 1:
                return
            self._first_ns = time.monotonic_ns()
            self._load.first_reads += 1
        elif self._is_sampled:
            now_ns = time.monotonic_ns()
            if self._previous_ns:
                self._load.gaps_ns.append(now_ns - self._previous_ns)
            self._previous_ns = now_ns

    def _read_head(self) -> bytes:
        """What follows the head in what has come so far. Sets `_left_bytes` where the answer says its length."""
        head, end, rest = b"".join(self._recent).partition(b"\r\n\r\n")
        if not end:
            return b""
        self._has_head = True
        length = CONTENT_LENGTH.search(head)
        if length:
            self._left_bytes = int(length[1])
        self._status = head[9:12]
        return rest

    def _finish(self) -> None:
        assert self._request is not None
        tail = b"".join(self._recent)
        if self._status != b"200":
            self._end(f"HTTP {self._status.decode()}: {tail[-ERROR_TEXT_BYTES:].decode(errors='replace')}")
            return
        tokens = COMPLETION_TOKENS.findall(tail)
        if self._request.is_stream and b"data: [DONE]" not in tail:
            self._end(f"no [DONE]: {tail[-ERROR_TEXT_BYTES:].decode(errors='replace')}")
        elif not tokens or int(tokens[-1]) != self._request.tokens:
            got = int(tokens[-1]) if tokens else None
            self._end(f"usage says {got} completion tokens, asked for {self._request.tokens}")
        else:
            self._end("", int(tokens[-1]))

    def _end(self, error: str, tokens: int = 0) -> None:
        if self._request is None:
            return
        self._request = None
        now_ns = time.monotonic_ns()
        answer = Answer(self._sent_ns, self._first_ns, now_ns, self._events, tokens, " ".join(error.split()))
        self._load.settle(self, answer)
