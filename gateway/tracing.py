"""Traces: the record of a request as OpenTelemetry spans, built and exported off the request path.

    POST /v1/chat/completions      SERVER    tidegate-gateway
      receive | admit | queue | route        INTERNAL
      attempt                      CLIENT    one per try; the last one carries gen_ai.*
        generate                   SERVER    tidegate-engine
          input | queue | prefill | decode   INTERNAL
      deliver                      INTERNAL

Jaeger's critical path ignores children that touch: spans start on whole microseconds, and each phase ends one
microsecond before the next starts.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from gateway.identity import new_id
from gateway.sampling import TailSampler
from protos.core import telemetry
from protos.core.clock import Clock
from protos.core.record import Attempt, Outcome, RequestRecord

log = logging.getLogger("tidegate.gateway")

FLUSH_SECONDS = 0.5
MAX_QUEUED = 10_000
MAX_BATCH = 256
_US = 1_000
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_GATEWAY_PHASES = ("receive", "admit", "queue", "route")
_ENGINE_PHASES = tuple(telemetry.ENGINE_SPANS)


class Exporter(Protocol):
    """The part of OpenTelemetry's SpanExporter that is used."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult: ...

    def shutdown(self) -> None: ...


class TraceWriter:
    """A sampler before a bounded queue; one thread builds spans and exports them. `offer` never blocks."""

    def __init__(self, exporter: Exporter, sampler: TailSampler, builder: SpanBuilder, clock: Clock) -> None:
        self._exporter = exporter
        self._sampler = sampler
        self._builder = builder
        self._clock = clock
        self._queue: collections.deque[RequestRecord] = collections.deque()
        self._closing = threading.Event()
        self.exported = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    def offer(self, record: RequestRecord) -> bool:
        """Is its trace kept? It may be lost on the way to the collector all the same."""
        if not self._sampler.is_kept(record, self._clock.mono_ns()):
            return False
        if len(self._queue) >= MAX_QUEUED:
            self.dropped += 1
            return False
        self._queue.append(record)
        return True

    def close(self) -> None:
        """Export what is queued, within the exporter's own timeout."""
        self._closing.set()
        self._thread.join()
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        while batch := self._next_batch():
            spans = [span for record in batch for span in self._builder.build(record)]
            if self._export(spans):
                self.exported += len(batch)
            else:
                self.dropped += len(batch)

    def _next_batch(self) -> list[RequestRecord]:
        return [self._queue.popleft() for _ in range(min(len(self._queue), MAX_BATCH))]

    def _export(self, spans: list[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception:  # an exporter's bug must not end tracing
            log.exception("trace export failed")
            return False


class _Source(Resource):
    """One of the few that all spans have. The exporter looks each span's up by its hash, which else is made anew."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        super().__init__(attributes)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class SpanBuilder:
    """Turns a record into its spans: a pure view, but for the random ids of the child spans."""

    def __init__(self, gateway: str, version: str) -> None:
        facts = {"service.version": version, "service.namespace": "tidegate"}
        self._gateway = _Source({**facts, "service.name": telemetry.GATEWAY_SERVICE, "service.instance.id": gateway})
        self._facts = facts
        self._engines: dict[str, Resource] = {}
        self._scope = InstrumentationScope("tidegate", version)

    def build(self, record: RequestRecord) -> list[ReadableSpan]:
        start_ns = record.arrived_unix_ns // _US * _US
        end_ns = start_ns + max(_US, record.total_ns // _US * _US)
        starts = _phase_starts(record, start_ns)
        root = self._root(record, start_ns, end_ns)
        spans = [root]
        for name in _GATEWAY_PHASES:
            if name in starts:
                spans.append(self._child(name, root, *starts[name]))
        spans += self._attempts(record, root, starts, start_ns, end_ns)
        if "deliver" in starts:
            spans.append(self._child("deliver", root, *starts["deliver"]))
        return spans

    def _root(self, record: RequestRecord, start_ns: int, end_ns: int) -> ReadableSpan:
        parent = _context(record.trace_id, record.parent_span_id, is_remote=True) if record.parent_span_id else None
        links = [Link(replayed, {"tidegate.link": "replay_of"})] if (replayed := _replayed(record)) else []
        return ReadableSpan(
            name=f"POST {record.endpoint}",
            context=_context(record.trace_id, record.span_id),
            parent=parent,
            resource=self._gateway,
            attributes=_present(_root_attributes(record)),
            links=links,
            kind=SpanKind.SERVER,
            status=_status(record),
            start_time=start_ns,
            end_time=end_ns,
            instrumentation_scope=self._scope,
        )

    def _attempts(
        self, record: RequestRecord, root: ReadableSpan, starts: dict[str, tuple[int, int]], start_ns: int, end_ns: int
    ) -> list[ReadableSpan]:
        """Each attempt with the part of the engine's phases that fell into it: a resumed answer decodes in several."""
        spans = []
        for number, attempt in enumerate(record.attempts, 1):
            begin_ns = start_ns + attempt.started_ns // _US * _US
            if number < len(record.attempts):
                finish_ns = start_ns + attempt.ended_ns // _US * _US - _US
                span = self._failed_attempt(attempt, root, begin_ns, finish_ns)
            else:
                finish_ns = starts["deliver"][0] - _US if "deliver" in starts else end_ns - _US
                attributes = _present(_generation_attributes(record, attempt))
                span = self._child(
                    "attempt",
                    root,
                    begin_ns,
                    finish_ns,
                    kind=SpanKind.CLIENT,
                    attributes=attributes,
                    status=_status(record),
                )
            spans.append(span)
            if attempt.output_tokens or number == len(record.attempts):  # a hedge runs beside what others did
                spans += self._generation(record, attempt, span, starts)
        return spans

    def _failed_attempt(self, attempt: Attempt, root: ReadableSpan, begin_ns: int, finish_ns: int) -> ReadableSpan:
        attributes: dict[str, Any] = {"tidegate.worker": attempt.worker, "error.type": attempt.error or "unknown"}
        if attempt.output_tokens:
            attributes["tidegate.output_tokens"] = attempt.output_tokens
        if attempt.is_hedge:
            attributes["tidegate.hedge"] = True
        status = Status(StatusCode.ERROR, attempt.error)
        return self._child(
            "attempt", root, begin_ns, finish_ns, kind=SpanKind.CLIENT, attributes=attributes, status=status
        )

    def _generation(
        self, record: RequestRecord, attempt: Attempt, span: ReadableSpan, starts: dict[str, tuple[int, int]]
    ) -> list[ReadableSpan]:
        """What the worker of an attempt did, where its phases are known."""
        assert span.start_time is not None
        assert span.end_time is not None
        inside = {
            name: starts[name]
            for name in _ENGINE_PHASES
            if name in starts and starts[name][0] <= span.end_time and starts[name][1] >= span.start_time
        }
        if not inside:
            return []
        engine = self._engine(attempt.worker)
        generate = self._child(
            "generate",
            span,
            min(start for start, _ in inside.values()),
            max(end for _, end in inside.values()),
            kind=SpanKind.SERVER,
            resource=engine,
            attributes={"tidegate.preemptions": record.preemptions, "tidegate.simulated": record.is_simulated},
        )
        phases = [
            self._child(telemetry.ENGINE_SPANS[name], generate, *phase, resource=engine)
            for name, phase in inside.items()
        ]
        return [generate, *phases]

    def _child(
        self,
        name: str,
        parent: ReadableSpan,
        start_ns: int,
        end_ns: int,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        resource: Resource | None = None,
        attributes: dict[str, Any] | None = None,
        status: Status | None = None,
    ) -> ReadableSpan:
        """A span inside its parent, whatever the stamps say."""
        assert parent.start_time is not None
        assert parent.end_time is not None
        start_ns = min(max(start_ns, parent.start_time), parent.end_time)
        return ReadableSpan(
            name=name,
            context=SpanContext(parent.context.trace_id, int(new_id(64), 16), False, _SAMPLED),
            parent=parent.context,
            resource=resource or self._gateway,
            attributes=attributes,
            kind=kind,
            status=status or Status(StatusCode.UNSET),
            start_time=start_ns,
            end_time=min(max(end_ns, start_ns), parent.end_time),
            instrumentation_scope=self._scope,
        )

    def _engine(self, worker: str) -> Resource:
        if worker not in self._engines:
            self._engines[worker] = _Source(
                {**self._facts, "service.name": telemetry.ENGINE_SERVICE, "service.instance.id": worker}
            )
        return self._engines[worker]


def _phase_starts(record: RequestRecord, start_ns: int) -> dict[str, tuple[int, int]]:
    """Phase to (start, end) in wall nanoseconds: whole microseconds, one microsecond apart, in order."""
    spans = {}
    offset_ns = 0
    for name, length_ns in record.phases.present():
        begin = start_ns + offset_ns // _US * _US
        offset_ns += length_ns
        end = start_ns + offset_ns // _US * _US
        spans[name] = (begin, max(begin, end - _US))
    return spans


def _context(trace_id: str, span_id: str, *, is_remote: bool = False) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, _SAMPLED)


def _replayed(record: RequestRecord) -> SpanContext | None:
    if record.replay_of is None:
        return None
    _, trace_id, span_id, _ = record.replay_of.split("-")
    return _context(trace_id, span_id, is_remote=True)


def _status(record: RequestRecord) -> Status:
    if record.outcome in (Outcome.FINISHED, Outcome.CANCELLED):
        return Status(StatusCode.UNSET)
    return Status(StatusCode.ERROR, record.error)


def _root_attributes(record: RequestRecord) -> dict[str, Any]:
    return {
        "http.request.method": "POST",
        "http.route": record.endpoint,
        "url.path": record.endpoint,
        "http.response.status_code": record.status,
        "http.request.body.size": record.body_bytes,
        "error.type": record.error_code if record.outcome is not Outcome.FINISHED else None,
        "tidegate.request_id": record.request_id,
        "tidegate.outcome": record.outcome.value,
        "tidegate.reject_reason": record.reject_reason,
        "tidegate.tenant": record.tenant,
        "tidegate.priority": record.priority,
        "tidegate.session": record.session,
        "tidegate.ttft_ms": _ms(record.first_token_at_ns),
        "tidegate.unattributed_ms": _ms(record.unattributed_ns) if record.unattributed_ns else None,
        "tidegate.backpressure_ms": _ms(record.backpressure_ns) if record.backpressure_ns else None,
        "tidegate.max_gap_ms": _ms(record.max_gap_ns) if record.max_gap_ns else None,
    }


def _generation_attributes(record: RequestRecord, attempt: Attempt) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": "chat" if "chat" in record.endpoint else "text_completion",
        "gen_ai.provider.name": "tidegate.sim" if record.is_simulated else "vllm",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "server.address": record.worker,
        "tidegate.worker": record.worker,
        "tidegate.hedge": attempt.is_hedge or None,
        "error.type": record.error_code if record.outcome is not Outcome.FINISHED else None,
    }


def _present(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _ms(value_ns: int | None) -> float | None:
    return None if value_ns is None else value_ns / 1e6
