"""An OpenAI-compatible server on a real socket, whose every answer is a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

MODELS = {"object": "list", "data": [{"id": "fake", "object": "model"}]}


class Seen:
    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Script = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


class FakeServer:
    """`script` answers the POSTs; a script that closes the writer ends the connection."""

    def __init__(self, script: Script, models: Any = MODELS) -> None:
        self.script = script
        self.models = models
        self.seen: list[Seen] = []
        self.received = asyncio.Event()
        self.connections = 0
        self.lost = asyncio.Event()
        """A client left in the middle of an answer."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FakeServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while not writer.is_closing() and (seen := await _read(reader)):
                if seen.method == "GET":
                    await answer_json(self.models)(seen, writer)
                else:
                    self.seen.append(seen)
                    self.received.set()
                    await self._answer(seen, reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering = asyncio.ensure_future(self.script(seen, writer))
        leaving = asyncio.ensure_future(_until_gone(reader))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.lost.set()
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _until_gone(reader: asyncio.StreamReader) -> None:
    """The replay client never pipelines, so nothing but the end may come while an answer is under way."""
    while not reader.at_eof():
        await asyncio.sleep(0.002)
        if reader._buffer:  # type: ignore[attr-defined]
            await asyncio.Event().wait()


async def _read(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Seen(method, path, headers, body)


# ---------------------------------------------------------------- scripts

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def delta(text: str) -> bytes:
    return event({"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]})


def usage(tokens: int, timing: dict[str, Any] | None = None) -> bytes:
    value: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
    return event(value | ({"tidegate": timing} if timing else {}))


def timing(**phases_ns: int) -> dict[str, Any]:
    total = sum(phases_ns.values())
    return {
        "request_id": "req-1",
        "trace_id": "ab" * 16,
        "worker": "worker-1",
        "is_simulated": False,
        "phases_ns": phases_ns,
        "total_ns": total,
        "unattributed_ns": 0,
        "preemptions": 0,
        "cached_tokens": 3,
    }


TIMING = timing(receive=100_000, queue=200_000, prefill=700_000, decode=900_000)
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
DONE = event(b"[DONE]")


def stream(*parts: bytes, pause: asyncio.Event | None = None, ending: str = "whole") -> Script:
    """Each part is one chunk. `pause` is waited for before the last part. `ending`: whole, cut (no last chunk)."""

    async def script(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"x-request-id: req-1\r\nx-tidegate-worker: worker-1\r\n\r\n")
        for index, part in enumerate(parts):
            if pause is not None and index == len(parts) - 1:
                await pause.wait()
            writer.write(chunk(part))
            await writer.drain()
        if ending == "cut":
            writer.close()
        else:
            writer.write(chunk(b""))
            await writer.drain()

    return script


def good_stream(tokens: int = 3) -> Script:
    return stream(ROLE, *(delta(f"w{n} ") for n in range(tokens)), usage(tokens, TIMING), DONE)


def answer_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Script:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    lines = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})

    async def script(_: Seen, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status} Whatever\r\n" + "".join(f"{name}: {text}\r\n" for name, text in lines.items())
        writer.write(head.encode() + b"\r\n" + body)
        await writer.drain()

    return script


def raw(data: bytes) -> Script:
    async def script(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    return script


async def silence(_: Seen, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()
