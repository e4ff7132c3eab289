"""A gateway and workers as processes, a load whose every answer is known beforehand, and the ways to break workers."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from engine.sim.parameters import SimParameters
from engine.sim.text import write_script
from protos.core import journal
from protos.core.capture import read_capture
from protos.core.contract import Sampling, TextPrompt
from protos.core.record import Outcome, RequestRecord
from tests.gateway.processes import GatewayProcess, WorkerProcess, http_request, wait_for

MODEL = "tide-1"
RESUME = "[gateway.tenants.anonymous]\nresume = true\nmax_priority = 'critical'\n"
NOTICED_SECONDS = 10.0


class Stack:
    """`workers` simulated engines behind one gateway, which resumes what it can."""

    def __init__(self, folder: Path, workers: int, step_ms: float) -> None:
        self._folder = folder
        self._step_ms = step_ms
        self.workers = [WorkerProcess(folder / f"worker-{number}", MODEL, step_ms) for number in range(workers)]
        self.addresses = [worker.address for worker in self.workers]
        self.gateway = GatewayProcess(folder / "gateway", *self.addresses, config=RESUME, capture_level="hashed")
        self.gateway.start(workers)

    def close(self) -> None:
        for process in (self.gateway, *self.workers):
            process.kill()

    def is_ready(self, number: int) -> bool:
        workers = self.gateway.state()["workers"]
        return any(worker["address"] == self.addresses[number] and worker["state"] == "ready" for worker in workers)

    def leases(self, number: int) -> int:
        workers = self.gateway.state()["workers"]
        return int(next(worker["leases"] for worker in workers if worker["address"] == self.addresses[number]))

    # -- faults; each blocks until the gateway has seen it

    def kill(self, number: int) -> None:
        wait_for(lambda: self.leases(number), "it has something to lose")
        self.workers[number].process.kill()
        self.workers[number].process.wait()
        wait_for(lambda: not self.is_ready(number), "the loss is seen", NOTICED_SECONDS)

    def suspend(self, number: int) -> float:
        """SIGSTOP; returns after how many seconds the gateway had noticed."""
        wait_for(lambda: self.leases(number), "it has something to lose")
        started_s = time.monotonic()
        self.workers[number].process.send_signal(signal.SIGSTOP)
        wait_for(lambda: not self.is_ready(number), "the silence is noticed", NOTICED_SECONDS)
        return time.monotonic() - started_s

    def go_on(self, number: int) -> None:
        """SIGCONT."""
        self.workers[number].process.send_signal(signal.SIGCONT)
        self._await_ready(number)

    def start(self, number: int) -> None:
        """Start a worker that has ended, where it was."""
        port = int(self.addresses[number].rpartition(":")[2])
        folder = self._folder / f"worker-{number}"
        self.workers[number] = WorkerProcess(folder, MODEL, self._step_ms, port)
        self._await_ready(number)

    def roll(self) -> None:
        """Drain and start again all workers, one after the other."""
        for number, worker in enumerate(self.workers):
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(60) == 0, worker.output
            self.start(number)

    def _await_ready(self, number: int) -> None:
        wait_for(lambda: self.is_ready(number), "the worker is back", 30.0)

    def records(self, arrived: int) -> list[RequestRecord]:
        """What the gateway wrote down, once that is on disk."""
        wait_for(lambda: journal.verify(self.gateway.capture).entries >= arrived, "the capture holds them")
        return [entry.record for entry in read_capture(self.gateway.capture)]


@contextmanager
def stack(folder: Path, workers: int, step_ms: float) -> Iterator[Stack]:
    it = Stack(folder, workers, step_ms)
    try:
        yield it
    finally:
        it.close()


class Answer(msgspec.Struct, frozen=True):
    request_id: str
    error: str
    """What is wrong with it; empty where it is the one that was expected, to the letter."""


class Load:
    """A closed loop of `clients`, each with its next request as soon as it has its answer."""

    def __init__(self, port: int, clients: int, tokens: int, is_stream: Callable[[int], bool]) -> None:
        self._port, self._clients, self._tokens, self._is_stream = port, clients, tokens, is_stream
        self._is_over = False
        self._sent = 0
        self.answers: list[Answer] = []

    async def run(self, faults: Callable[[], None]) -> None:
        """Send until `faults`, on a thread, is through; then let what runs end."""
        async with asyncio.TaskGroup() as clients:
            for _ in range(self._clients):
                clients.create_task(self._client())
            try:
                await asyncio.to_thread(faults)
            finally:
                self._is_over = True

    @property
    def errors(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error]

    async def _client(self) -> None:
        while not self._is_over:
            self._sent += 1
            number = self._sent
            self.answers.append(Answer(f"fault-{number}", await self._ask(number)))

    async def _ask(self, number: int) -> str:
        body = {
            "model": MODEL,
            "prompt": f"Tale {number}",
            "max_tokens": self._tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": self._is_stream(number),
        }
        headers = (f"X-Request-Id: fault-{number}", "X-Tidegate-Priority: critical", "Connection: close")
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(http_request("/v1/completions", body, *headers))
            answer = await asyncio.wait_for(reader.read(), 60)
            writer.close()
        except (OSError, TimeoutError) as error:
            return f"no answer: {error!r}"
        return _fault(answer, expected(number, self._tokens), is_stream=bool(body["stream"]))


def expected(number: int, tokens: int) -> str:
    """What an undisturbed simulated engine says. No word comes twice, so that one too many or too few shows."""
    sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
    script = write_script(TextPrompt(f"Tale {number}"), sampling, 0, tokens, SimParameters())
    return "".join(script.text(index) for index in range(tokens))


def _fault(answer: bytes, text: str, *, is_stream: bool) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0]
    if b" 200 " not in status:
        return f"{status!r}: {body[:200]!r}"
    if not is_stream:
        choices = json.loads(body)["choices"]
        return "" if [choice["text"] for choice in choices] == [text] else f"another text: {choices!r}"
    return stream_fault(body, text)


def stream_fault(body: bytes, text: str) -> str:
    """What is wrong with a stream's body."""
    *events, rest = dechunk(body).split(b"\n\n")
    if rest or not events or events[-1] != b"data: [DONE]":
        return f"no end: {events[-1:]!r}"
    chunks: list[Any] = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    if any("error" in chunk for chunk in chunks):
        return f"an error event: {chunks[-1]!r}"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    got = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    return "" if (got, reasons) == (text, ["length"]) else f"another text: {got!r}, {reasons}"


def dechunk(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(body[:length])
        body = body[length + 2 :]
        if not length:
            return b"".join(parts)
    return b""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What clients and gateway say about one run, put together."""

    requests: int
    wrong: list[Answer]
    lost_or_twice: int
    """Requests without exactly one record."""
    amplification: float
    """Attempts per request."""
    retried: int
    resumed: int
    longest_pause_s: float
    """Between two tokens of a resumed answer."""


def judge(load: Load, records: list[RequestRecord]) -> Verdict:
    mine = [record for record in records if record.request_id.startswith("fault-")]
    sent, settled = {answer.request_id for answer in load.answers}, [record.request_id for record in mine]
    resumed = [record for record in mine if any(attempt.output_tokens for attempt in record.attempts[:-1])]
    return Verdict(
        requests=len(sent),
        wrong=load.errors,
        lost_or_twice=len(sent ^ set(settled)) + len(settled) - len(set(settled)),
        amplification=sum(len(record.attempts) for record in mine) / max(1, len(mine)),
        retried=sum(len(record.attempts) > 1 for record in mine) - len(resumed),
        resumed=len(resumed),
        longest_pause_s=max((record.max_gap_ns / 1e9 for record in resumed), default=0.0),
    )


def outcomes(records: list[RequestRecord]) -> set[Outcome]:
    return {record.outcome for record in records}
