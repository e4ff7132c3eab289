"""The overload sweep for real: vLLM on this machine, through the gateway over HTTP and straight to its own server.

Both servers get the same model, the same engine settings and the same arrivals, one server after the other, at the
priority that they start with; the client goes before them. Points are kept in `overload.RESULTS` as they are made, so
that a sweep may take several commands. A shared machine drifts by a third within minutes: with `--rounds` the loads
take turns, in one direction and back, and each point is of all its turns.

    python -m tests.bench.overload --real --path direct --capacity --loads 0.5,1     # finds the capacity first
    python -m tests.bench.overload --real --path gateway --loads 0.5,1,2,3 --rounds 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from deploy.plan import WORKER_NICENESS
from deploy.process import leashed
from engine.model import resolve
from tests.bench import overload, report
from tests.bench.engine import (
    MAX_NUM_SEQS,
    MODEL,
    WORDS,
    VllmServer,
    _engine_toml,
)
from tests.bench.machine import free_port
from tests.bench.overload import Outcome, Path_, Sweep
from tests.bench.process import Process, answers, take_priority

TTFT_S = 2.0
TPOT_S = 0.2
WORDS_IN = (20, 60)
TOKENS_OUT = (32, 96)
CAPACITY_REQUESTS = 192
GRACE_S = 25.0
"""After the last arrival: what has not ended by then is too late by both objectives."""
WARM_UP_S = 15.0
"""At capacity, unmeasured: the first of each batch size pay for what is made once, and a gateway learns its worker."""
WARM_UP_SEED = 99
SETTLE_S = 3.0
TIMED_OUT = "timeout"
"""Code of the error of a request that was admitted, and given up when it had waited in vain: missed, not refused."""


class Request(msgspec.Struct, frozen=True):
    at_s: float
    body: bytes
    tokens: int


class Seen(msgspec.Struct):
    """What the client saw of one request, in seconds after it was due."""

    status: int = 0
    code: str = ""
    """Of an error."""
    first_s: float | None = None
    last_s: float | None = None
    ended_s: float | None = None
    timing: dict[str, int | None] = {}


def requests(rate: float, seconds: float, seed: int) -> list[Request]:
    draw = random.Random(seed)
    made, at_s = [], 0.0
    while (at_s := at_s + draw.expovariate(rate)) < seconds:
        made.append(_request(draw, at_s))
    return made


def _request(draw: random.Random, at_s: float) -> Request:
    tokens = draw.randint(*TOKENS_OUT)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(*WORDS_IN)))}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    return Request(at_s, json.dumps(body).encode(), tokens)


# ---------------------------------------------------------------- client


async def send(port: int, request: Request, due_s: float) -> Seen:
    """One request at its time; times count from when it was due."""
    await asyncio.sleep(max(0.0, due_s - time.monotonic()))
    seen = Seen()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"x-tidegate-ttft-ms: {int(TTFT_S * 1e3)}\r\nx-tidegate-timing: 1\r\nconnection: close\r\n"
            f"content-length: {len(request.body)}\r\n\r\n".encode()
            + request.body
        )
        seen.status = int((await reader.readline()).split()[1])
        async for line in reader:
            if line.startswith(b"data: {"):
                _take_event(seen, json.loads(line[6:]), time.monotonic() - due_s)
            elif line.startswith(b'{"error":'):
                seen.code = json.loads(line)["error"]["code"]
        seen.ended_s = time.monotonic() - due_s
    finally:
        writer.close()
    return seen


def _take_event(seen: Seen, event: dict[str, object], at_s: float) -> None:
    timing = event.get("tidegate")
    if isinstance(timing, dict):
        seen.timing = timing.get("forecast_ns") or {}
    choices = event.get("choices")
    if isinstance(choices, list) and choices and choices[0]["delta"].get("content"):
        seen.first_s = seen.first_s or at_s
        seen.last_s = at_s


async def drive(port: int, sent: Sequence[Request]) -> list[Seen]:
    """All requests at their times, and what became of them by GRACE_S after the last; the rest is cancelled."""
    started_s = time.monotonic() + 0.5
    tasks = [asyncio.ensure_future(send(port, request, started_s + request.at_s)) for request in sent]
    await asyncio.wait(tasks, timeout=sent[-1].at_s + GRACE_S)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    return [one if isinstance(one, Seen) else Seen() for one in ended]


async def flood(port: int, seed: int) -> float:
    """Requests per second that a server finishes when it always has as many as it can run."""
    draw = random.Random(seed)
    started_s = time.monotonic()
    running: set[asyncio.Future[Seen]] = set()
    finished_s: list[float] = []
    for _ in range(CAPACITY_REQUESTS):
        if len(running) == MAX_NUM_SEQS:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            finished_s.extend(time.monotonic() - started_s for _ in done)
        running.add(asyncio.ensure_future(send(port, _request(draw, 0.0), 0.0)))
    rate = (len(finished_s) - 1) / (finished_s[-1] - finished_s[0])
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return rate


def outcome(request: Request, seen: Seen) -> Outcome:
    is_refused = seen.status in (429, 503) and seen.code != TIMED_OUT
    is_good = False
    if seen.status == 200 and seen.ended_s is not None and seen.first_s is not None and seen.last_s is not None:
        tpot_s = (seen.last_s - seen.first_s) / (request.tokens - 1)
        is_good = seen.first_s <= TTFT_S and tpot_s <= TPOT_S
    expected_ns, safe_ns = seen.timing.get("expected"), seen.timing.get("safe")
    return Outcome(
        is_refused=is_refused,
        is_good=is_good,
        ttft_s=seen.first_s,
        expected_s=expected_ns / 1e9 if expected_ns else None,
        safe_s=safe_ns / 1e9 if safe_ns else None,
        refused_after_s=seen.ended_s if is_refused else None,
    )


# ---------------------------------------------------------------- servers


class GatewayServer:
    """A gateway and one vLLM worker, as `tidegate up` starts them."""

    def __init__(self, folder: Path, model_path: str, cores: Sequence[int]) -> None:
        self.port, worker_port = free_port(), free_port()
        (folder / "engine.toml").write_text(_engine_toml(model_path, cores))
        (folder / "gateway.toml").write_text(f"[gateway.limits]\ntoken_s = {TPOT_S}\n")
        tidegate = [sys.executable, "-m", "deploy"]
        worker = [*tidegate, "engine", "--port", str(worker_port), "--config", str(folder / "engine.toml")]
        worker = leashed(worker, WORKER_NICENESS)
        gateway = [*tidegate, "gateway", "--port", str(self.port), "--operator-port", str(free_port())]
        gateway += ["--worker", f"127.0.0.1:{worker_port}", "--config", str(folder / "gateway.toml")]
        self._worker = Process("worker", worker, cores=cores, log=folder / "worker.log", is_first=False)
        self._gateway = Process("gateway", gateway, cores=cores, log=folder / "gateway.log", is_first=False)

    def wait(self) -> None:
        self._gateway.wait_until(lambda: answers(f"http://127.0.0.1:{self.port}/ready"), timeout_s=300.0)

    def close(self) -> None:
        self._gateway.stop()
        self._worker.stop()


def measure(
    port: int, path: Path_, sweep: Sweep, loads: Sequence[float], seconds: float, rounds: int, seed: int
) -> None:
    uvloop.run(drive(port, requests(sweep.capacity, WARM_UP_S, seed=WARM_UP_SEED)))
    outcomes: dict[float, list[Outcome]] = {load: [] for load in loads}
    for number in range(rounds):
        for load in loads if number % 2 == 0 else reversed(loads):
            rate = load * sweep.capacity
            sent = requests(rate, seconds, seed + number)
            seen = uvloop.run(drive(port, sent))
            latest = [outcome(request, one) for request, one in zip(sent, seen, strict=True)]
            outcomes[load] += latest
            sent_s = (number + 1) * seconds
            point = overload.measure(outcomes[load], kind="real", path=path, load=load, rate=rate, seconds=sent_s)
            sweep.points = [old for old in sweep.points if (old.path, old.load) != (path, load)] + [point]
            overload.keep(sweep)
            goodput = sum(one.is_good for one in latest) / seconds
            report.console.print(f"  {path} {load:g}x, round {number + 1}: {goodput:.2f} requests/s in time")
            time.sleep(SETTLE_S)


def main(arguments: Sequence[str], loads: Sequence[float], seed: int) -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.overload --real")
    parser.add_argument("--path", choices=("gateway", "direct"), required=True)
    parser.add_argument("--real-seconds", type=float, default=35.0, help="of arrivals per load and round")
    parser.add_argument("--rounds", type=int, default=1, help="how often each load has its turn")
    parser.add_argument("--capacity", action="store_true", help="find the capacity first, and begin a new sweep")
    options = parser.parse_args(arguments)
    if options.capacity and options.path != "direct":
        parser.error("--capacity floods the server, and the gateway would refuse most of it: add it to --path direct")
    sweep = overload.load_sweeps().get("real")
    if sweep is None and not options.capacity:
        sys.exit("the capacity is not known yet: add --capacity")
    cores = sorted(os.sched_getaffinity(0))
    take_priority(os.getpid())  # it stands for clients on other machines: one that servers starve would send late
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        model_path = str(resolve(MODEL))
        server: GatewayServer | VllmServer
        if options.path == "gateway":
            server = GatewayServer(Path(folder), model_path, cores)
        else:
            server = VllmServer(Path(folder), model_path, cores, is_first=False)
        try:
            server.wait()
            if options.capacity:
                about = f"{MODEL} by vLLM on {len(cores)} CPU cores"
                slo = f"TTFT {TTFT_S:g} s, TPOT {TPOT_S * 1e3:g} ms"
                sweep = Sweep("real", about, slo, uvloop.run(flood(server.port, seed)))
                report.console.print(f"capacity {sweep.capacity:.2f} requests/s")
            assert sweep is not None
            measure(server.port, options.path, sweep, loads, options.real_seconds, options.rounds, seed)
        finally:
            server.close()
    overload.print_sweep(sweep)
    return 0
