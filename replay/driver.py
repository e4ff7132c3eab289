"""The shell around a pacer: one loop that sends what is due and hands on each result as it ends."""

from __future__ import annotations

import asyncio
import secrets
import time
import urllib.parse
from collections.abc import Callable, Sequence

import msgspec

from protos.core.telemetry import PRIORITY, REPLAY_OF, SESSION, TENANT, TIMING, TRACEPARENT
from replay.body import encode_body
from replay.client import Client, Exchange
from replay.pacer import Due, Pacer
from replay.progress import Progress
from replay.result import Result, result_of
from replay.workload import WorkloadRequest

TICK_S = 0.02
STALL_NS = 10_000_000


class Stalls(msgspec.Struct):
    """How late the loop itself was. Only ticks later than STALL_NS count."""

    stalled_ns: int = 0
    longest_ns: int = 0

    def add(self, late_ns: int) -> None:
        if late_ns > STALL_NS:
            self.stalled_ns += late_ns
            self.longest_ns = max(self.longest_ns, late_ns)


class Driver:
    """Sends a workload. `on_result` is called once per request that was sent, in the order in which they end."""

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        pacer: Pacer,
        client: Client,
        *,
        model_of: Callable[[str], str],
        api_key: str,
        is_length_pinned: bool,
        salt: str,
        on_result: Callable[[Result], None],
    ) -> None:
        self.progress = Progress(len(requests))
        self.stalls = Stalls()
        self.is_interrupted = False
        self._requests = requests
        self._pacer = pacer
        self._client = client
        self._model_of = model_of
        self._api_key = api_key
        self._is_length_pinned = is_length_pinned
        self._salt = salt
        self._on_result = on_result
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._start_ns = 0

    def interrupt(self) -> None:
        """Send no more and drop what is under way; `run` then returns."""
        self.is_interrupted = True
        self._wake.set()

    async def run(self) -> None:
        self._start_ns = time.monotonic_ns()
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch_loop())
            await self._send_all(tasks)
            if self.is_interrupted:
                for task in self._running:
                    task.cancel()
            while self._running:
                await asyncio.wait(self._running)
            watch.cancel()

    async def _send_all(self, tasks: asyncio.TaskGroup) -> None:
        while not self.is_interrupted:
            self._wake.clear()
            decision = self._pacer.decide(self._now_ns())
            for due in decision.due:
                task = tasks.create_task(self._replay(due))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            if decision.is_over:
                await self._until_interrupted_or_idle()
                return
            await self._sleep_until(decision.wait_until_ns)

    async def _until_interrupted_or_idle(self) -> None:
        while self._running and not self.is_interrupted:
            self._wake.clear()
            await self._wake.wait()

    async def _sleep_until(self, deadline_ns: int | None) -> None:
        try:
            async with asyncio.timeout(None if deadline_ns is None else max(0, deadline_ns - self._now_ns()) / 1e9):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _replay(self, due: Due) -> None:
        request = self._requests[due.index]
        started_ns = self._now_ns()
        self.progress.add_sent(started_ns - due.intended_ns)
        trace_id = secrets.token_hex(16)
        try:
            exchange = await self._exchange(request, trace_id)
        except asyncio.CancelledError:
            # The run is being stopped: what was under way is a result too, and the last thing that this task does.
            exchange = Exchange(error_kind="interrupted", done_ns=time.monotonic_ns())
        result = result_of(due, request, exchange, start_ns=self._start_ns, started_ns=started_ns, trace_id=trace_id)
        self._pacer.ended(due.index, result.done_ns)
        self.progress.add_result(result)
        self._on_result(result)
        self._running.discard(_own_task())
        self._wake.set()

    async def _exchange(self, request: WorkloadRequest, trace_id: str) -> Exchange:
        body = encode_body(
            request, self._model_of(request.model), is_length_pinned=self._is_length_pinned, salt=self._salt
        )
        cancel_after_s = None if request.cancel_after_ns is None else request.cancel_after_ns / 1e9
        return await self._client.post(
            request.endpoint, headers_of(request, trace_id, self._api_key), body, cancel_after_s=cancel_after_s
        )

    async def _watch_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(TICK_S)
            self.stalls.add(int((loop.time() - before - TICK_S) * 1e9))

    def _now_ns(self) -> int:
        return time.monotonic_ns() - self._start_ns


def _own_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


def headers_of(request: WorkloadRequest, trace_id: str, api_key: str) -> dict[str, str]:
    """Names and values fit for an HTTP head, whatever the capture holds."""
    headers = {
        TIMING: "1",
        TRACEPARENT: f"00-{trace_id}-{secrets.token_hex(8)}-01",
        SESSION: _header_value(request.session),
    }
    if request.recorded is not None and request.recorded.traceparent:
        headers[REPLAY_OF] = _header_value(request.recorded.traceparent)
    if request.tenant and request.tenant != "anonymous":
        headers[TENANT] = _header_value(request.tenant)
    if request.priority and request.priority != "standard":
        headers[PRIORITY] = _header_value(request.priority)
    if api_key:
        headers["authorization"] = f"Bearer {_header_value(api_key)}"
    return headers


def _header_value(value: str) -> str:
    """Printable ASCII stays; the rest is percent-encoded, so that no value can end its line."""
    return value if value.isascii() and value.isprintable() else urllib.parse.quote(value)
