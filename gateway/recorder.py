"""Where a settled request goes: one record, three views (metrics, capture, traces). Nothing here holds up a request.

Requests wait for each other for BATCH_SECONDS: the records of several, made one after another, cost a fraction of what
each costs between the tokens of others, where nothing that it needs is in the processor's cache.
"""

from __future__ import annotations

import asyncio
import collections

from gateway.exchange import Exchange
from gateway.metrics import Metrics
from gateway.tracing import TraceWriter
from protos.core.capture import CaptureItem, CaptureWriter
from protos.core.journal import JournalStats

BATCH_SECONDS = 0.1
BATCH_REQUESTS = 64


class Recorder:
    """`keeps_output`: the capture wants the text that clients got."""

    def __init__(self, metrics: Metrics, capture: CaptureWriter | None, traces: TraceWriter | None) -> None:
        self._metrics = metrics
        self._capture = capture
        self._traces = traces
        self._settled: collections.deque[Exchange] = collections.deque()
        self._timer: asyncio.TimerHandle | None = None
        self.keeps_output = capture is not None and capture.level == "full"

    def settle(self, exchange: Exchange) -> None:
        """Record a request to which nothing happens any more, soon."""
        self._settled.append(exchange)
        if len(self._settled) >= BATCH_REQUESTS:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(BATCH_SECONDS, self.flush)

    def flush(self) -> None:
        """Record what waits: before anybody looks, and before the end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._settled:
            self._record(self._settled.popleft())

    def _record(self, exchange: Exchange) -> None:
        record = exchange.record()
        is_traced = self._traces is not None and self._traces.offer(record)
        self._metrics.observe(record, is_traced=is_traced)
        if self._capture is not None:
            call = exchange.call
            item = CaptureItem(
                record,
                exchange.body if self._capture.level == "full" else b"",
                call.prompt_bytes if call else b"",
                call.sampling if call else None,
                tuple(choice.text for choice in exchange.choices) if self.keeps_output else (),
            )
            self._capture.offer(item, len(item.body) + len(item.prompt) + 1024)

    def capture_stats(self) -> JournalStats | None:
        return self._capture.stats() if self._capture is not None else None

    def trace_counts(self) -> tuple[int, int]:
        """(exported, dropped) traces."""
        return (self._traces.exported, self._traces.dropped) if self._traces is not None else (0, 0)
