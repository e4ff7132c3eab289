"""The workers: one session each, kept open, reported to the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gateway.breaker import Verdict
from gateway.scheduler import Scheduler
from gateway.session import WorkerSession
from gateway.upstream import Upstream
from protos.core.clock import Clock
from protos.core.contract import Load, ModelInfo, Welcome
from protos.core.errors import ProtocolMismatch


class Fleet:
    """Owns the sessions. `on_room` is called when a worker may take more, `on_loss` when one has left."""

    def __init__(
        self, addresses: Sequence[str], *, gateway: str, version: str, clock: Clock, scheduler: Scheduler
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self.on_room: Callable[[], None] = _nothing
        self.on_loss: Callable[[], None] = _nothing
        self.sessions = {
            address: WorkerSession(address, gateway=gateway, version=version, clock=clock, listener=self)
            for address in addresses
        }
        self._changed = asyncio.Event()

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        return [tasks.create_task(session.run()) for session in self.sessions.values()]

    @property
    def is_ready(self) -> bool:
        return bool(self._scheduler.workers)

    def mismatch(self) -> ProtocolMismatch | None:
        """Why no worker can ever be used: all of them speak another protocol."""
        mismatches = [session.mismatch for session in self.sessions.values()]
        return mismatches[0] if mismatches and all(mismatches) else None

    async def first_answer(self) -> None:
        """Wait until a worker is ready, or all have refused."""
        while not self.is_ready and self.mismatch() is None:
            self._changed.clear()
            await self._changed.wait()

    def upstream(self, worker: str) -> Upstream | None:
        """The connected worker, or None when it has left."""
        session = self.sessions[worker]
        return session if session.state == "ready" else None

    def model_of(self, worker: str) -> ModelInfo:
        welcome = self.sessions[worker].welcome
        assert welcome is not None, f"worker {worker} is not connected"
        return welcome.model

    # -- Listener of the sessions

    def worker_ready(self, session: WorkerSession, welcome: Welcome) -> None:
        self._scheduler.worker_joined(
            session.name, welcome.model, boot_id=welcome.boot_id, now_ns=self._clock.mono_ns()
        )
        self._changed.set()
        self.on_room()

    def worker_reported(self, session: WorkerSession, load: Load, is_draining: bool) -> None:
        self._scheduler.worker_reported(session.name, load, is_draining)

    def worker_stepped(self, session: WorkerSession, now_ns: int) -> None:
        self._scheduler.stepped(session.name, now_ns)
        if self._scheduler.queued:
            self.on_room()

    def worker_lost(self, session: WorkerSession, reason: str) -> None:
        worker = self._scheduler.worker_left(session.name)
        if not worker.is_draining:
            self._scheduler.attempt_ended(session.name, Verdict.FAILURE, self._clock.mono_ns())
        self.on_loss()

    def worker_refused(self, session: WorkerSession) -> None:
        self._changed.set()


def _nothing() -> None:
    pass
