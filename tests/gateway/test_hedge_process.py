"""Hedges between processes: a worker that is slow, one that hangs, and what clients see of them."""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.core.capture import read_capture
from protos.core.record import Outcome
from tests.gateway.faults import MODEL, expected, stream_fault
from tests.gateway.processes import GatewayProcess, WorkerProcess, http_request, wait_for

AFTER_S, STALL_S = 0.1, 1.0
TOKENS = 4
CLIENTS = 3
"""So many hedges may always be under way."""


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """One whose steps take a second, and one that is fast; an idle gateway takes the first of them."""
    folder = tmp_path_factory.mktemp("workers")
    both = WorkerProcess(folder / "slow", MODEL, 1000 * STALL_S), WorkerProcess(folder / "fast", MODEL, 5)
    try:
        yield both
    finally:
        for worker in both:
            worker.kill()


@pytest.fixture
def g(workers: tuple[WorkerProcess, WorkerProcess], tmp_path: Path) -> Iterator[GatewayProcess]:
    config = f"[gateway.tenants.hasty]\nhedge_after_ms = {1000 * AFTER_S:.0f}\n"
    gateway = GatewayProcess(tmp_path, *(worker.address for worker in workers), config=config)
    try:
        yield gateway.start(2)
    finally:
        gateway.kill()


async def ask(g: GatewayProcess, tenant: str, number: int) -> float:
    """Seconds until the first token of a streamed answer that is checked to the letter."""
    fields = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    body = {"model": MODEL, "prompt": f"Tale {number}", **fields}
    reader, writer = await asyncio.open_connection("127.0.0.1", g.port)
    started_s = time.monotonic()
    writer.write(http_request("/v1/completions", body, f"X-Tidegate-Tenant: {tenant}", "Connection: close"))
    head = await reader.readuntil(b"\r\n\r\n")
    begin = await reader.readuntil(b"data: ")
    first_s = time.monotonic() - started_s
    assert b" 200 " in head.split(b"\r\n")[0], begin
    assert stream_fault(begin + await asyncio.wait_for(reader.read(), 30), expected(number, TOKENS)) == ""
    writer.close()
    return first_s


async def ask_all(g: GatewayProcess, tenant: str, requests: int) -> list[float]:
    """A closed loop of clients; the times to the first token, shortest first."""

    async def client(number: int) -> list[float]:
        return [await ask(g, tenant, request) for request in range(number, requests, CLIENTS)]

    return sorted(itertools.chain(*await asyncio.gather(*map(client, range(CLIENTS)))))


def sequences(g: GatewayProcess) -> float:
    """In all engines."""
    metrics = g.request("GET", "/metrics", operator=True)[2].decode()
    return sum(map(float, re.findall(r"^tidegate_worker_(?:running|waiting)\{.*\} (.+)$", metrics, re.MULTILINE)))


def counted(g: GatewayProcess, name: str) -> float:
    metrics = g.request("GET", "/metrics", operator=True)[2].decode()
    return sum(map(float, re.findall(rf"^{name}_total\{{.*\}} (.+)$", metrics, re.MULTILINE)))


async def test_first_token_waits_for_the_hedge_and_not_for_the_slow_worker(g: GatewayProcess) -> None:
    patient = await ask_all(g, "patient", 2 * CLIENTS)
    assert patient[-1] >= STALL_S
    assert counted(g, "tidegate_hedges") == 0
    hasty = await ask_all(g, "hasty", 25 * CLIENTS)
    assert AFTER_S <= hasty[-1] < STALL_S / 2, "all of them, so the 99th percentile too"
    won = counted(g, "tidegate_hedges_won")
    assert counted(g, "tidegate_hedges") >= won
    assert won > len(hasty) / 100, "who would have made the 99th percentile a second"
    wait_for(lambda: not g.state()["leases"] and not sequences(g), "both workers have let go")
    assert (g.state()["active"], g.state()["queued"]) == (0, 0)
    assert "Traceback" not in g.output


async def test_worker_that_hangs_costs_clients_the_delay_and_is_not_blamed(
    g: GatewayProcess, workers: tuple[WorkerProcess, WorkerProcess]
) -> None:
    slow, _ = workers
    slow.process.send_signal(signal.SIGSTOP)
    try:
        sooner_s, later_s = sorted(await asyncio.gather(ask(g, "hasty", 1), ask(g, "hasty", 2)))
        assert sooner_s < AFTER_S <= later_s < STALL_S / 2
        wait_for(lambda: not g.state()["active"], "both are answered")
        assert g.state()["leases"] == 1, "the worker has not let go"
    finally:
        slow.process.send_signal(signal.SIGCONT)
    wait_for(lambda: not g.state()["leases"] and not sequences(g), "the worker has let go")
    assert {worker["breaker"] for worker in g.state()["workers"]} == {"closed"}
    assert g.terminate() == 0
    records = [entry.record for entry in read_capture(g.capture)]
    errors = [[attempt.error for attempt in record.attempts] for record in records]
    assert sorted(errors, key=len) == [[None], ["hedged", None]]
    assert {record.outcome for record in records} == {Outcome.FINISHED}
