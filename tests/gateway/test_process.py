"""The whole gateway as a process, in front of simulated engines, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.cli import main
from gateway import root
from gateway.tenants import new_key
from protos.core import journal
from protos.core.capture import CaptureEntry, FullContent, read_capture
from protos.core.contract import PROTOCOL
from protos.core.errors import ConfigError
from protos.core.record import Outcome, is_partition
from tests.engine.peer import connect, submit
from tests.gateway.fakes import scripted_worker
from tests.gateway.processes import (
    GatewayProcess,
    WorkerProcess,
    http_request,
    read_to_end,
    read_until,
    wait_for,
)

FAST, SLOW = "tide-fast", "tide-slow"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me a tale"}]


def chat(model: str = FAST, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES, "max_tokens": 4, "ignore_eos": True, **fields}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Addresses of an engine with steps of 5 ms and of one with steps of 100 ms."""
    folder = tmp_path_factory.mktemp("workers")
    both = WorkerProcess(folder / "fast", FAST, 5), WorkerProcess(folder / "slow", SLOW, 100)
    try:
        yield both[0].address, both[1].address
    finally:
        for worker in both:
            worker.kill()


@pytest.fixture(scope="module")
def g(workers: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("gateway")
    config = "[gateway.limits]\nbody_bytes = 100_000\n"
    gateway = GatewayProcess(folder, *workers, config=config, capture_level="full")
    try:
        yield gateway.start(2)
    finally:
        gateway.kill()


@pytest.fixture
def own(workers: tuple[str, str], tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway for one test, which may end it."""
    gateway = GatewayProcess(tmp_path, *workers, capture_level="full")
    try:
        yield gateway.start(2)
    finally:
        gateway.kill()


# ---------------------------------------------------------------- HTTP


def test_stream_is_server_sent_events_byte_for_byte(g: GatewayProcess) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    answer = read_to_end(g.raw(http_request(CHAT, body, "X-Request-Id: r1", "Connection: close")))
    head, _, chunks = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert b"content-type: text/event-stream; charset=utf-8" in lines
    assert b"transfer-encoding: chunked" in lines
    assert b"x-request-id: r1" in lines
    data = dechunk(chunks)
    *events, rest = data.split(b"\n\n")
    assert rest == b""
    assert events[-1] == b"data: [DONE]"
    role, *middle, usage = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert middle[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert {event["id"] for event in (role, *middle, usage)} == {"chatcmpl-r1"}


def dechunk(data: bytes) -> bytes:
    parts = []
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        parts.append(data[:length])
        assert data[length : length + 2] == b"\r\n"
        data = data[length + 2 :]
        if not length:
            assert data == b""
            return b"".join(parts)


def test_stream_to_http_1_0_has_no_chunks_and_ends_with_its_connection(g: GatewayProcess) -> None:
    request = http_request(CHAT, chat(stream=True), "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    head, _, body = read_to_end(g.raw(request)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head.split(b"\r\n")
    *events, rest = body.split(b"\n\n")
    assert rest == b""
    assert len(events) == 7  # role, four tokens, reason, end
    assert all(event.startswith(b"data: ") for event in events)


def test_client_of_http_1_0_that_leaves_is_cancelled(g: GatewayProcess) -> None:
    request = http_request(CHAT, chat(SLOW, stream=True, max_tokens=5_000)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    connection = g.raw(request)
    assert connection.recv(1) == b"H"
    connection.close()
    wait_for(lambda: g.state()["leases"] == 0, "the worker lets go")


def test_connection_is_used_again(g: GatewayProcess) -> None:
    connection = g.connect()
    for number in range(3):
        for body in (chat(), chat(stream=True), {"messages": []}):
            connection.request("POST", CHAT, json.dumps(body), {"x-request-id": f"keep-{number}"})
            answer = connection.getresponse()
            assert answer.status == (200 if "model" in body else 400)
            assert answer.read()
            if number == 0 and body.get("stream") is None and "model" in body:
                first = connection.sock
    assert connection.sock is first
    connection.close()


def test_unary_answer_has_its_phases_when_asked(g: GatewayProcess) -> None:
    status, headers, body = g.request("POST", CHAT, chat(), {"x-tidegate-timing": "1"})
    timing = json.loads(body)["tidegate"]
    assert status == 200
    assert sum(timing["phases_ns"].values()) + timing["unattributed_ns"] == timing["total_ns"]
    assert {"receive", "admit", "queue", "dispatch", "engine_input", "prefill", "decode"} <= timing["phases_ns"].keys()
    assert timing["is_simulated"] is True
    assert timing["worker"] == headers["x-tidegate-worker"]
    assert headers["traceparent"].split("-")[1] == timing["trace_id"]


def test_other_endpoints(g: GatewayProcess) -> None:
    status, _, body = g.request("POST", "/v1/completions", {"model": FAST, "prompt": [1, 2, 3], "max_tokens": 3})
    assert status == 200
    assert json.loads(body)["usage"]["prompt_tokens"] == 3
    status, _, body = g.request("POST", "/generate", {"model": FAST, "prompt": "Hi", "max_tokens": 3})
    assert status == 200
    assert json.loads(body).keys() == {"text", "usage"}
    models = json.loads(g.request("GET", "/v1/models")[2])
    entry = next(model for model in models["data"] if model["id"] == FAST)
    assert entry["object"] == "model"
    assert entry["tidegate"] == {"backend": "sim", "simulated": True, "context_tokens": 32768, "workers": 1}
    assert json.loads(g.request("GET", f"/v1/models/{FAST}")[2]) == entry
    assert [g.request("GET", path)[0] for path in ("/health", "/ready")] == [200, 200]


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/openapi.json"])
def test_head_is_get_without_the_body(g: GatewayProcess, path: str) -> None:
    status, headers, body = g.request("HEAD", path)
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) == len(g.request("GET", path)[2])


def test_models_are_told_to_who_may_use_them(workers: tuple[str, str], tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("all", "fast")}
    config = "".join(f'[gateway.tenants.{name}]\nkeys = ["{key_hash}"]\n' for name, (_, key_hash) in keys.items())
    keyed = GatewayProcess(tmp_path, *workers, config=f'{config}models = ["{FAST}"]\n')

    def ask(path: str, tenant: str | None = None, **headers: str) -> tuple[int, Any]:
        if tenant is not None:
            headers["authorization"] = f"Bearer {keys[tenant][0]}"
        status, _, body = keyed.request("GET", path, headers=headers)
        return status, json.loads(body)

    def names(tenant: str) -> set[str]:
        return {model["id"] for model in ask("/v1/models", tenant)[1]["data"]}

    try:
        keyed.start(2)
        assert ask("/v1/models")[0] == ask(f"/v1/models/{FAST}")[0] == 401
        assert ask("/v1/models", authorization="Bearer tg-wrong")[1]["error"]["code"] == "invalid_api_key"
        assert ask("/v1/models", "all", **{"x-tidegate-tenant": "fast"})[0] == 403
        assert names("all") == {FAST, SLOW}
        assert names("fast") == {FAST}
        assert ask(f"/v1/models/{SLOW}", "all")[0] == 200
        assert ask(f"/v1/models/{SLOW}", "fast")[0] == 403
        assert ask("/v1/models/gpt-9", "fast")[0] == 404
    finally:
        keyed.kill()


def test_operators_plane_is_not_on_the_public_listener(g: GatewayProcess) -> None:
    for path in ("/metrics", "/admin/state"):
        assert g.request("GET", path)[0] == 404
        assert g.request("GET", path, operator=True)[0] == 200
    assert g.request("POST", CHAT, chat(), operator=True)[0] == 404
    assert b"tidegate_requests_total" in g.request("GET", "/metrics", operator=True)[2]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", CHAT, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/generate", 405),
        ("GET", "/%ff%00", 404),
        ("GET", "/v1/models/gpt-9", 404),
        ("GET", "/v1/models/owner/gpt-9", 404),
        ("GET", "/v1/chat/completions/more", 404),
    ],
)
def test_unknown_route_or_method_is_openai_shaped(g: GatewayProcess, method: str, path: str, status: int) -> None:
    got, headers, body = g.request(method, path)
    assert got == status
    assert headers["content-type"].startswith("application/json")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"\xff", 400, None),
        (b"[" * 50_000, 400, None),
        (b"", 400, None),
        (chat(max_tokens=-1), 400, "max_tokens"),
        (chat(max_tokens=10**9), 400, "max_tokens"),
        (chat(max_tokens=40_000), 400, "max_tokens"),
        (chat(messages=[]), 400, "messages"),
        (chat(messages=[{"role": "user", "content": "word " * 15_000}], max_tokens=20_000), 400, "max_tokens"),
        (chat(temperature="hot"), 400, "temperature"),
        (chat(tools=[{"type": "function"}]), 400, "tools"),
        (chat(model="gpt-9"), 404, "model"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_body_is_a_4xx_that_names_the_field(g: GatewayProcess, body: Any, status: int, param: str | None) -> None:
    got, _, answer = g.request("POST", CHAT, body)
    error = json.loads(answer)["error"]
    assert (got, error["param"]) == (status, param), error
    assert error["message"]


def test_too_large_body_is_413_by_its_declared_length(g: GatewayProcess) -> None:
    connection = g.raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n")
    assert read_until(connection, b"}}").startswith(b"HTTP/1.1 413 ")
    connection.close()


@pytest.mark.parametrize("framing", ["Content-Length: 4000000", "Transfer-Encoding: chunked"])
def test_too_large_body_is_413_that_even_a_client_reads_that_sends_all_of_it_first(
    g: GatewayProcess, framing: str
) -> None:
    connection = g.raw(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
    is_chunked = "chunked" in framing
    for _ in range(100):
        connection.sendall(b"9c40\r\n" + b"x" * 40_000 + b"\r\n" if is_chunked else b"x" * 40_000)
    connection.sendall(b"0\r\n\r\n" if is_chunked else b"")
    assert read_until(connection, b"}}").startswith(b"HTTP/1.1 413 ")
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert read_until(connection, b"}").startswith(b"HTTP/1.1 200 ")
    connection.close()


def test_header_cannot_be_injected(g: GatewayProcess) -> None:
    _, headers, _ = g.request("POST", CHAT, chat(), {"x-request-id": "a b"})
    assert headers["x-request-id"] != "a b"


# ---------------------------------------------------------------- cancels


async def test_disconnected_client_is_aborted_within_two_steps(g: GatewayProcess, workers: tuple[str, str]) -> None:
    """A second gateway watches the engine's load, one frame per step of 100 ms."""
    async with connect(workers[1]) as peer:
        await peer.submit(submit(1, model=SLOW, max_tokens=200, ignore_eos=True))
        reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
        writer.write(http_request(CHAT, chat(SLOW, stream=True, max_tokens=200)))
        await reader.readuntil(b"content")
        await peer.until(lambda: peer.frames[-1].load is not None and peer.frames[-1].load.running == 2)
        at = len(peer.frames)
        writer.close()
        await asyncio.wait_for(peer.until(lambda: any(frame.load.running == 1 for frame in peer.frames[at:])), 10)
        steps = [frame for frame in peer.frames[at:] if frame.deltas is not None and frame.load.running == 2]
        assert len(steps) <= 2


async def _cancelled_client(port: int, number: int, chance: random.Random, limit: asyncio.Semaphore) -> None:
    async with limit:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        is_stream = chance.random() < 0.7
        body = chat(stream=is_stream, max_tokens=40, n=chance.choice([1, 1, 2]))
        writer.write(http_request(CHAT, body, f"X-Request-Id: cancel-{number}"))
        how = chance.random()
        if how < 0.2:
            await writer.drain()
        elif how < 0.6:
            await asyncio.sleep(chance.uniform(0, 0.1))
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.15):
                    await reader.read(1)
                    await asyncio.sleep(chance.uniform(0, 0.03))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_thousand_random_cancels_leave_nothing_behind(g: GatewayProcess) -> None:
    chance, limit = random.Random(7), asyncio.Semaphore(100)
    async with asyncio.TaskGroup() as clients:
        for number in range(1000):
            clients.create_task(_cancelled_client(g.port, number, chance, limit))

    def is_quiet() -> bool:
        state = g.state()
        loads = [worker["load"] for worker in state["workers"]]
        return (
            state["active"] == state["queued"] == state["leases"] == state["queued_bytes"] == 0
            and all(worker["leases"] == 0 for worker in state["workers"])
            and all(load["running"] == load["waiting"] == load["kv_blocks_used"] == 0 for load in loads)
        )

    await asyncio.to_thread(wait_for, is_quiet, "no lease and no running sequence is left", 30)
    assert g.request("POST", CHAT, chat())[0] == 200


def entries_of(g: GatewayProcess) -> list[CaptureEntry]:
    """All requests so far, once they are on disk."""
    arrived = metric_total(g, "tidegate_requests_total")
    wait_for(lambda: journal.verify(g.capture).entries >= arrived, "the capture holds them")
    return list(read_capture(g.capture))


def metric_total(g: GatewayProcess, name: str) -> int:
    lines = g.request("GET", "/metrics", operator=True)[2].decode().splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")))


def test_every_record_of_this_run_is_a_partition(g: GatewayProcess) -> None:
    """Run after the thousand cancels: finished, refused and cancelled requests, before and after their first token."""
    entries = entries_of(g)
    records = [entry.record for entry in entries]
    assert len(records) > 1000
    assert len({record.span_id for record in records}) == len(records), "each is settled once"
    assert all(is_partition(record) for record in records)
    finished = [record for record in records if record.outcome is Outcome.FINISHED]
    cancelled = [record for record in records if record.outcome is Outcome.CANCELLED]
    assert finished
    assert all(record.unattributed_ns < 0.01 * record.total_ns for record in finished)
    assert len(cancelled) > 500
    assert any(record.output_tokens for record in cancelled)
    assert any(not record.output_tokens for record in cancelled)
    assert not any(record.status == 500 for record in records)


def test_full_capture_holds_what_was_asked_and_answered(g: GatewayProcess) -> None:
    _, _, answer = g.request("POST", CHAT, chat(), {"x-request-id": "look-at-me"})
    entry = next(entry for entry in entries_of(g) if entry.record.request_id == "look-at-me")
    assert isinstance(entry.content, FullContent)
    assert json.loads(bytes(entry.content.body)) == chat()
    assert entry.content.output == (json.loads(answer)["choices"][0]["message"]["content"],)


# ---------------------------------------------------------------- the end


def test_sigterm_finishes_streams_and_refuses_new_requests(own: GatewayProcess) -> None:
    stream = own.raw(http_request(CHAT, chat(SLOW, stream=True, max_tokens=15), "Connection: close"))
    started = read_until(stream, b'"content":"')
    kept = own.connect()
    kept.request("GET", "/ready")
    assert kept.getresponse().read()
    own.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "draining" in own.output, "it drains")
    kept.request("POST", CHAT, json.dumps(chat()))
    refused = kept.getresponse()
    assert refused.status == 503
    assert refused.headers["x-tidegate-reject-reason"] == "draining"
    assert refused.headers["retry-after"]
    assert refused.headers["connection"] == "close"  # or a client with a pool would retry at this gateway
    assert json.loads(refused.read())["error"]["code"] == "service_unavailable"
    assert kept.sock is None
    assert own.request("GET", "/ready")[0] == 503
    kept.close()
    whole = started + read_to_end(stream)
    assert b"data: [DONE]\n\n" in whole
    assert b'"finish_reason":"length"' in whole
    assert own.process.wait(20) == 0
    assert "Traceback" not in own.output
    verdict = journal.verify(own.capture)
    assert (verdict.is_sound, verdict.cuts, verdict.manifest.is_closed) == (True, [], True)
    outcomes = [entry.record.outcome for entry in read_capture(own.capture)]
    assert sorted(outcomes) == [Outcome.FINISHED, Outcome.REJECTED]


def test_second_sigterm_ends_the_drain_and_tells_everybody(own: GatewayProcess) -> None:
    """A stream, an answer that is not one, and a request whose body has not come: each gets a whole HTTP answer."""
    stream = own.raw(http_request(CHAT, chat(SLOW, stream=True, max_tokens=500), "Connection: close"))
    started = read_until(stream, b'"content":"')
    unary = own.raw(http_request(CHAT, chat(SLOW, max_tokens=500), "Connection: close"))
    sending = own.raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    wait_for(lambda: own.state()["active"] == 3, "all are under way")
    own.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "draining" in own.output, "it drains")
    own.process.send_signal(signal.SIGTERM)
    *events, rest = dechunk((started + read_to_end(stream)).partition(b"\r\n\r\n")[2]).split(b"\n\n")
    assert rest == b""
    assert "shutting down" in json.loads(events[-1].removeprefix(b"data: "))["error"]["message"]
    for connection in (unary, sending):
        answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"x-tidegate-reject-reason: draining" in answer
    assert own.process.wait(20) == 0
    assert "Traceback" not in own.output
    assert "Cancelled" not in own.output


def test_full_disk_does_not_stop_traffic_and_drops_are_counted(own: GatewayProcess) -> None:
    for _ in range(5):
        assert own.request("POST", CHAT, chat())[0] == 200
    wait_for(lambda: own.state()["capture"]["written"] == 5, "they are written")
    _, hard = resource.prlimit(own.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(own.process.pid, resource.RLIMIT_FSIZE, (0, hard))
    for _ in range(5):
        assert own.request("POST", CHAT, chat())[0] == 200
    wait_for(lambda: own.state()["capture"]["dropped"], "drops are counted")
    state = own.state()["capture"]
    assert state["last_error"]
    assert metric_value(own, "tidegate_capture_dropped_total") > 0
    resource.prlimit(own.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    before = own.state()["capture"]["written"]

    def is_written_again() -> bool:
        assert own.request("POST", CHAT, chat())[0] == 200
        return bool(own.state()["capture"]["written"] > before)

    wait_for(is_written_again, "the capture goes on when there is room")
    assert own.terminate() == 0
    verdict = journal.verify(own.capture)
    assert verdict.problems == []
    assert verdict.dropped > 0


def metric_value(g: GatewayProcess, name: str) -> float:
    lines = g.request("GET", "/metrics", operator=True)[2].decode().splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " "))


def test_kill_9_leaves_a_capture_that_is_sound_up_to_the_last_second(own: GatewayProcess) -> None:
    for _ in range(20):
        assert own.request("POST", CHAT, chat())[0] == 200
    wait_for(lambda: journal.verify(own.capture).entries == 20, "a second has passed")
    stream = own.raw(http_request(CHAT, chat(SLOW, stream=True, max_tokens=50)))
    read_until(stream, b'"content":"')
    own.process.kill()
    own.process.wait()
    stream.close()
    verdict = journal.verify(own.capture)
    assert verdict.problems == []
    assert verdict.entries == 20
    assert len(verdict.cuts) == 1
    assert len(list(read_capture(own.capture))) == 20


# ---------------------------------------------------------------- starting


def fails_with(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a start that fails."""
    monkeypatch.setattr(sys, "argv", ["tidegate", "gateway", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tidegate: ")
    assert error.count("\n") == 1
    return error


def test_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = fails_with(["--port", str(port)], monkeypatch, capsys)
        assert f"127.0.0.1:{port}" in error
        assert "--port" in error
        error = fails_with(["--port", "0", "--operator-port", str(port)], monkeypatch, capsys)
        assert "--operator-port" in error


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "a.host"])
def test_without_keys_other_machines_are_not_listened_to(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails_with(["--host", host, "--port", "0"], monkeypatch, capsys)
    assert f"gateway.host: {host} is reachable from other machines" in error


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "::1"])
def test_all_of_loopback_is_this_machine(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(root, "_listen", _refuse_to_listen)
    assert "about to listen" in fails_with(["--host", host], monkeypatch, capsys)


def _refuse_to_listen(host: str, port: int, flag: str) -> socket.socket:
    raise ConfigError("about to listen")


def test_address_of_ipv6_is_a_url() -> None:
    listener = SimpleNamespace(getsockname=lambda: ("::1", 8000, 0, 0))  # not every machine has IPv6
    assert root._address(listener) == "http://[::1]:8000"  # type: ignore[arg-type]


def test_unknown_config_key_is_one_line_that_names_its_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tidegate.toml"
    file.write_text("[gateway.limits]\nfirst_tokn_s = 5\n")
    error = fails_with(["--config", str(file)], monkeypatch, capsys)
    assert str(file) in error
    assert "first_tokn_s" in error
    assert "did you mean 'first_token_s'" in error


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("port = 70000", "port"),
        ("port = 'x'", "port"),
        ("workers = 'one'", "workers"),
        ("[gateway.limits]\ntotal_s = -1", "total_s"),
        ("[gateway.limits]\nfirst_token_s = inf", "gateway.limits.first_token_s"),
        ("[gateway.tenants.acme]\nweight = inf", "gateway.tenants.acme.weight"),
        ("[gateway.tenants.acme]\nwieght = 2", "did you mean 'weight'"),
        ("[gateway.tenants.'not a name']\nweight = 2", "gateway.tenants: expected"),
        ("[gateway.capture]\nlevel = 'most'", "level"),
        ("[gateway.tracing]\nkeep_ratio = 2", "keep_ratio"),
        ("[gateway.tenants.acme]\nhedge_after_ms = 0", "hedge_after_ms"),
        ("[gateway.tenants.acme]\nhedge_after_ms = -1", "hedge_after_ms"),
        ("[gateway.tenants.acme]\nhedge_after_ms = 60_001", "hedge_after_ms"),
        ("[gateway.tenants.acme]\nhedge_after_ms = 0.5", "hedge_after_ms"),
    ],
)
def test_wrong_config_value_is_one_line_that_names_the_key(
    text: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tidegate.toml"
    file.write_text(f"[gateway]\n{text}\n")
    assert key in fails_with(["--config", str(file)], monkeypatch, capsys)


def test_capture_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    flags = ["--port", "0", "--operator-port", "0", "--capture-dir", str(tmp_path / "file")]
    assert "choose another" in fails_with(flags, monkeypatch, capsys)


async def test_worker_of_another_protocol_is_one_line(tmp_path: Path) -> None:
    """No worker that it could ever use: the gateway does not start."""
    async with scripted_worker(protocol=PROTOCOL + 1) as worker:
        gateway = GatewayProcess(tmp_path, worker.address)
        try:
            assert await asyncio.to_thread(gateway.process.wait, 30) == 2
        finally:
            gateway.kill()
    last = gateway.output.splitlines()[-1]
    assert last.startswith("tidegate: ")
    assert "upgrade the gateway" in last
    assert "Traceback" not in gateway.output
