from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from replay.client import Client, Exchange
from replay.target import parse_target
from tests.replay import fake_server as fake
from tests.replay.fake_server import FakeServer


def client_for(url: str, timeout_s: float = 5.0) -> Client:
    return Client(parse_target(url), connect_timeout_s=2.0, timeout_s=timeout_s)


async def post(script: fake.Script, timeout_s: float = 5.0, cancel_after_s: float | None = None) -> Exchange:
    async with FakeServer(script) as server:
        client = client_for(server.url, timeout_s)
        exchange = await client.post("/v1/chat/completions", {"x-a": "b"}, b"{}", cancel_after_s=cancel_after_s)
        client.close()
        return exchange


async def test_stream_is_stamped_in_order() -> None:
    exchange = await post(fake.good_stream(3))
    assert exchange.error_kind is None
    assert exchange.status == 200
    assert exchange.content_events == 3
    assert len(exchange.gaps_ns) == 2
    assert (
        0
        < exchange.sent_ns
        <= exchange.first_byte_ns
        <= exchange.first_content_ns
        <= exchange.last_content_ns
        <= exchange.done_ns
    )
    assert exchange.last_content_ns - exchange.first_content_ns == sum(exchange.gaps_ns)
    assert exchange.usage is not None
    assert exchange.usage.completion_tokens == 3
    assert exchange.timing is not None
    assert exchange.timing.is_partition
    assert (exchange.request_id, exchange.worker) == ("req-1", "worker-1")


async def test_first_token_is_the_first_non_empty_content() -> None:
    pause = asyncio.Event()
    async with FakeServer(fake.stream(fake.ROLE, fake.delta("Paris") + fake.DONE, pause=pause)) as server:
        client = client_for(server.url)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(client.post("/v1/chat/completions", {}, b"{}"))
            await server.received.wait()
            await asyncio.sleep(0.05)
            pause.set()
        exchange = running.result()
        client.close()
    assert exchange.first_content_ns - exchange.first_byte_ns > 30_000_000


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
async def test_events_split_anywhere_are_read(size: int) -> None:
    data = b": ping\n\n" + fake.ROLE + fake.delta("a\u00e9") + fake.delta("b").replace(b"\n", b"\r\n") + fake.DONE
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    exchange = await post(fake.stream(*parts))
    assert exchange.error_kind is None
    assert exchange.content_events == 2


async def test_error_event_is_an_error_though_the_stream_ends_well() -> None:
    broken = fake.event({"error": {"message": "the worker died", "code": "service_unavailable"}})
    exchange = await post(fake.stream(fake.delta("a"), broken, fake.DONE))
    assert (exchange.error_kind, exchange.error, exchange.status) == ("error_event", "the worker died", 200)
    assert exchange.first_content_ns


async def test_stream_without_done_is_truncated() -> None:
    assert (await post(fake.stream(fake.delta("a")))).error_kind == "truncated"


async def test_connection_dropped_in_a_stream_is_disconnected() -> None:
    assert (await post(fake.stream(fake.delta("a"), ending="cut"))).error_kind == "disconnected"


async def test_connection_dropped_before_an_answer_is_disconnected() -> None:
    exchange = await post(fake.raw(b""))
    assert (exchange.error_kind, exchange.status) == ("disconnected", 0)


async def test_connection_dropped_before_the_request_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """On uvloop the loss of a new connection can come before the one who asked for it runs again."""

    class Transport(asyncio.Transport):
        def abort(self) -> None:
            pass

    async def connect_and_lose(factory: Callable[[], asyncio.Protocol], *_: object, **__: object) -> object:
        connection = factory()
        connection.connection_made(Transport())
        connection.connection_lost(None)
        return None, connection

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", connect_and_lose)
    exchange = await client_for("http://127.0.0.1:1").post("/v1/chat/completions", {}, b"{}")
    assert (exchange.error_kind, exchange.sent_ns) == ("disconnected", 0)
    assert exchange.done_ns > 0


async def test_refusal_keeps_status_reason_and_message() -> None:
    body = {"error": {"message": "the queue is full", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
    exchange = await post(fake.answer_json(body, 429, {"x-tidegate-reject-reason": "queue_full", "retry-after": "1"}))
    assert (exchange.error_kind, exchange.status) == ("http_429", 429)
    assert (exchange.reject_reason, exchange.error) == ("queue_full", "the queue is full")


async def test_error_body_that_is_no_json_keeps_the_status() -> None:
    exchange = await post(fake.answer_json(b"<html>bad gateway</html>", 502))
    assert (exchange.error_kind, exchange.error) == ("http_502", None)


@pytest.mark.parametrize("field", ["content", "reasoning", "reasoning_content"])
async def test_reasoning_is_content(field: str) -> None:
    """vLLM says `reasoning`; others, and vLLM before, `reasoning_content`."""
    thought = fake.event({"choices": [{"index": 0, "delta": {field: "Hm"}}]})
    assert (await post(fake.stream(fake.ROLE, thought, fake.delta("Paris"), fake.DONE))).content_events == 2


async def test_whole_answer_counts_as_one_content() -> None:
    answer = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris"}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
        "tidegate": fake.TIMING,
    }
    exchange = await post(fake.answer_json(answer))
    assert exchange.error_kind is None
    assert exchange.content_events == 1
    assert exchange.usage is not None
    assert exchange.usage.cached_tokens == 4
    assert exchange.timing is not None


async def test_generate_answer_is_read() -> None:
    exchange = await post(fake.answer_json({"text": "Paris", "usage": {"prompt_tokens": 5, "completion_tokens": 2}}))
    assert (exchange.error_kind, exchange.content_events) == (None, 1)


async def test_answer_without_a_length_ends_with_its_connection() -> None:
    exchange = await post(fake.raw(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{"text":"Paris"}'))
    assert (exchange.error_kind, exchange.content_events) == (None, 1)


@pytest.mark.parametrize(
    "data",
    [b"\x00\x01\x02\x03 nonsense\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"],
)
async def test_what_is_not_http_is_a_bad_response(data: bytes) -> None:
    assert (await post(fake.raw(data))).error_kind == "bad_response"


async def test_event_that_is_no_json_is_a_bad_response() -> None:
    assert (await post(fake.stream(fake.event(b"{oops"), fake.DONE))).error_kind == "bad_response"


async def test_silent_server_times_out_and_is_left() -> None:
    async with FakeServer(fake.silence) as server:
        client = client_for(server.url, timeout_s=0.05)
        exchange = await client.post("/v1/chat/completions", {}, b"{}")
        await asyncio.wait_for(server.lost.wait(), 2)
    assert exchange.error_kind == "timeout"


async def test_recorded_cancel_leaves_the_server() -> None:
    async with FakeServer(fake.silence) as server:
        client = client_for(server.url)
        exchange = await client.post("/v1/chat/completions", {}, b"{}", cancel_after_s=0.03)
        await asyncio.wait_for(server.lost.wait(), 2)
    assert exchange.error_kind == "cancelled"


async def test_nobody_listening_is_connect_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    exchange = await client_for(f"http://127.0.0.1:{port}").post("/v1/completions", {}, b"{}")
    assert (exchange.error_kind, exchange.status) == ("connect_refused", 0)
    assert exchange.done_ns


async def test_connection_is_kept_and_used_again() -> None:
    async with FakeServer(fake.good_stream()) as server:
        client = client_for(server.url)
        for _ in range(5):
            assert (await client.post("/v1/chat/completions", {}, b"{}")).error_kind is None
        client.close()
        assert server.connections == 1


async def test_connection_that_the_server_closes_is_not_used_again() -> None:
    async with FakeServer(fake.answer_json({"text": "a"}, headers={"connection": "close"})) as server:
        client = client_for(server.url)
        for _ in range(3):
            assert (await client.post("/generate", {}, b"{}")).error_kind is None
        client.close()
        assert server.connections == 3


async def test_connection_of_a_cancelled_exchange_is_not_used_again() -> None:
    async with FakeServer(fake.silence) as server:
        client = client_for(server.url)
        await client.post("/v1/chat/completions", {}, b"{}", cancel_after_s=0.01)
        server.script = fake.good_stream()
        assert (await client.post("/v1/chat/completions", {}, b"{}")).error_kind is None
        client.close()
        assert server.connections == 2


async def test_head_names_host_path_and_length() -> None:
    async with FakeServer(fake.good_stream()) as server:
        client = client_for(server.url + "/prefix/v1")
        await client.post("/v1/chat/completions", {"x-tidegate-timing": "1"}, b'{"a":1}')
        client.close()
        (seen,) = server.seen
    assert seen.path == "/prefix/v1/chat/completions"
    assert seen.headers["host"] == f"127.0.0.1:{server.port}"
    assert seen.headers["x-tidegate-timing"] == "1"
    assert seen.json == {"a": 1}


async def test_server_without_tls_is_a_connect_error_for_https() -> None:
    async def talk_plainly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(talk_plainly, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        exchange = await client_for(f"https://127.0.0.1:{port}").post("/v1/completions", {}, b"{}")
    assert exchange.error_kind == "connect"
