"""Where a settled request goes: one record, three views (metrics, capture, traces). Nothing here holds up a request."""

from __future__ import annotations

from gateway.exchange import Exchange
from gateway.metrics import Metrics
from gateway.tracing import TraceWriter
from protos.core.capture import CaptureItem, CaptureWriter
from protos.core.journal import JournalStats


class Recorder:
    """`keeps_output`: the capture wants the text that clients got."""

    def __init__(self, metrics: Metrics, capture: CaptureWriter | None, traces: TraceWriter | None) -> None:
        self._metrics = metrics
        self._capture = capture
        self._traces = traces
        self.keeps_output = capture is not None and capture.level == "full"

    def settle(self, exchange: Exchange) -> None:
        record = exchange.record()
        self._metrics.observe(record)
        if self._traces is not None:
            self._traces.offer(record)
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
