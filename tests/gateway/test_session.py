"""A session against a scripted worker behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from gateway import session as session_module
from gateway.session import WorkerSession
from protos.core.clock import SYSTEM_CLOCK
from protos.core.contract import PROTOCOL, Deltas, Load, Sampling, Started, Submit, TextPrompt, Welcome
from protos.core.errors import ProtocolMismatch
from tests.gateway.fakes import FakeSink, ScriptedSession, ScriptedWorker, scripted_worker


class FakeListener:
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.loads: list[Load] = []
        self.is_draining = False
        self.steps = 0
        self.changed = asyncio.Condition()

    async def until(self, event: str, times: int = 1) -> None:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: self.heard.count(event) >= times)

    def _hear(self, event: str) -> None:
        self.heard.append(event)
        self._notified = asyncio.ensure_future(self._notify())

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def worker_ready(self, session: WorkerSession, welcome: Welcome) -> None:
        self._hear("ready")

    def worker_stepped(self, session: WorkerSession, now_ns: int) -> None:
        self.steps += 1

    def worker_reported(self, session: WorkerSession, load: Load, is_draining: bool) -> None:
        self.loads.append(load)
        self.is_draining = is_draining

    def worker_lost(self, session: WorkerSession, reason: str) -> None:
        assert session.open_slots == 0 or session.state != "ready", "no submit may follow"
        self._hear("lost")

    def worker_refused(self, session: WorkerSession) -> None:
        self._hear("refused")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PING_SECONDS", 0.05)
    monkeypatch.setattr(session_module, "BACKOFF_SECONDS", (0.02, 0.1))


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[WorkerSession, FakeListener, asyncio.Task[None]]]:
    listener = FakeListener()
    session = WorkerSession(address, gateway="test", version="0", clock=SYSTEM_CLOCK, listener=listener)
    task = asyncio.ensure_future(session.run())
    try:
        yield session, listener, task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def submit(session: WorkerSession, sink: FakeSink, text: str = "hi", token_ids: list[int] | None = None) -> int:
    return session.submit(
        sink,
        request_id="r",
        prompt=TextPrompt(text),
        sampling=Sampling(),
        model="tide-1",
        traceparent="",
        token_ids=token_ids,
    )


async def eventually(is_true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not is_true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def echo(session: ScriptedSession, it: Submit) -> None:
    assert isinstance(it.prompt, TextPrompt)
    await session.start(it.slot, *it.prompt.text)
    await session.finish(it.slot)


async def say_nothing(session: ScriptedSession, it: Submit) -> None:
    pass


async def test_many_requests_share_one_session() -> None:
    async with scripted_worker(echo) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        sinks = [FakeSink() for _ in range(20)]
        for number, sink in enumerate(sinks):
            submit(session, sink, f"text {number}")
        for sink in sinks:
            await asyncio.wait_for(sink.ended.wait(), 10)
        assert [sink.text for sink in sinks] == [f"text {number}" for number in range(20)]
        assert all(sink.ends == ["finished"] for sink in sinks)
        assert session.open_slots == 0
        assert len(worker.sessions) == 1


async def test_slot_is_heard_by_whom_it_was_redirected_to() -> None:
    """From the middle of a frame on; what is kept of its tokens is the new one's."""

    async def say_words(session: ScriptedSession, it: Submit) -> None:
        await session.start(it.slot, "a", "b")
        await session.finish(it.slot)

    class Handing(FakeSink):
        def started(self, event: Started, offset_ns: int) -> None:
            super().started(event, offset_ns)
            session.redirect(event.slot, second, kept)

    async with scripted_worker(say_words) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        first, second = Handing(), FakeSink()
        dropped: list[int] = []
        kept: list[int] = []
        slot = submit(session, first, token_ids=dropped)
        await asyncio.wait_for(second.ended.wait(), 10)
        assert [name for name, _ in first.heard] == ["accepted", "started"]
        assert (second.text, second.ends) == ("ab", ["finished"])
        assert (dropped, len(kept)) == ([], 2)
        session.redirect(slot, first, dropped)
        assert session.open_slots == 0, "its end has come"


async def test_token_ids_are_kept_where_they_are_asked_for() -> None:
    """Of rows with several tokens too, and between rows of others; what is resumed goes out with its own."""

    async def say_rows(session: ScriptedSession, it: Submit) -> None:
        if it.slot == 1:
            return
        first, second = 1, it.slot
        await session.start(first)
        await session.start(second)
        await session.say(
            deltas=Deltas(
                slots=[first, second, first], texts=["a", "b", "c"], token_counts=[2, 1, 1], token_ids=[1, 2, 8, 3]
            )
        )
        await session.finish(first)
        await session.finish(second)

    async with scripted_worker(say_rows) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        kept, plain = FakeSink(), FakeSink()
        token_ids = [7]
        submit(session, kept, token_ids=token_ids)
        submit(session, plain)
        await asyncio.wait_for(plain.ended.wait(), 10)
        assert token_ids == [7, 1, 2, 3]
        assert [it.resumed_token_ids for it in worker.sessions[0].submits] == [(7,), ()]
        assert session._token_ids == {}


async def test_session_is_ready_only_when_the_clock_offset_is_known() -> None:
    async with scripted_worker() as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        assert session._offset.is_known
        assert worker.sessions[0].pings >= 1
        assert session.state == "ready"


async def test_cancel_reaches_the_worker_and_unknown_slots_are_ignored() -> None:
    async with scripted_worker(say_nothing) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        sink = FakeSink()
        slot = submit(session, sink)
        session.cancel(slot)
        session.cancel(999)
        peer = worker.sessions[0]
        await asyncio.wait_for(peer.until(lambda: bool(peer.cancels)), 5)
        assert peer.cancels == [slot]
        await peer.finish(slot, "cancelled")
        await asyncio.wait_for(sink.ended.wait(), 5)
        session.cancel(slot)
        assert sink.ends == ["finished"]


async def test_load_and_draining_are_reported() -> None:
    async with scripted_worker() as worker, connected(worker.address) as (_, listener, _task):
        await listener.until("ready")
        await worker.sessions[0].say(load=Load(running=3, waiting=2), draining=True)
        await eventually(lambda: listener.is_draining)
        assert Load(running=3, waiting=2) in listener.loads


async def test_dropped_session_fails_every_slot_once_and_reconnects() -> None:
    async with scripted_worker(say_nothing) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        sinks = [FakeSink() for _ in range(5)]
        for sink in sinks:
            submit(session, sink)
        peer = worker.sessions[0]
        await asyncio.wait_for(peer.until(lambda: len(peer.submits) == 5), 5)
        worker.script = echo
        peer.close(grpc.StatusCode.UNAVAILABLE)
        await listener.until("ready", 2)
        assert all(sink.ends == ["lost"] for sink in sinks)
        sink = FakeSink()
        assert submit(session, sink, "back") == 6, "slots are never used again"
        await asyncio.wait_for(sink.ended.wait(), 5)
        assert sink.text == "back"
        assert all(sink.ends == ["lost"] for sink in sinks)
        assert listener.heard == ["ready", "lost", "ready"]


async def test_gateway_waits_for_a_worker_that_is_not_there_yet() -> None:
    worker = ScriptedWorker()
    await worker.start()
    await worker.stop()
    late = ScriptedWorker()
    late.port = worker.port
    async with connected(worker.address) as (session, listener, _):
        await eventually(lambda: session.last_error)
        assert session.state == "connecting"
        await late.start()
        await listener.until("ready")
    await late.stop()


async def test_silent_worker_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SILENCE_NS", 400_000_000)
    async with scripted_worker(say_nothing) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        sink = FakeSink()
        submit(session, sink)
        worker.is_silent = True
        await listener.until("lost")
        assert sink.ends == ["lost"]
        assert "silent" in session.last_error
        worker.is_silent = False
        await listener.until("ready", 2)


async def test_worker_that_accepts_and_says_nothing_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SILENCE_NS", 200_000_000)
    worker = ScriptedWorker()

    async def hang(_: Any) -> None:
        await asyncio.sleep(30)

    worker.before_welcome = hang
    await worker.start()
    async with connected(worker.address) as (session, listener, task):
        await eventually(lambda: session.last_error)
        assert session.last_error == "does not answer"
        assert listener.heard == []
        worker.before_welcome = None
        await listener.until("ready")
        assert not task.done()
    await worker.stop()


async def test_worker_that_refuses_our_protocol_is_refused() -> None:
    worker = ScriptedWorker()
    mismatch = str(ProtocolMismatch.between(worker=PROTOCOL + 1, gateway=PROTOCOL))
    worker.refusal = (grpc.StatusCode.FAILED_PRECONDITION, mismatch)
    await worker.start()
    async with connected(worker.address) as (session, listener, task):
        await listener.until("refused")
        assert session.state == "refused"
        assert str(session.mismatch) == mismatch
        assert not task.done()
    await worker.stop()


async def test_welcome_of_another_protocol_is_refused() -> None:
    async with (
        scripted_worker(protocol=PROTOCOL + 1) as worker,
        connected(worker.address) as (session, listener, task),
    ):
        await listener.until("refused")
        assert "upgrade the gateway" in str(session.mismatch)
        assert listener.heard == ["refused"]
        assert not task.done()


async def test_upgraded_worker_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MISMATCH_SECONDS", 0.05)
    async with scripted_worker(protocol=PROTOCOL + 1) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("refused")
        worker.protocol = PROTOCOL
        await listener.until("ready")
        assert session.mismatch is None


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN]
)
async def test_no_refusal_ends_the_session_for_good(code: grpc.StatusCode) -> None:
    """A worker that is loading its model, stopping, or broken: it is tried again."""
    worker = ScriptedWorker()
    worker.refusal = (code, "not now")
    await worker.start()
    async with connected(worker.address) as (session, listener, task):
        await eventually(lambda: session.last_error)
        assert not task.done()
        worker.refusal = None
        await listener.until("ready")
    await worker.stop()


async def test_worker_that_closes_before_its_welcome_is_tried_again() -> None:
    worker = ScriptedWorker()
    closed = 0

    class Closing(Exception):
        pass

    async def close(context: Any) -> None:
        nonlocal closed
        closed += 1
        if closed < 3:
            raise Closing

    worker.before_welcome = close
    handle = worker._session

    async def session_of(frames: Any, context: Any) -> None:
        with contextlib.suppress(Closing):
            await handle(frames, context)  # returning closes the call with OK

    worker._session = session_of  # type: ignore[method-assign]
    await worker.start()
    async with connected(worker.address) as (_, listener, task):
        await listener.until("ready")
        assert closed == 3
        assert not task.done()
    await worker.stop()


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
async def test_worker_that_closes_gracefully_fails_its_slots_at_once(code: grpc.StatusCode) -> None:
    async def close(session: ScriptedSession, it: Submit) -> None:
        session.close(code)

    worker = ScriptedWorker(close)
    await worker.start()
    async with connected(worker.address) as (session, listener, task):
        await listener.until("ready")
        sink = FakeSink()
        submit(session, sink)
        await asyncio.wait_for(sink.ended.wait(), 5)
        assert sink.ends == ["lost"]
        worker.script = echo
        await listener.until("ready", 2)
        assert not task.done()
    await worker.stop()


async def test_frame_that_breaks_the_contract_ends_its_session_only(caplog: pytest.LogCaptureFixture) -> None:
    """Columns of different lengths: a worker's bug costs its own streams, not the gateway."""
    async with scripted_worker(say_nothing) as worker, connected(worker.address) as (session, listener, task):
        await listener.until("ready")
        sink = FakeSink()
        slot = submit(session, sink)
        await worker.sessions[0].say(deltas=Deltas(slots=[slot], texts=[], token_counts=[1]))
        await asyncio.wait_for(sink.ended.wait(), 5)
        assert sink.ends == ["lost"]
        await listener.until("ready", 2)
        assert not task.done()
        assert any(record.exc_info for record in caplog.records), "a bug is loud"


async def test_events_of_unknown_slots_are_ignored() -> None:
    async with scripted_worker(echo) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        await worker.sessions[0].start(77, "ghost")
        await worker.sessions[0].finish(77)
        sink = FakeSink()
        submit(session, sink, "real")
        await asyncio.wait_for(sink.ended.wait(), 5)
        assert sink.text == "real"


async def test_stamps_are_told_with_the_offset_of_the_workers_clock() -> None:
    async with scripted_worker(echo) as worker, connected(worker.address) as (session, listener, _):
        await listener.until("ready")
        before_ns = SYSTEM_CLOCK.mono_ns()
        sink = FakeSink()
        submit(session, sink)
        await asyncio.wait_for(sink.ended.wait(), 5)
        accepted_ns = next(value for name, value in sink.heard if name == "accepted")
        slack_ns = session._offset.round_trip_ns
        assert before_ns - slack_ns <= accepted_ns <= SYSTEM_CLOCK.mono_ns() + slack_ns
