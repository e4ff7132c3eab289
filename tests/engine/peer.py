"""A scripted gateway: speaks Session to a worker over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from engine.backend import Backend
from engine.settings import EngineSettings
from engine.worker import Worker
from protos.core import wire
from protos.core.contract import (
    PROTOCOL,
    EngineFrame,
    Failed,
    Finished,
    GatewayFrame,
    Hello,
    Sampling,
    Started,
    Submit,
    TextPrompt,
)


def submit(slot: int, prompt: Any = None, *, model: str = "", **sampling: Any) -> Submit:
    return Submit(
        slot=slot,
        request_id=f"request-{slot}",
        prompt=prompt or TextPrompt("Once upon a time"),
        sampling=Sampling(**sampling),
        model=model,
    )


class Answer:
    """All that a worker said about one slot."""

    def __init__(self) -> None:
        self.accepted_ns = 0
        self.started: Started | None = None
        self.texts: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.rows: list[tuple[str, list[int]]] = []
        """(text, token ids) of each delta, whatever its choice."""
        self.logprobs: list[Any] = []
        self.deltas = 0
        self.finished: Finished | None = None
        self.failed: Failed | None = None
        self.done = asyncio.Event()

    @property
    def is_accepted(self) -> bool:
        return self.accepted_ns > 0

    @property
    def text(self) -> str:
        return self.texts.get(0, "")


class Peer:
    """Reads frames into answers by slot, asserting the order that the contract promises."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.frames: list[EngineFrame] = []
        self.answers: dict[int, Answer] = {}
        self._changed = asyncio.Condition()

    async def send(self, **frame: Any) -> None:
        await self._call.write(GatewayFrame(**frame))

    def expect(self, *submits: Submit) -> None:
        for item in submits:
            self.answers[item.slot] = Answer()

    async def submit(self, *submits: Submit) -> list[Answer]:
        self.expect(*submits)
        await self.send(submits=submits)
        return [self.answers[item.slot] for item in submits]

    async def ask(self, *submits: Submit) -> list[Answer]:
        """Submit and wait for the ends."""
        answers = await self.submit(*submits)
        for answer in answers:
            await answer.done.wait()
        return answers

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(is_true)

    async def read(self) -> None:
        async for frame in self._call:
            self.frames.append(frame)
            self._take(frame)
            async with self._changed:
                self._changed.notify_all()

    def _take(self, frame: EngineFrame) -> None:
        for accepted in frame.accepted:
            self.answers[accepted.slot].accepted_ns = accepted.received_ns
        for started in frame.started:
            answer = self.answers[started.slot]
            assert answer.started is None
            answer.started = started
        if frame.deltas is not None:
            self._take_deltas(frame)
        for end in (*frame.finished, *frame.failed):
            answer = self.answers[end.slot]
            assert not answer.done.is_set(), "a request ends once"
            answer.done.set()
        for finished in frame.finished:
            self.answers[finished.slot].finished = finished
        for failed in frame.failed:
            self.answers[failed.slot].failed = failed

    def _take_deltas(self, frame: EngineFrame) -> None:
        deltas = frame.deltas
        assert deltas is not None
        offset = 0
        for row, slot in enumerate(deltas.slots):
            answer = self.answers[slot]
            assert answer.started is not None, "a delta after its start"
            assert not answer.done.is_set(), "no delta after the end"
            choice = deltas.choices[row] if deltas.choices else 0
            count = deltas.token_counts[row]
            token_ids = deltas.token_ids[offset : offset + count]
            answer.texts[choice] = answer.texts.get(choice, "") + deltas.texts[row]
            answer.token_ids.setdefault(choice, []).extend(token_ids)
            answer.rows.append((deltas.texts[row], token_ids))
            answer.logprobs.extend(deltas.logprobs.get(row, ()))
            answer.deltas += 1
            offset += count


@asynccontextmanager
async def open_call(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address, options=wire.CHANNEL_OPTIONS) as channel:
        yield channel.stream_stream(
            wire.SESSION_METHOD,
            request_serializer=wire.encode_gateway_frame,
            response_deserializer=wire.decode_engine_frame,
        )()


@asynccontextmanager
async def connect(address: str, protocol: int = PROTOCOL) -> AsyncIterator[Peer]:
    async with open_call(address) as call:
        peer = Peer(call)
        await peer.send(hello=Hello(protocol, "test-gateway", "0"))
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(peer.read())
            await peer.until(lambda: bool(peer.frames))
            yield peer
            reading.cancel()
        call.cancel()


class Running:
    """A worker that runs in this process."""

    def __init__(self, worker: Worker, task: asyncio.Task[int]) -> None:
        self.worker = worker
        self.exit_status = task
        self.address = f"127.0.0.1:{worker.port}"


@asynccontextmanager
async def running_worker(settings: EngineSettings, backend: Backend) -> AsyncIterator[Running]:
    worker = Worker(settings, backend)
    try:
        model = await worker.open()
        assert model is not None
        async with asyncio.TaskGroup() as group:
            running = Running(worker, group.create_task(worker.run(model)))
            yield running
            worker.stop()
    finally:
        await worker.close()
