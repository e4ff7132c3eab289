"""A mass cancel as clients make it: thousands of requests wait in one gateway, and all their sockets close at once.

The gateway is a process of its own, and so are its worker, a simulated engine of one sequence, and this client. The
time runs from the first socket that closes until the operator's listener says that nothing waits, runs or is held.
"""

from __future__ import annotations

import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from tests.gateway.processes import GatewayProcess, Process, http_request, wait_for

MODEL = "tide-1"
TENANTS = 20
SPARE_FILES = 500
POLL_SECONDS = 0.002
FOREVER_MS = 1_000.0
"""Of a step: the one answer that runs does not end by itself."""


class MassCancel(msgspec.Struct, frozen=True):
    requests: int
    closing_ms: float
    """Until the client had closed its last socket."""
    empty_ms: float
    """Until the gateway said that it holds nothing."""
    cpu_ms: float
    """Of the gateway's process, meanwhile; 10 ms resolution."""


def cancel_all(requests: int) -> MassCancel:
    """Fewer where this process may not open as many sockets."""
    requests = min(requests, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_FILES)
    with tempfile.TemporaryDirectory() as folder, _full_gateway(Path(folder), requests) as gateway:
        clients = _queue(gateway, requests)
        process = psutil.Process(gateway.process.pid)
        cpu_s, started_s = _cpu_s(process), time.perf_counter()
        for client in clients:
            client.close()
        closed_s = time.perf_counter()
        while _held(gateway):
            time.sleep(POLL_SECONDS)
        ended_s = time.perf_counter()
        return MassCancel(
            requests, 1e3 * (closed_s - started_s), 1e3 * (ended_s - started_s), 1e3 * (_cpu_s(process) - cpu_s)
        )


@contextmanager
def _full_gateway(folder: Path, requests: int) -> Iterator[GatewayProcess]:
    """With a worker whose one sequence is taken as soon as somebody comes."""
    config = folder / "engine.toml"
    config.write_text(f"[engine]\nmax_num_seqs = 1\n[engine.sim]\nstep_ms = {FOREVER_MS}\n")
    flags = ("--backend", "sim", "--profile", "instant", "--served-model-name", MODEL, "--port", "0")
    worker = Process(folder / "worker", "engine", "--config", str(config), *flags, ready=r"127\.0\.0\.1:(\d+)")
    try:
        address = f"127.0.0.1:{worker.wait_ready()[1]}"
        config = f"[gateway.limits]\nqueue_requests = {2 * requests}\nfirst_token_s = 250.0\n"
        gateway = GatewayProcess(folder / "gateway", address, config=config)
        try:
            yield gateway.start(1)
        finally:
            gateway.kill()
    finally:
        worker.kill()


def _queue(gateway: GatewayProcess, requests: int) -> list[socket.socket]:
    body = {"messages": [{"role": "user", "content": "Tell me a tale"}], "max_tokens": 10_000, "stream": True}
    clients = [
        gateway.raw(http_request("/v1/chat/completions", body, f"x-tidegate-tenant: tenant-{number % TENANTS}"))
        for number in range(requests)
    ]
    wait_for(lambda: _held(gateway) >= requests, f"{requests} requests wait", 120.0)
    return clients


def _held(gateway: GatewayProcess) -> int:
    state = gateway.state()
    assert state["active"] >= state["queued"]
    return int(state["active"] + state["leases"])


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
