"""Scripted peers of the gateway: a client, a worker in this process, a worker behind a real socket, and time."""

from __future__ import annotations

import asyncio
import functools
import selectors
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import msgspec

from gateway.app import ENDPOINTS
from gateway.exchange import Exchange
from gateway.pipeline import Pipeline
from gateway.scheduler import Scheduler
from gateway.settings import Limits
from gateway.stream import CLOSED
from gateway.tenants import DEFAULT_BANDS, TenantTable
from protos.core import wire
from protos.core.contract import (
    PROTOCOL,
    Accepted,
    Deltas,
    EngineFrame,
    Failed,
    FailureKind,
    Finished,
    GatewayFrame,
    Load,
    ModelInfo,
    Stamps,
    Started,
    Submit,
    Welcome,
)
from protos.core.record import Outcome, RequestRecord, is_partition

MODEL = "tide-1"


def model_info(**changes: Any) -> ModelInfo:
    facts: dict[str, Any] = {
        "names": (MODEL,),
        "backend": "sim",
        "backend_version": "1",
        "simulated": True,
        "context_tokens": 4096,
        "max_sequences": 8,
        "max_batch_tokens": 2048,
        "kv_blocks": 1024,
        "kv_block_tokens": 16,
        "has_chat_template": True,
        "device": "none",
        "dtype": "none",
    }
    return ModelInfo(**{**facts, **changes})


# ---------------------------------------------------------------- time


class _JumpingSelector(selectors.DefaultSelector):
    """Where a loop would sleep with nothing to read, time jumps to the next timer instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("everything waits, and no timer will end it")
        if not ready and timeout:
            self.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose hours pass in milliseconds; it has no real I/O to wait for."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


class LoopClock:
    """The running loop's time, as a Clock. It starts at an hour, because a stamp of 0 means "not yet"."""

    def mono_ns(self) -> int:
        return 3_600_000_000_000 + round(asyncio.get_running_loop().time() * 1e9)

    def wall_ns(self) -> int:
        return 1_700_000_000_000_000_000 + self.mono_ns()


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


async def settle_down() -> None:
    """Let everything that can run without time passing run."""
    for _ in range(20):
        await asyncio.sleep(0)


# ---------------------------------------------------------------- the client


def chat_body(**fields: Any) -> bytes:
    return msgspec.json.encode({"messages": [{"role": "user", "content": "Tell me a tale"}], **fields})


class FakeClient:
    """One HTTP request as ASGI sees it. `is_full`: the socket takes nothing until `take_again`."""

    def __init__(self, path: str, headers: dict[str, str]) -> None:
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        self.messages: list[dict[str, Any]] = []
        self.task: asyncio.Task[None]
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._takes = asyncio.Event()
        self._takes.set()
        self._is_gone = False

    def send_body(self, body: bytes, *, more_body: bool = False) -> None:
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": more_body})

    def leave(self) -> None:
        self._is_gone = True
        self._takes.set()
        self._incoming.put_nowait({"type": "http.disconnect"})

    def stall(self) -> None:
        self._takes.clear()

    def take_again(self) -> None:
        self._takes.set()

    async def receive(self) -> dict[str, Any]:
        return await self._incoming.get()

    async def send(self, message: dict[str, Any]) -> None:
        if not self._takes.is_set():
            await self._takes.wait()
        if not self._is_gone:
            self.messages.append(message)

    # -- what it got

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def events(self) -> list[Any]:
        """Data of the stream's events; `[DONE]` as the string."""
        *events, rest = self.body.split(b"\n\n")
        assert rest == b"", "an event is cut"
        assert all(event.startswith(b"data: ") for event in events)
        data = [event[len(b"data: ") :] for event in events]
        return ["[DONE]" if item == b"[DONE]" else msgspec.json.decode(item) for item in data]

    @property
    def text(self) -> str:
        return "".join(
            choice.get("delta", {}).get("content", "") + choice.get("text", "")
            for event in self.events
            if event != "[DONE]"
            for choice in event.get("choices", ())
        )

    @property
    def is_complete(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", True)


# ---------------------------------------------------------------- a worker in this process


class FakeUpstream:
    """A worker that does what the test says. Its clock is ours."""

    def __init__(self, name: str, model: ModelInfo) -> None:
        self.name = name
        self.model = model
        self.is_ready = True
        self.answers_cancels = True
        self.sinks: dict[int, Any] = {}
        self.submitted: list[dict[str, Any]] = []
        self.cancelled: list[int] = []
        self._slots = 0
        self._first_ns: dict[int, int] = {}

    def submit(self, sink: Any, **request: Any) -> int:
        self._slots += 1
        self.sinks[self._slots] = sink
        self.submitted.append({**request, "resumed": list(request["token_ids"] or ())})
        return self._slots

    def redirect(self, slot: int, sink: Any, token_ids: list[int] | None = None) -> None:
        if slot in self.sinks:
            self.sinks[slot] = sink
            self.submitted[slot - 1]["token_ids"] = token_ids

    def cancel(self, slot: int) -> None:
        if slot in self.sinks:
            self.cancelled.append(slot)
            if self.answers_cancels:
                asyncio.get_running_loop().call_soon(self.finish, slot, "cancelled")

    # -- the script

    def accept(self, slot: int = 1) -> None:
        self.sinks[slot].accepted(LoopClock().mono_ns(), 0)

    def token(self, slot: int = 1, text: str = "word ", choice: int = 0) -> None:
        now_ns = LoopClock().mono_ns()
        if slot not in self._first_ns:
            self._first_ns[slot] = now_ns
            stamps = Stamps(now_ns - 4, now_ns - 3, now_ns - 2, now_ns, now_ns)
            self.sinks[slot].started(Started(slot, 7, 2, stamps), 0)
        self.sinks[slot].delta(text, 1, choice, None, now_ns)
        token_ids = self.submitted[slot - 1]["token_ids"]
        if token_ids is not None:
            token_ids.append(len(token_ids) + 1)

    def finish(self, slot: int = 1, *reasons: str, output_tokens: int = 0) -> None:
        sink = self.sinks.pop(slot, None)
        if sink is None:
            return
        first_ns = self._first_ns.get(slot)
        now_ns = LoopClock().mono_ns()
        stamps = Stamps(first_ns - 4, first_ns - 3, first_ns - 2, first_ns, now_ns) if first_ns else Stamps(now_ns)
        sink.finished(
            Finished(
                slot=slot,
                reasons=reasons or ("stop",),
                prompt_tokens=7,
                cached_tokens=2,
                output_tokens=output_tokens,
                stamps=stamps,
            ),
            0,
        )

    def fail(self, slot: int, kind: FailureKind, message: str = "it broke", param: str = "") -> None:
        self.sinks.pop(slot).failed(Failed(slot=slot, kind=kind, message=message, param=param), 0)


class FakeFleet:
    """Workers by name over a real Scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.on_room: Callable[[], None]
        self.on_loss: Callable[[], None]
        self.workers: dict[str, FakeUpstream] = {}

    def join(self, name: str, **model: Any) -> FakeUpstream:
        worker = self.workers[name] = FakeUpstream(name, model_info(**model))
        self._scheduler.worker_joined(name, worker.model)
        self.on_room()
        return worker

    def step(self, name: str) -> None:
        """A step of the worker has ended."""
        self._scheduler.stepped(name, LoopClock().mono_ns())
        self.on_room()

    def lose(self, name: str, reason: str = "connection reset") -> None:
        """As a session does it: the scheduler forgets the worker before its sinks hear."""
        worker = self.workers[name]
        worker.is_ready = False
        self._scheduler.worker_left(name)
        self.on_loss()
        sinks, worker.sinks = worker.sinks, {}
        for sink in sinks.values():
            sink.lost(reason)

    def upstream(self, name: str) -> FakeUpstream | None:
        worker = self.workers[name]
        return worker if worker.is_ready else None

    def model_of(self, name: str) -> ModelInfo:
        return self.workers[name].model


class FakeRecorder:
    keeps_output = True

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def settle(self, exchange: Exchange) -> None:
        self.records.append(exchange.record())


class Gateway:
    """A pipeline between fakes."""

    def __init__(self, tasks: asyncio.TaskGroup, limits: Limits, tenants: TenantTable | None = None) -> None:
        self._tasks = tasks
        self._endpoints = {endpoint.path: endpoint for endpoint in ENDPOINTS}
        self.scheduler = Scheduler()
        self.fleet = FakeFleet(self.scheduler)
        self.recorder = FakeRecorder()
        self.pipeline = Pipeline(
            limits=limits,
            tenants=tenants or TenantTable(DEFAULT_BANDS, {}),
            scheduler=self.scheduler,
            fleet=self.fleet,  # type: ignore[arg-type]
            recorder=self.recorder,  # type: ignore[arg-type]
            tasks=tasks,
            clock=LoopClock(),
        )

    @property
    def records(self) -> list[RequestRecord]:
        return self.recorder.records

    @property
    def record(self) -> RequestRecord:
        (record,) = self.records
        return record

    @property
    def served(self) -> float:
        """What the tenant without a name was charged."""
        return self.scheduler.counters.counter("anonymous")

    @property
    def leases(self) -> int:
        return len(self.scheduler.ledger)

    def open(self, path: str = "/v1/chat/completions", headers: dict[str, str] | None = None) -> FakeClient:
        """A client whose body has not come yet."""
        client = FakeClient(path, headers or {})
        client.task = self._tasks.create_task(
            self.pipeline.handle(self._endpoints[path], client.scope, client.receive, client.send)
        )
        return client

    async def post(
        self, body: bytes | None = None, *, path: str = "/v1/chat/completions", **headers: str
    ) -> FakeClient:
        """Send a request and let it go as far as it goes."""
        client = self.open(path, {name.replace("_", "-"): value for name, value in headers.items()})
        client.send_body(chat_body(stream=True, max_tokens=8) if body is None else body)
        await settle_down()
        return client


@asynccontextmanager
async def gateway(
    workers: int = 1, *, limits: Limits | None = None, tenants: TenantTable | None = None, **model: Any
) -> AsyncIterator[Gateway]:
    """At its end nothing is left: no request, no lease, no queue, no task; and every record is a partition."""
    async with asyncio.TaskGroup() as tasks:
        it = Gateway(tasks, limits or Limits(), tenants)
        for number in range(workers):
            it.fleet.join(f"worker-{number}", **model)
        yield it
        await settle_down()
        assert it.pipeline.active == 0
    assert it.leases == 0
    assert it.scheduler.queued == 0
    assert it.scheduler.queued_bytes == 0
    assert not any(tenant["running"] for tenant in it.pipeline.tenants_in_use().values())
    for record in it.records:
        assert is_partition(record)
        assert record.total_ns >= 0
        assert record.unattributed_ns == 0 or record.outcome is not Outcome.FINISHED


async def price_of(body: bytes) -> float:
    """What a request is charged whose answer is one token, with nothing in its way."""
    async with gateway(workers=2) as g:
        client = await g.post(body)
        g.fleet.workers["worker-0"].token()
        g.fleet.workers["worker-0"].finish(output_tokens=1)
        await client.task
    return g.served


# ---------------------------------------------------------------- a worker behind a socket

Script = Callable[["ScriptedSession", Submit], Awaitable[None]]


class ScriptedSession:
    """One gateway's session with a ScriptedWorker."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._writing = asyncio.Lock()
        self.submits: list[Submit] = []
        self.cancels: list[int] = []
        self.pings = 0
        self.changed = asyncio.Condition()
        self.closing: asyncio.Future[grpc.StatusCode] = asyncio.get_running_loop().create_future()

    def close(self, code: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        """End the call."""
        self.closing.set_result(code)

    async def say(self, **frame: Any) -> None:
        frame.setdefault("load", Load())
        async with self._writing:
            await self._context.write(EngineFrame(**frame))

    async def start(self, slot: int, *texts: str) -> None:
        stamp = time.monotonic_ns()
        await self.say(
            accepted=[Accepted(slot, stamp)],
            started=[Started(slot, 3, 0, Stamps(stamp, stamp, stamp, stamp, stamp))],
        )
        for text in texts:
            await self.token(slot, text)

    async def token(self, slot: int, text: str) -> None:
        await self.say(deltas=Deltas(slots=[slot], texts=[text], token_counts=[1], token_ids=[1]))

    async def finish(self, slot: int, reason: str = "stop", tokens: int = 1) -> None:
        stamp = time.monotonic_ns()
        await self.say(
            finished=[
                Finished(
                    slot=slot,
                    reasons=(reason,),
                    prompt_tokens=3,
                    cached_tokens=0,
                    output_tokens=tokens,
                    stamps=Stamps(stamp, stamp, stamp, stamp, stamp),
                )
            ]
        )

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(is_true)


class ScriptedWorker:
    """Speaks the Session protocol over a loopback socket and does, per submit, what `script` says."""

    def __init__(self, script: Script | None = None, *, protocol: int = PROTOCOL, **model: Any) -> None:
        self.script = script
        self.protocol = protocol
        self.model = model_info(**model)
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.before_welcome: Callable[[Any], Awaitable[None]] | None = None
        self.is_silent = False
        """Answers no ping, and says nothing else."""
        self.sessions: list[ScriptedSession] = []
        self.port = 0
        self._server: grpc.aio.Server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(
            self._session,
            request_deserializer=wire.decode_gateway_frame,
            response_serializer=wire.encode_engine_frame,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.SERVICE, {"Session": handler}),)
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Close the port. After its gateways: gRPC's stop may hang when one connects again meanwhile."""
        await self._server.stop(None)

    async def _session(self, frames: AsyncIterator[GatewayFrame], context: Any) -> None:
        hello = (await anext(frames)).hello
        assert hello is not None
        if self.refusal is not None:
            await context.abort(*self.refusal)
        if self.before_welcome is not None:
            await self.before_welcome(context)
        session = ScriptedSession(context)
        welcome = Welcome(protocol=self.protocol, worker="scripted", boot_id="1", version="0", model=self.model)
        await session.say(welcome=welcome)
        self.sessions.append(session)
        scripts: set[asyncio.Task[None]] = set()
        reading = asyncio.ensure_future(self._read(session, frames, scripts))
        try:
            await asyncio.wait([reading, session.closing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, *scripts):
                task.cancel()
        if session.closing.done() and session.closing.result() is not grpc.StatusCode.OK:
            await context.abort(session.closing.result(), "bye")

    async def _read(
        self, session: ScriptedSession, frames: AsyncIterator[GatewayFrame], scripts: set[asyncio.Task[None]]
    ) -> None:
        async for frame in frames:
            await self._take(session, frame, scripts)

    async def _take(self, session: ScriptedSession, frame: GatewayFrame, scripts: set[asyncio.Task[None]]) -> None:
        if frame.ping_sent_ns and not self.is_silent:
            session.pings += 1
            await session.say(pong=(frame.ping_sent_ns, time.monotonic_ns()))
        for submit in frame.submits:
            session.submits.append(submit)
            if self.script is not None:
                scripts.add(asyncio.ensure_future(self.script(session, submit)))
        session.cancels.extend(frame.cancels)
        async with session.changed:
            session.changed.notify_all()


@asynccontextmanager
async def scripted_worker(script: Script | None = None, **facts: Any) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker(script, **facts)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


class FakeSink:
    """Notes what a session tells it. Its own stream."""

    def __init__(self) -> None:
        self.stream = self
        self.queued: list[bytes] = []
        self.descriptor = CLOSED
        self.queue: Callable[[bytes], None] = self.queued.append
        self.heard: list[tuple[str, Any]] = []
        self.ended = asyncio.Event()

    @property
    def text(self) -> str:
        return "".join(value for name, value in self.heard if name == "delta")

    @property
    def ends(self) -> list[str]:
        return [name for name, _ in self.heard if name in ("finished", "failed", "lost")]

    def accepted(self, received_ns: int, offset_ns: int) -> None:
        self.heard.append(("accepted", received_ns - offset_ns))

    def started(self, event: Started, offset_ns: int) -> None:
        self.heard.append(("started", event))

    def token(self, text: str, count: int, now_ns: int) -> bytes | None:
        self.heard.append(("delta", text))
        return None

    def delta(self, text: str, token_count: int, choice: int, logprobs: Sequence[Any] | None, now_ns: int) -> None:
        self.heard.append(("delta", text))

    def finished(self, event: Finished, offset_ns: int) -> None:
        self._end("finished", event)

    def failed(self, event: Failed, offset_ns: int) -> None:
        self._end("failed", event)

    def lost(self, reason: str) -> None:
        self._end("lost", reason)

    def _end(self, name: str, value: Any) -> None:
        self.heard.append((name, value))
        self.ended.set()
