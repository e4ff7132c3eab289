"""What Envoy and vllm-router relay from: an OpenAI-shaped server that writes one SSE event per token per stream.

All open streams step together on one absolute timer, as the sequences of a continuous batch do. Events are rendered
once, in the shape vLLM's own server writes them. `--step-ms 0` answers at once, for unary requests.

    python -m tests.bench.sse_source --port 9200 --step-ms 12
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
from typing import Any

import uvloop

MODEL = "bench"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
WORDS = ("the", "of", "tide", "gate", "water", "and", "a", "river", "turns", "under", "moon", "slow", "in", "harbour")
CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(**fields: Any) -> bytes:
    head = {"id": "chatcmpl-" + "0" * 32, "object": "chat.completion.chunk", "created": 1_700_000_000, "model": MODEL}
    return b"data: " + json.dumps({**head, **fields}, separators=(",", ":")).encode() + b"\n\n"


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason, "token_ids": None}


ROLE = _http_chunk(_event(choices=[_choice({"role": "assistant", "content": ""})]))
TOKENS = tuple(_http_chunk(_event(choices=[_choice({"content": " " + word})])) for word in WORDS)
FINISH = _http_chunk(_event(choices=[_choice({"content": ""}, "length")]))
DONE = _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 64, "completion_tokens": tokens, "total_tokens": 64 + tokens}


def _json_response(value: Any) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


MODELS = _json_response(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "bench", "root": MODEL}]}
)
EMPTY = _json_response({})


def _completion(tokens: int) -> bytes:
    content = " ".join(WORDS[index % len(WORDS)] for index in range(tokens))
    message = {"role": "assistant", "content": content}
    return _json_response(
        {
            "id": "chatcmpl-" + "0" * 32,
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
            "usage": _usage(tokens),
        }
    )


class Connection(asyncio.Protocol):
    """One keep-alive connection. Reads a request at a time; streams while it is among `active`."""

    def __init__(self, active: set[Connection]) -> None:
        self._active = active
        self._received = b""
        self._tokens = 0
        self._sent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._active.discard(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = CONTENT_LENGTH.search(head)
        body_bytes = int(length[1]) if length else 0
        if len(rest) < body_bytes:
            return
        self._received = rest[body_bytes:]
        self._answer(head.split(b" ", 2)[1], rest[:body_bytes])

    def _answer(self, path: bytes, body: bytes) -> None:
        if path == b"/v1/models":
            self._transport.write(MODELS)
        elif path != b"/v1/chat/completions":
            self._transport.write(EMPTY)
        else:
            request = json.loads(body)
            self._tokens = request["max_tokens"]
            if request.get("stream"):
                self._sent = 0
                self._active.add(self)
            else:
                self._transport.write(_completion(self._tokens))

    def step(self) -> None:
        """One token, in one write."""
        event = TOKENS[self._sent % len(TOKENS)]
        if not self._sent:
            event = HEAD + ROLE + event
        self._sent += 1
        if self._sent >= self._tokens:
            self._active.discard(self)
            usage = _http_chunk(_event(choices=[], usage=_usage(self._sent)))
            event += FINISH + usage + DONE
        self._transport.write(event)


async def serve(port: int, step_s: float) -> None:
    active: set[Connection] = set()
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)

    def tick(due_s: float) -> None:
        for connection in tuple(active):
            connection.step()
        # An absolute schedule: a late step is followed by an early one, so the rate is right if the core keeps up.
        loop.call_at(due_s + step_s, tick, due_s + step_s)

    server = await loop.create_server(lambda: Connection(active), "127.0.0.1", port, backlog=4096)
    if step_s:
        loop.call_soon(tick, loop.time())
    await stopped.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=12.0)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.port, arguments.step_ms / 1e3))


if __name__ == "__main__":
    main()
