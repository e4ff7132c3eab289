"""The workers: one session each, kept open, reported to the scheduler."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence

from gateway import dns
from gateway.breaker import Verdict
from gateway.members import CONFIGURATION, NAME_PREFIX, Members, WorkerList, read_workers
from gateway.scheduler import Scheduler
from gateway.session import WorkerSession
from gateway.upstream import Upstream
from protos.core.clock import Clock
from protos.core.contract import Load, ModelInfo, Welcome
from protos.core.errors import ProtocolMismatch

log = logging.getLogger("tidegate.gateway")

RETIRE_SECONDS = 0.1


class Fleet:
    """Owns the sessions. `on_room` is called when a worker may take more, `on_loss` when one has left.

    `run` keeps one session open to each member. A worker that is no longer one gets no more requests, and its session
    is closed when its running ones have ended.
    """

    def __init__(
        self,
        workers: Sequence[str],
        *,
        gateway: str,
        version: str,
        clock: Clock,
        scheduler: Scheduler,
        resolve: dns.Resolve = dns.resolve,
    ) -> None:
        """`workers` are entries of `gateway.workers`. Raises ConfigError."""
        self._scheduler = scheduler
        self._clock = clock
        self._new_session = functools.partial(
            WorkerSession, gateway=gateway, version=version, clock=clock, listener=self
        )
        self._resolve = resolve
        self.on_room: Callable[[], None] = _nothing
        self.on_loss: Callable[[], None] = _nothing
        self.members = Members()
        """Changed through the methods below."""
        self.sessions: dict[str, WorkerSession] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._retiring: dict[str, asyncio.Task[None]] = {}
        """Wait for what runs on them; may be taken back."""
        self._closing: set[str] = set()
        """Cannot be taken back."""
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._names: tuple[str, ...] = ()
        self._changed = asyncio.Event()
        self.configure(read_workers(workers))

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._reconcile()
            await asyncio.get_running_loop().create_future()

    # -- members

    def configure(self, workers: WorkerList) -> None:
        """What the configuration says now."""
        for name in set(self._names) - set(workers.names):
            self.members.silence(NAME_PREFIX + name)
        self._names = workers.names
        self.members.name(CONFIGURATION, workers.addresses)
        self._reconcile()

    def add(self, address: str) -> None:
        """Connect to a worker, or use it again."""
        self.members.add(address)
        self._reconcile()

    def drain(self, address: str) -> None:
        """Send a worker no more requests; `add` takes it back."""
        self.members.drain(address)
        self._reconcile()

    def remove(self, address: str) -> None:
        """Drain a worker, then forget it."""
        self.members.remove(address)
        self._reconcile()

    def is_leaving(self, address: str) -> bool:
        return address in self._retiring or address in self._closing

    def _reconcile(self) -> None:
        """Make sessions and watches what members say. Nothing runs before `run`."""
        wanted = self.members.wanted
        for address in wanted:
            if address not in self.sessions:
                self.sessions[address] = self._new_session(address)
            elif address in self._retiring:
                self._retiring.pop(address).cancel()
        if self._tasks is not None:
            self._start_and_stop(self._tasks, wanted)
        for address in self.sessions:
            self._mark(address)
        self.on_loss()
        self.on_room()

    def _start_and_stop(self, tasks: asyncio.TaskGroup, wanted: Sequence[str]) -> None:
        for address, session in self.sessions.items():
            if address in self._closing:
                continue
            if address not in self._running:
                self._running[address] = tasks.create_task(session.run())
            if address not in wanted and address not in self._retiring:
                self._retiring[address] = tasks.create_task(self._retire(address))
        for name in set(self._watches) - set(self._names):
            self._watches.pop(name).cancel()
        for name in self._names:
            if name not in self._watches:
                tell = functools.partial(self._found, name)
                self._watches[name] = tasks.create_task(dns.watch(name, tell, self._resolve))

    def _found(self, name: str, addresses: list[str]) -> None:
        if self.members.name(NAME_PREFIX + name, addresses):
            log.info("workers at %s: %s", name, ", ".join(addresses) or "none")
            self._reconcile()

    async def _retire(self, address: str) -> None:
        """Close a session when nothing runs on it; until then the worker may be wanted again."""
        while self._scheduler.ledger.sequences_on(address):  # noqa: ASYNC110 rare, and nobody else must know of it
            await asyncio.sleep(RETIRE_SECONDS)
        del self._retiring[address]
        self._closing.add(address)
        running = self._running.pop(address)
        running.cancel()
        await asyncio.wait([running])
        self.sessions.pop(address).close("no longer a worker of this gateway")
        self._scheduler.worker_forgotten(address)
        self._closing.discard(address)
        self._reconcile()

    def _mark(self, address: str) -> None:
        """Tell the scheduler whether a connected worker may get requests."""
        if self.sessions[address].state == "ready":
            self._scheduler.worker_leaving(address, self.is_leaving(address) or self.members.is_drained(address))

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
        session = self.sessions.get(worker)
        return session if session is not None and session.state == "ready" else None

    def model_of(self, worker: str) -> ModelInfo:
        welcome = self.sessions[worker].welcome
        assert welcome is not None, f"worker {worker} is not connected"
        return welcome.model

    # -- Listener of the sessions

    def worker_ready(self, session: WorkerSession, welcome: Welcome) -> None:
        self._scheduler.worker_joined(
            session.name, welcome.model, boot_id=welcome.boot_id, now_ns=self._clock.mono_ns()
        )
        self._mark(session.name)
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
