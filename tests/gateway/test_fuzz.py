"""Whatever a client sends, the gateway answers as its OpenAPI document says, or closes; its log has nothing to say.

More of it:  pytest tests/gateway/test_fuzz.py --hypothesis-profile=long --timeout=3600
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.gateway.processes import GatewayProcess, WorkerProcess, read_to_end, wait_for

CONFIG = """
[gateway.limits]
body_bytes = 100_000
max_tokens = 2_000
"""
SCHEMATHESIS = Path(__file__).with_name("schemathesis.toml")
PATHS = ("/v1/chat/completions", "/v1/completions", "/generate")
FIELDS = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "max_tokens": 2}
BODY = json.dumps(FIELDS).encode()
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("fuzz")
    worker = WorkerProcess(folder / "worker", "tide-fuzz", 0)
    gateway = GatewayProcess(folder / "gateway", worker.address, config=CONFIG, capture_level="full")
    try:
        yield gateway.start(1)
    finally:
        gateway.kill()
        worker.kill()


@pytest.fixture
def g(process: GatewayProcess) -> Iterator[GatewayProcess]:
    """Afterwards it serves, nothing is left over, and its log has nothing to say."""
    yield process
    counts = ("active", "queued", "queued_bytes", "leases")
    wait_for(lambda: not any(map(process.state().get, counts)), "nothing is left over")
    assert process.request("POST", "/generate", FIELDS)[0] == 200
    assert not re.search("Traceback| ERROR | WARNING ", process.output), process.output


def post(*headers: bytes, body: bytes = BODY, path: str = "/generate", is_sized: bool = True) -> bytes:
    """The bytes of a request after which the connection closes."""
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close", *headers]
    if is_sized:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", b""]) + body


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def error_of(answer: bytes) -> dict[str, Any]:
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


# ---------------------------------------------------------------- by the document


@pytest.mark.parametrize("listener", ["public", "operator"])
def test_every_endpoint_is_as_its_document_says(g: GatewayProcess, listener: str, tmp_path: Path) -> None:
    examples = hypothesis.settings().max_examples // 3
    is_long = examples > 100
    port = g.port if listener == "public" else g.operator_port
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(SCHEMATHESIS), "run", "--no-color"]
    command += ["--max-examples", str(examples), *([] if is_long else ["--seed", "1"])]
    command.append(f"http://127.0.0.1:{port}/openapi.json")
    environ = {**os.environ, "SCHEMATHESIS_HOOKS": str(SCHEMATHESIS.with_name("fuzz_checks.py"))}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


# ---------------------------------------------------------------- broken HTTP


BROKEN = {
    "garbage": b"\x00\x01\x02garbage\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 500,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.0": b"GET /health HTTP/3.0\r\n\r\n",
    "unknown method": b"FOO /generate HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT path": b"CONNECT /generate HTTP/1.1\r\nHost: x\r\n\r\n",
    "path of no ASCII": b"GET /\xff\xc3 HTTP/1.1\r\nHost: x\r\n\r\n",
    "two lengths": post(b"Content-Length: 5"),
    "negative length": post(b"Content-Length: -1", is_sized=False),
    "length with sign": post(b"Content-Length: +5", is_sized=False),
    "length of letters": post(b"Content-Length: abc", is_sized=False),
    "length that overflows": post(b"Content-Length: 99999999999999999999999999", is_sized=False),
    "length and chunks": post(CHUNKED),
    "unknown coding": post(b"Transfer-Encoding: gzip", is_sized=False),
    "chunk size of letters": post(CHUNKED, body=b"zz\r\nhello\r\n0\r\n\r\n", is_sized=False),
    "chunk size that overflows": post(CHUNKED, body=b"f" * 18 + b"\r\nhello\r\n0\r\n\r\n", is_sized=False),
    "chunk longer than its size": post(CHUNKED, body=b"3\r\nhello\r\n0\r\n\r\n", is_sized=False),
    "NUL in header": post(b"x-a: a\x00b"),
    "CR in header": post(b"x-a: a\rb"),
    "LF in header": post(b"x-a: a\nb"),
    "folded header": post(b"x-a: a\r\n b"),
    "space in header's name": post(b"x a: b"),
    "header without name": post(b": b"),
    "header without colon": post(b"abc"),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_http_is_400_and_the_connection_closes(g: GatewayProcess, data: bytes) -> None:
    answer = read_to_end(g.raw(data))
    assert statuses(answer) == [400]
    assert error_of(answer)["code"] == "invalid_http"


TOO_LARGE = {
    "fields": post(*(b"x-%d: a" % number for number in range(200))),
    "flood of fields": post(*(b"x-%d: a" % number for number in range(20_000))),
    "field": post(b"x-a: " + b"a" * 70_000),
    "flood in one field": b"GET /health HTTP/1.1\r\nx-a: " + b"a" * 3_000_000,
    "path": b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 100_000),
    "chunk extension": post(CHUNKED, body=b"1;" + b"a" * 300_000, is_sized=False),
    "trailers": post(CHUNKED, body=b"1\r\na\r\n0\r\n" + b"x-t: y\r\n" * 30_000, is_sized=False),
}


@pytest.mark.parametrize("data", TOO_LARGE.values(), ids=TOO_LARGE)
def test_too_much_beside_a_body_is_431_and_the_connection_closes(g: GatewayProcess, data: bytes) -> None:
    answer = read_to_end(g.raw(data))
    assert statuses(answer) == [431]
    assert error_of(answer)["code"] == "headers_too_large"


ODD = {
    "as sent": (post(), [200]),
    "chunks": (post(CHUNKED, body=CHUNKS, is_sized=False), [200]),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", [200]),
    "host that is none": (b"GET /nope HTTP/1.1\r\nConnection: close\r\nHost: [::1\r\n\r\n", [404]),
    "offer of HTTP/2": (post(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAA"), [200]),
    "offer of a web socket": (post(b"Connection: Upgrade", b"Upgrade: websocket"), [200]),
    "expectation": (post(b"Expect: 100-continue"), [200]),  # its body is here: nobody waits for leave to send it
    "pipelined": (post().replace(b"Connection: close\r\n", b"") * 2 + post(), [200, 200, 200]),
    "garbage after a request": (post().replace(b"Connection: close\r\n", b"") + b"garbage\r\n\r\n", [200]),
    "too many pipelined": (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100, [200]),
}


@pytest.mark.parametrize(("data", "expected"), ODD.values(), ids=ODD)
def test_odd_http_is_answered(g: GatewayProcess, data: bytes, expected: list[int]) -> None:
    assert statuses(read_to_end(g.raw(data))) == expected


@hypothesis.given(
    request=st.sampled_from([post(), post(CHUNKED, body=CHUNKS, is_sized=False), post(path="/v1/completions")]),
    at=st.integers(0, 250),
    skipped=st.integers(0, 20),
    noise=st.binary(max_size=20) | st.sampled_from([b"\r\n", b"\r\n\r\n", b"0\r\n", b": ", b"HTTP/1.1 "]),
)
def test_noise_in_a_request_is_never_a_bug(
    process: GatewayProcess, request: bytes, at: int, skipped: int, noise: bytes
) -> None:
    connection = process.raw(request[:at] + noise + request[at + skipped :])
    connection.shutdown(socket.SHUT_WR)
    assert all(status < 500 for status in statuses(read_all(connection)))


def read_all(connection: socket.socket) -> bytes:
    try:
        return read_to_end(connection)
    except ConnectionResetError:  # it closed while there was more to read
        return b""


# ---------------------------------------------------------------- headers


REFUSED_HEADERS = [
    *((b"x-tidegate-ttft-ms: " + value, "x-tidegate-ttft-ms") for value in (b"-1", b"0", b"", b"inf", b"1e9", b"1.5")),
    (b"x-tidegate-ttft-ms: " + "٣".encode(), "x-tidegate-ttft-ms"),
    (b"x-tidegate-deadline-ms: " + b"9" * 13, "x-tidegate-deadline-ms"),
    (b"x-tidegate-deadline-ms: " + b"9" * 5000, "x-tidegate-deadline-ms"),
    (b"x-tidegate-deadline-ms: 5\r\nx-tidegate-deadline-ms: 6", "x-tidegate-deadline-ms"),
    *((b"x-tidegate-priority: " + value, "x-tidegate-priority") for value in (b"-1", b"0", b"", b"god", b"\xff")),
    (b"x-tidegate-priority: critical\r\nx-tidegate-priority: batch", "x-tidegate-priority"),
    *(
        (b"x-tidegate-tenant: " + value, "x-tidegate-tenant")
        for value in (b"", b"../x", b"a b", b"\xc3\xa9", b"a" * 65)
    ),
    (b"x-tidegate-tenant: a\r\nX-Tidegate-Tenant: b", "x-tidegate-tenant"),
]


@pytest.mark.parametrize(("header", "param"), REFUSED_HEADERS, ids=[repr(line[:40]) for line, _ in REFUSED_HEADERS])
def test_header_of_no_use_is_400_and_named(g: GatewayProcess, header: bytes, param: str) -> None:
    answer = read_to_end(g.raw(post(header)))
    assert statuses(answer) == [400]
    assert error_of(answer)["param"] == param


header_names = st.sampled_from(
    [
        b"authorization", b"x-request-id", b"traceparent", b"tracestate", b"x-tidegate-session", b"x-tidegate-tenant",
        b"x-tidegate-priority", b"x-tidegate-ttft-ms", b"x-tidegate-deadline-ms", b"x-tidegate-timing",
        b"x-tidegate-replay-of", b"content-type", b"content-encoding", b"accept", b"accept-encoding", b"cookie",
        b"host", b"expect", b"x-forwarded-for", b"range", b"te", b"x-http-method-override",
    ]
)  # fmt: skip
header_values = (
    st.binary(max_size=60).map(lambda value: bytes(byte for byte in value if byte >= 32 and byte != 127))
    | st.integers(-(10**20), 10**20).map(lambda number: b"%d" % number)
    | st.sampled_from([b"critical", b"gzip", b"Bearer x", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", b"1"])
)


@hypothesis.given(st.lists(st.tuples(header_names, header_values), max_size=8), st.sampled_from(PATHS))
def test_no_header_is_a_bug(process: GatewayProcess, headers: list[tuple[bytes, bytes]], path: str) -> None:
    lines = [b"%b: %b" % header for header in headers]
    answer = read_to_end(process.raw(post(*lines, path=path)))
    assert statuses(answer)[-1] in (200, 400, 429), answer


# ---------------------------------------------------------------- bodies


HOSTILE = {
    "nothing": b"",
    "null": b"null",
    "NaN": b'{"prompt": "Hi", "temperature": NaN}',
    "Infinity": b'{"prompt": "Hi", "temperature": -Infinity}',
    "number that overflows": b'{"prompt": "Hi", "temperature": 1e999}',
    "huge integer": b'{"prompt": "Hi", "max_tokens": ' + b"9" * 50_000 + b"}",
    "negative": b'{"prompt": "Hi", "max_tokens": -1}',
    "deep array": b"[" * 50_000,
    "deep field": b'{"prompt": "Hi", "x": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep prompt": b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep messages": b'{"messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "lone surrogate": b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "surrogate bytes": b'{"prompt": "\xed\xa0\x80", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    "no UTF-8": b'{"prompt": "\xff", "messages": [{"role": "user", "content": "\xff"}]}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf", "messages": [{"role": "user", "content": "\xc0\xaf"}]}',
    "UTF-16": json.dumps(FIELDS).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + BODY,
    "bare NUL": b'{"prompt": "\x00", "messages": [{"role": "user", "content": "\x00"}]}',
    "two values": BODY + BODY,
    "cut": BODY[:-1],
    "form": b"prompt=Hi&max_tokens=2",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_body_is_400(g: GatewayProcess, path: str, body: bytes) -> None:
    answer = read_to_end(g.raw(post(body=body, path=path)))
    assert statuses(answer) == [400], answer
    assert error_of(answer)["type"] == "invalid_request_error"


def test_nul_in_a_prompt_is_text(g: GatewayProcess) -> None:
    for path in PATHS:
        body = BODY.replace(b"Hi", b"H\\u0000i")
        assert statuses(read_to_end(g.raw(post(body=body, path=path)))) == [200]
