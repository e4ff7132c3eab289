"""One worker's session: a multiplexed gRPC stream, kept open, its events handed to the sinks of its slots."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any, Literal, Protocol

import grpc
import grpc.aio

from gateway.heartbeat import Silence
from gateway.offset import ClockOffset
from gateway.stream import write
from gateway.upstream import Sink, Tokens
from protos.core import wire
from protos.core.clock import Clock
from protos.core.contract import (
    PROTOCOL,
    Deltas,
    EngineFrame,
    GatewayFrame,
    Hello,
    Load,
    Prompt,
    Sampling,
    Submit,
    Welcome,
)
from protos.core.errors import ProtocolMismatch

log = logging.getLogger("tidegate.gateway")

PING_SECONDS = 0.5
SILENCE_NS = 4_000_000_000
"""A worker says something every second, idle or not; after this long without a frame it hangs: `gateway.heartbeat`."""
BACKOFF_SECONDS = (0.1, 5.0)
MISMATCH_SECONDS = 30.0

State = Literal["connecting", "ready", "refused"]


class Listener(Protocol):
    """Who wants to know about a worker; synchronous, on the event loop."""

    def worker_ready(self, session: WorkerSession, welcome: Welcome) -> None: ...

    def worker_reported(self, session: WorkerSession, load: Load, is_draining: bool) -> None: ...

    def worker_stepped(self, session: WorkerSession, now_ns: int) -> None:
        """A step of the engine has ended; its tokens and its load are passed on already."""

    def worker_lost(self, session: WorkerSession, reason: str) -> None:
        """Called before the sinks of its slots hear `lost`."""

    def worker_refused(self, session: WorkerSession) -> None:
        """It speaks another version of the protocol."""


class WorkerSession:
    """An Upstream over gRPC. `run` connects, and connects again, until it is cancelled."""

    def __init__(self, address: str, *, gateway: str, version: str, clock: Clock, listener: Listener) -> None:
        self.address = address
        self.state: State = "connecting"
        self.mismatch: ProtocolMismatch | None = None
        self.welcome: Welcome | None = None
        self.load = Load()
        self.last_error = ""
        self._hello = Hello(PROTOCOL, gateway, version)
        self._clock = clock
        self._listener = listener
        self._offset = ClockOffset()
        self._sinks: dict[int, Sink] = {}
        self._streams: dict[int, Tokens] = {}
        """Of the sinks."""
        self._token_ids: dict[int, list[int]] = {}
        """Output tokens of the slots that may be resumed elsewhere: nobody else needs them."""
        self._next_slot = 1
        self._submits: list[Submit] = []
        self._cancels: list[int] = []
        self._is_ping_due = False
        self._has_output = asyncio.Event()
        self._heard_ns = 0

    @property
    def name(self) -> str:
        """The address: two workers may call themselves the same."""
        return self.address

    @property
    def open_slots(self) -> int:
        return len(self._sinks)

    # -- Upstream

    def submit(
        self,
        sink: Sink,
        *,
        request_id: str,
        prompt: Prompt,
        sampling: Sampling,
        model: str,
        traceparent: str,
        priority: int = 0,
        step_tokens: int = 0,
        token_ids: list[int] | None = None,
    ) -> int:
        slot = self._next_slot
        self._next_slot += 1
        self._sinks[slot] = sink
        self._streams[slot] = sink.stream
        if token_ids is not None:
            self._token_ids[slot] = token_ids
        self._submits.append(
            Submit(
                slot=slot,
                request_id=request_id,
                prompt=prompt,
                sampling=sampling,
                model=model,
                traceparent=traceparent,
                priority=priority,
                step_tokens=step_tokens,
                resumed_token_ids=tuple(token_ids or ()),
            )
        )
        self._has_output.set()
        return slot

    def redirect(self, slot: int, sink: Sink, token_ids: list[int] | None = None) -> None:
        if slot not in self._sinks:
            return
        self._sinks[slot] = sink
        self._streams[slot] = sink.stream
        self._token_ids.pop(slot, None)
        if token_ids is not None:
            self._token_ids[slot] = token_ids

    def cancel(self, slot: int) -> None:
        if slot in self._sinks:
            self._cancels.append(slot)
            self._has_output.set()

    # -- connection

    async def run(self) -> None:
        """Keep the session open. Backs off with jitter between attempts."""
        backoff_s = BACKOFF_SECONDS[0]
        async with asyncio.TaskGroup() as tasks:
            while True:
                # As a task that is waited for, not awaited: Python 3.11's TaskGroup drops a cancellation that meets a
                # failing child, so a cancelled conversation may return as if it had only failed.
                conversation = tasks.create_task(self._connect_once())
                await asyncio.wait([conversation])
                was_ready = self._end(conversation.result())
                if was_ready:
                    backoff_s = BACKOFF_SECONDS[0]
                wait_s = MISMATCH_SECONDS if self.mismatch else backoff_s
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
                backoff_s = min(backoff_s * 2, BACKOFF_SECONDS[1])

    def close(self, reason: str) -> None:
        """Nobody wants the worker any more. Call it when `run` has been cancelled and has ended."""
        self._end(reason)

    async def _connect_once(self) -> str:
        """One session from connect to loss; returns why it ended."""
        self.mismatch = None
        async with grpc.aio.insecure_channel(self.address, options=wire.CHANNEL_OPTIONS) as channel:
            call = channel.stream_stream(
                wire.SESSION_METHOD,
                request_serializer=wire.encode_gateway_frame,
                response_deserializer=wire.decode_engine_frame,
            )()
            try:
                await self._converse(call)
            except Exception as error:
                return await self._explain(_first(error), call)
            finally:
                call.cancel()
        raise AssertionError("a session ends with an exception")

    async def _converse(self, call: Any) -> None:
        async with asyncio.timeout(SILENCE_NS / 1e9):
            await self._greet(call)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(call))
            tasks.create_task(self._watch())
            tasks.create_task(self._read(call))

    async def _greet(self, call: Any) -> None:
        """Hello and Welcome, then the first ping and pong: without it the worker's stamps mean nothing here."""
        await call.write(GatewayFrame(hello=self._hello))
        welcome = (await _next_frame(call)).welcome
        if welcome is None or welcome.protocol != PROTOCOL:
            raise ProtocolMismatch.between(worker=welcome.protocol if welcome else 0, gateway=PROTOCOL)
        self._offset = ClockOffset()
        await call.write(GatewayFrame(ping_sent_ns=self._clock.mono_ns()))
        while not self._offset.is_known:
            self._take_pong(await _next_frame(call))
        self._heard_ns = self._clock.mono_ns()
        self.welcome = welcome
        self.state = "ready"
        self.last_error = ""
        log.info("worker %s: ready, %s on %s", self.address, welcome.model.names[0], welcome.model.backend)
        self._listener.worker_ready(self, welcome)

    async def _read(self, call: Any) -> None:
        while True:
            self._take(await _next_frame(call))

    async def _write(self, call: Any) -> None:
        """The only writer once the session is ready: gRPC allows one write at a time."""
        while True:
            await self._has_output.wait()
            self._has_output.clear()
            submits, self._submits = self._submits, []
            cancels, self._cancels = self._cancels, []
            ping_sent_ns = self._clock.mono_ns() if self._is_ping_due else 0
            self._is_ping_due = False
            await call.write(GatewayFrame(submits=submits, cancels=cancels, ping_sent_ns=ping_sent_ns))

    async def _watch(self) -> None:
        """Ping, and notice a worker that hangs without closing."""
        silence = Silence(int(PING_SECONDS * 1e9), self._clock.mono_ns())
        while True:
            await asyncio.sleep(PING_SECONDS)
            silent_ns = silence.tick(self._clock.mono_ns(), self._heard_ns)
            if silent_ns > SILENCE_NS:
                raise TimeoutError(f"silent for {silent_ns / 1e9:.0f} s")
            self._is_ping_due = True
            self._has_output.set()

    # -- events

    def _take(self, frame: EngineFrame) -> None:
        """One engine step, handed to its sinks. The hot path of the gateway."""
        now_ns = self._clock.mono_ns()
        self._heard_ns = now_ns
        sinks = self._sinks
        offset_ns = self._offset.offset_ns
        for accepted in frame.accepted:
            if sink := sinks.get(accepted.slot):
                sink.accepted(accepted.received_ns, offset_ns)
        for started in frame.started:
            if sink := sinks.get(started.slot):
                sink.started(started, offset_ns)
        if frame.deltas is not None:
            self._take_deltas(frame.deltas, now_ns)
            if self._token_ids:
                self._keep_token_ids(frame.deltas)
        for finished in frame.finished:
            if sink := self._close(finished.slot):
                sink.finished(finished, offset_ns)
        for failed in frame.failed:
            if sink := self._close(failed.slot):
                sink.failed(failed, offset_ns)
        self._take_pong(frame)
        if frame.load is not None:
            self.load = frame.load
            self._listener.worker_reported(self, frame.load, frame.draining)
        if frame.deltas is not None:
            self._listener.worker_stepped(self, now_ns)

    def _close(self, slot: int) -> Sink | None:
        self._streams.pop(slot, None)
        self._token_ids.pop(slot, None)
        return self._sinks.pop(slot, None)

    def _take_deltas(self, deltas: Deltas, now_ns: int) -> None:
        sinks = self._sinks
        if deltas.choices or deltas.logprobs:
            choices = deltas.choices or [0] * len(deltas.slots)
            rows = zip(deltas.slots, deltas.texts, deltas.token_counts, choices, strict=True)
            for row, (slot, text, count, choice) in enumerate(rows):
                if sink := sinks.get(slot):
                    sink.delta(text, count, choice, deltas.logprobs.get(row), now_ns)
            return
        streams = self._streams
        writers: list[Tokens] = []
        chunks: list[bytes] = []
        try:
            for slot, text, count in zip(deltas.slots, deltas.texts, deltas.token_counts, strict=True):
                if (stream := streams.get(slot)) and (chunk := stream.token(text, count, now_ns)):
                    writers.append(stream)
                    chunks.append(chunk)
        finally:  # a bug costs the session, and nobody the text that has been counted
            write(writers, chunks)

    def _keep_token_ids(self, deltas: Deltas) -> None:
        at = 0
        for slot, count in zip(deltas.slots, deltas.token_counts, strict=True):
            if (token_ids := self._token_ids.get(slot)) is not None:
                token_ids.extend(deltas.token_ids[at : at + count])
            at += count

    def _take_pong(self, frame: EngineFrame) -> None:
        if frame.pong is not None:
            sent_ns, received_ns = frame.pong
            self._offset.add(sent_ns, received_ns, self._clock.mono_ns())

    def _end(self, reason: str) -> bool:
        """The session is over: fail every slot exactly once. Returns whether it was ready.

        New submits are impossible: the listener forgets this worker first.
        """
        was_ready = self.state == "ready"
        self.state = "refused" if self.mismatch else "connecting"
        if reason != self.last_error or was_ready:
            running = f"; {len(self._sinks)} requests were running" if self._sinks else ""
            log.warning("worker %s: %s%s", self.address, reason, running)
            self.last_error = reason
        if self.welcome is not None:
            self.welcome = None
            self._listener.worker_lost(self, reason)
        self._submits.clear()
        self._cancels.clear()
        self._has_output.clear()
        self._token_ids.clear()
        self._streams.clear()
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.lost(reason)
        if self.mismatch:
            self._listener.worker_refused(self)
        return was_ready

    async def _explain(self, error: Exception, call: Any) -> str:
        """Why the session ended, in one line. A bug ends the session, not the gateway."""
        match error:
            case ProtocolMismatch():
                self.mismatch = error
                return str(error)
            case TimeoutError():
                return str(error) or "does not answer"
            case grpc.aio.AioRpcError() | asyncio.InvalidStateError() | EOFError():
                # A write on a call that has ended says only that it is over; the call's status says why.
                return self._explain_status(await call.code(), await call.details() or "")
            case _:
                log.error("worker %s: bug in its session", self.address, exc_info=error)
                return f"session ended by a bug: {error!r}"

    def _explain_status(self, code: grpc.StatusCode, details: str) -> str:
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            self.mismatch = ProtocolMismatch(details)
            return details
        if code is grpc.StatusCode.UNAVAILABLE and self.state != "ready":
            # Either nobody listens, and the details are gRPC's own, or the worker says that it is not ready yet.
            return "cannot be reached" if "connect" in details.lower() else details
        return f"session ended: {code.name.lower()} {details}".rstrip()


def _first(error: Exception) -> Exception:
    """The error that ended a task group: the first of the group, which ended the others."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


async def _next_frame(call: Any) -> EngineFrame:
    frame = await call.read()
    if frame is grpc.aio.EOF:
        raise EOFError("closed by the worker")
    assert isinstance(frame, EngineFrame)
    return frame
