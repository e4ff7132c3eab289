"""Workers that join and leave a gateway process: by the admin API, and by a changed configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.processes import GatewayProcess, WorkerProcess, http_request, read_to_end, read_until, wait_for

FIRST, SECOND, ADAPTER = "tide-first", "tide-second", "tide-adapter"


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("workers")
    both = (
        WorkerProcess(folder / "first", FIRST, 5),
        WorkerProcess(folder / "second", SECOND, 50, adapters=[ADAPTER]),
    )
    try:
        yield both[0].address, both[1].address
    finally:
        for worker in both:
            worker.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def g(workers: tuple[str, str], folder: Path) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(folder, config=f'workers = ["{workers[0]}"]\n')
    try:
        yield gateway.start(1)
    finally:
        gateway.kill()


def ask(g: GatewayProcess, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    headers = {"content-type": "application/json"}
    status, _, data = g.request(method, path, body, headers, operator=True)
    return status, json.loads(data)


def models(g: GatewayProcess) -> dict[str, str | None]:
    """What is served, and of each adapter what it belongs to."""
    return {model["id"]: model["parent"] for model in json.loads(g.request("GET", "/v1/models")[2])["data"]}


def stream(g: GatewayProcess, model: str, tokens: int) -> bytes:
    return http_request(
        "/v1/completions", {"model": model, "prompt": "x", "max_tokens": tokens, "stream": True}, "Connection: close"
    )


def test_worker_is_added_and_removed_without_cutting_its_stream(g: GatewayProcess, workers: tuple[str, str]) -> None:
    status, added = ask(g, "POST", "/admin/workers", {"address": workers[1]})
    assert (status, added["sources"]) == (201, ["operator"])
    wait_for(lambda: models(g) == {FIRST: None, SECOND: None, ADAPTER: SECOND}, "the new worker's model is served")
    answers = [g.request("POST", "/generate", {"model": model, "prompt": "x"}) for model in (SECOND, ADAPTER)]
    assert [status for status, _, _ in answers] == [200, 200]
    assert answers[0][2] != answers[1][2], "an adapter says something else"
    connection = g.raw(stream(g, SECOND, 12))
    start = read_until(connection, b"data: ")
    status, leaving = ask(g, "DELETE", f"/admin/workers/{workers[1]}")
    assert (status, leaving["is_leaving"], leaving["leases"]) == (202, True, 1)
    status, headers, _ = g.request("POST", "/generate", {"model": SECOND, "prompt": "x"})
    assert (status, headers["x-tidegate-reject-reason"]) == (503, "no_worker")
    rest = start + read_to_end(connection)
    assert b'"error"' not in rest
    assert b"data: [DONE]" in rest
    wait_for(lambda: len(ask(g, "GET", "/admin/workers")[1]) == 1, "the worker is forgotten")


def test_drained_worker_is_taken_back(g: GatewayProcess, workers: tuple[str, str]) -> None:
    status, drained = ask(g, "POST", f"/admin/workers/{workers[0]}/drain")
    assert (status, drained["is_drained"], drained["state"]) == (200, True, "ready")
    assert g.request("POST", "/generate", {"model": FIRST, "prompt": "x"})[0] == 503
    assert ask(g, "POST", "/admin/workers", {"address": workers[0]})[1]["sources"] == ["configuration"]
    assert g.request("POST", "/generate", {"model": FIRST, "prompt": "x"})[0] == 200


def test_operators_mistakes_are_named(g: GatewayProcess) -> None:
    mistakes: list[tuple[str, str, Any, int]] = [
        ("POST", "/admin/workers", {"address": "no port"}, 400),
        ("POST", "/admin/workers", {"address": "dns://x:1"}, 400),
        ("POST", "/admin/workers", {"adress": "x:1"}, 400),
        ("POST", "/admin/workers", b"{", 400),
        ("POST", "/admin/workers/x:1/drain", None, 404),
        ("DELETE", "/admin/workers/x:1", None, 404),
        ("PUT", "/admin/workers", None, 405),
    ]
    for method, path, body, status in mistakes:
        answer = ask(g, method, path, body)
        assert (answer[0], answer[1]["error"]["type"]) == (status, "invalid_request_error"), (method, path, body)


@pytest.mark.parametrize(
    ("body", "param", "what"),
    [
        ({"adress": "x:1"}, None, "adress"),
        ({"address": 5}, "address", "expected str"),
        ({}, "address", "is required"),
        (b"", None, "not valid JSON"),
        (b"[" * 100_000, None, "expected object"),
        (b"\x1f\x8b\x08", None, "compressed"),
    ],
)
def test_what_is_wrong_with_a_new_worker_is_said(g: GatewayProcess, body: Any, param: str | None, what: str) -> None:
    status, answer = ask(g, "POST", "/admin/workers", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert what in answer["error"]["message"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null"])
def test_web_pages_do_not_change_the_workers(g: GatewayProcess, workers: tuple[str, str], origin: str) -> None:
    """A form's or a script's POST that browsers send without asking first."""
    headers = {"origin": origin, "content-type": "text/plain"}
    for method, path in (
        ("POST", "/admin/workers"),
        ("POST", f"/admin/workers/{workers[0]}/drain"),
        ("DELETE", f"/admin/workers/{workers[0]}"),
    ):
        status, _, body = g.request(method, path, {"address": "evil.example:9101"}, headers, operator=True)
        assert (status, json.loads(body)["error"]["param"]) == (403, "origin")
    assert g.request("GET", "/admin/workers", headers=headers, operator=True)[0] == 200
    assert [(worker["address"], worker["is_drained"]) for worker in g.state()["workers"]] == [(workers[0], False)]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/admin/workers", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("/admin/workers/x:1", {"DELETE", "OPTIONS"}),
        ("/admin/workers/x:1/drain", {"OPTIONS", "POST"}),
        ("/metrics", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_options_are_all_methods(g: GatewayProcess, path: str, methods: set[str]) -> None:
    status, headers, _ = g.request("OPTIONS", path, operator=True)
    assert (status, set(headers["allow"].split(", "))) == (204, methods)


def test_workers_answer_head(g: GatewayProcess) -> None:
    status, _, body = g.request("HEAD", "/admin/workers", operator=True)
    assert (status, body) == (200, b"")


def test_metrics_have_one_charset(g: GatewayProcess) -> None:
    _, headers, _ = g.request("GET", "/metrics", operator=True)
    assert headers["content-type"].startswith("text/plain; version=")
    assert headers["content-type"].count("charset") == 1


def test_changed_file_brings_workers_and_takes_them_away(
    g: GatewayProcess, workers: tuple[str, str], folder: Path
) -> None:
    file = folder / "gateway.toml"
    port = workers[1].rpartition(":")[2]
    file.write_text(f'[gateway]\nworkers = ["{workers[0]}", "dns://localhost:{port}"]\n')
    wait_for(lambda: models(g) == {FIRST: None, SECOND: None, ADAPTER: SECOND}, "the name's worker is served")
    file.write_text(f'[gateway]\nworkers = ["{workers[0]}", "nonsense"]\n')
    wait_for(lambda: "gateway.workers: 'nonsense'" in g.output, "the log says what is wrong")
    assert models(g) == {FIRST: None, SECOND: None, ADAPTER: SECOND}
    file.write_text(f'[gateway]\nworkers = ["{workers[1]}"]\n')
    wait_for(lambda: models(g) == {SECOND: None, ADAPTER: SECOND}, "the first one is gone")
