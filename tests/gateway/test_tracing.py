"""Spans of records, sent by the real exporter to a collector of our own over a real socket."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.sdk.trace import ReadableSpan
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway import tracing
from gateway.sampling import TailSampler
from gateway.settings import GatewaySettings
from gateway.tracing import SpanBuilder, TraceWriter
from protos.core import settings
from protos.core.clock import SYSTEM_CLOCK
from protos.core.errors import ConfigError
from protos.core.record import PHASES, Attempt, Outcome, Phases, RequestRecord
from tests.gateway.processes import GatewayProcess, WorkerProcess
from tests.gateway.records import record

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(pb_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        """(service, span)"""
        self.arrived = threading.Event()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            facts = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(facts["service.name"], span) for span in scope.spans]
        self.arrived.set()
        return pb.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    it = Collector()
    pb_grpc.add_TraceServiceServicer_to_server(it, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield it, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def writer(endpoint: str, timeout: float = 5) -> TraceWriter:
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=timeout)
    return TraceWriter(exporter, TailSampler(1.0, 1000), SpanBuilder("gateway-1", "0.1"), SYSTEM_CLOCK)


def export(collector: tuple[Collector, str], *records: RequestRecord) -> dict[str, tuple[str, Any]]:
    """Spans by name, as the collector got them."""
    it, endpoint = collector
    traces = writer(endpoint)
    for item in records:
        traces.offer(item)
    traces.close()
    assert (traces.exported, traces.dropped) == (len(records), 0)
    return {span.name: (service, span) for service, span in it.spans}


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_finished_request_is_the_whole_tree(collector: tuple[Collector, str]) -> None:
    spans = export(collector, record(trace_id=TRACE, parent_span_id=SPAN, prompt_tokens=7, output_tokens=3))
    tree = {
        "POST /v1/chat/completions": (None, "tidegate-gateway"),
        "receive": ("POST /v1/chat/completions", "tidegate-gateway"),
        "admit": ("POST /v1/chat/completions", "tidegate-gateway"),
        "queue": ("generate", "tidegate-engine"),  # two spans have this name; the engine's comes later
        "route": ("POST /v1/chat/completions", "tidegate-gateway"),
        "attempt": ("POST /v1/chat/completions", "tidegate-gateway"),
        "generate": ("attempt", "tidegate-engine"),
        "input": ("generate", "tidegate-engine"),
        "prefill": ("generate", "tidegate-engine"),
        "decode": ("generate", "tidegate-engine"),
        "deliver": ("POST /v1/chat/completions", "tidegate-gateway"),
    }
    assert spans.keys() == tree.keys()
    for name, (parent, service) in tree.items():
        assert spans[name][0] == service
        if parent is not None:
            assert spans[name][1].parent_span_id == spans[parent][1].span_id
    root = spans["POST /v1/chat/completions"][1]
    assert root.parent_span_id.hex() == SPAN
    assert {span.trace_id.hex() for _, span in spans.values()} == {TRACE}
    assert root.span_id.hex() == "a" * 16, "the id that the client and the worker were told"
    Span = type(root)
    assert (root.kind, spans["attempt"][1].kind, spans["generate"][1].kind) == (
        Span.SPAN_KIND_SERVER,
        Span.SPAN_KIND_CLIENT,
        Span.SPAN_KIND_SERVER,
    )
    assert attributes(spans["attempt"][1])["gen_ai.usage.output_tokens"] == 3
    assert attributes(root)["http.response.status_code"] == 200
    assert root.status.code == root.status.STATUS_CODE_UNSET


def test_replayed_request_links_to_the_original(collector: tuple[Collector, str]) -> None:
    spans = export(collector, record(replay_of=f"00-{TRACE}-{SPAN}-01"))
    (link,) = spans["POST /v1/chat/completions"][1].links
    assert (link.trace_id.hex(), link.span_id.hex()) == (TRACE, SPAN)
    assert not spans["POST /v1/chat/completions"][1].parent_span_id


def test_failed_request_is_an_error(collector: tuple[Collector, str]) -> None:
    failed = record(
        outcome=Outcome.FAILED,
        status=503,
        error="the worker failed; retry",
        error_code="service_unavailable",
        phases=Phases(receive=1000, admit=1000, queue=5000, route=1000),
        total_ns=50_000,
        attempts=(Attempt("w1", 8_000, 20_000, "connection reset"), Attempt("w2", 20_000, 50_000, "it broke")),
    )
    traces = SpanBuilder("g", "0").build(failed)
    assert [span.name for span in traces].count("attempt") == 2
    spans = export(collector, failed)
    root = spans["POST /v1/chat/completions"][1]
    assert root.status.code == root.status.STATUS_CODE_ERROR
    assert attributes(root)["error.type"] == "service_unavailable"
    assert spans["attempt"][1].status.code == root.status.STATUS_CODE_ERROR


def test_refused_request_has_no_attempt() -> None:
    refused = record(outcome=Outcome.REJECTED, status=429, attempts=(), phases=Phases(receive=5000, admit=2000))
    assert [span.name for span in SpanBuilder("g", "0").build(refused)] == [
        "POST /v1/chat/completions",
        "receive",
        "admit",
    ]


def test_cancelled_request_is_no_error() -> None:
    root = SpanBuilder("g", "0").build(record(outcome=Outcome.CANCELLED, status=499))[0]
    assert root.status.status_code.name == "UNSET"


lengths = st.none() | st.integers(0, 3000) | st.integers(0, 10**10)


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    phases = Phases(**{name: draw(lengths) for name in PHASES})
    unattributed_ns = draw(st.integers(0, 10**6))
    total_ns = phases.sum_ns() + unattributed_ns
    bounds = sorted(draw(st.lists(st.integers(0, total_ns), max_size=6)))
    attempts = tuple(
        Attempt(f"w{index}", start, end, "lost") for index, (start, end) in enumerate(itertools.pairwise(bounds))
    )
    return record(
        phases=phases,
        total_ns=total_ns,
        attempts=attempts,
        arrived_unix_ns=draw(st.integers(10**18, 2 * 10**18)),
        outcome=draw(st.sampled_from(Outcome)),
    )


@given(records())
def test_spans_are_a_tree_in_time_whatever_the_record(it: RequestRecord) -> None:
    spans = SpanBuilder("g", "0").build(it)
    assert len(spans) <= 40
    by_id = {span.context.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    roots = [span for span in spans if span.parent is None]
    assert roots == [spans[0]]
    for span in spans:
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time % 1000 == span.end_time % 1000 == 0
        assert span.start_time <= span.end_time
        if span.parent is not None:
            parent = by_id[span.parent.span_id]
            assert parent.start_time <= span.start_time  # type: ignore[operator]
            assert span.end_time <= parent.end_time  # type: ignore[operator]


@given(st.lists(st.integers(1000, 10**9), min_size=11, max_size=11))
def test_siblings_do_not_touch(values: list[int]) -> None:
    """Jaeger's critical path drops children that touch."""
    phases = Phases(**dict(zip(PHASES, values, strict=True)))
    sent_ns = sum(values[:5])
    attempts = (Attempt("w1", sum(values[:4]), sent_ns, "lost"), Attempt("w2", sent_ns, sum(values)))
    spans = SpanBuilder("g", "0").build(record(phases=phases, attempts=attempts))
    families: dict[int, list[ReadableSpan]] = {}
    for span in spans:
        if span.parent is not None:
            families.setdefault(span.parent.span_id, []).append(span)
    for siblings in families.values():
        in_order = sorted(siblings, key=lambda span: (span.start_time, span.end_time))
        for before, after in itertools.pairwise(in_order):
            assert before.end_time < after.start_time, (before.name, after.name)  # type: ignore[operator]


def test_resumed_answer_is_generated_by_each_of_its_workers() -> None:
    """Prefill happened once, on the first; the answer was decoded on both, with a pause between them."""
    phases = Phases(receive=1000, dispatch=1000, prefill=10_000, decode=80_000, deliver=2000)
    attempts = (Attempt("w1", 1000, 40_000, "silent for 4 s", 12), Attempt("w2", 60_000, 94_000, None, 5))
    spans = SpanBuilder("g", "0").build(record(phases=phases, total_ns=94_000, attempts=attempts))
    tree = [(span.name, span.resource.attributes["service.instance.id"]) for span in spans]
    assert tree == [
        ("POST /v1/chat/completions", "g"),
        ("receive", "g"),
        ("attempt", "g"),
        ("generate", "w1"),
        ("prefill", "w1"),
        ("decode", "w1"),
        ("attempt", "g"),
        ("generate", "w2"),
        ("decode", "w2"),
        ("deliver", "g"),
    ]
    first, second = [span for span in spans if span.name == "decode"]
    assert first.end_time < second.start_time  # type: ignore[operator]
    assert spans[2].attributes is not None
    assert spans[2].attributes["tidegate.output_tokens"] == 12


@pytest.mark.parametrize("is_won", [True, False])
def test_what_a_hedge_ran_beside_is_not_told_of_it(is_won: bool) -> None:
    """The phases are the winner's; the spans of both attempts overlap."""
    phases = Phases(receive=1000, dispatch=1000, prefill=10_000, decode=80_000, deliver=2000)
    loser = Attempt("w1", 1000, 12_000, "hedged", is_hedge=not is_won)
    attempts = (loser, Attempt("w2", 1000, 94_000, None, 5, is_hedge=is_won))
    spans = SpanBuilder("g", "0").build(record(phases=phases, total_ns=94_000, attempts=attempts, worker="w2"))
    generated = [span for span in spans if span.name == "generate"]
    assert [span.resource.attributes["service.instance.id"] for span in generated] == ["w2"]
    tries = [span.attributes or {} for span in spans if span.name == "attempt"]
    assert [it.get("error.type") for it in tries] == ["hedged", None]
    assert [it.get("tidegate.hedge", False) for it in tries] == [not is_won, is_won]


def test_metrics_point_at_a_trace_that_the_collector_has(collector: tuple[Collector, str], tmp_path: Path) -> None:
    it, endpoint = collector
    worker = WorkerProcess(tmp_path / "worker", "m", 1)
    g = GatewayProcess(tmp_path, worker.address, config=f'[gateway.tracing]\notlp_endpoint = "{endpoint}"\n')
    try:
        g.start(1)
        status, _, _ = g.request("POST", "/generate", {"prompt": "x"}, {"traceparent": f"00-{TRACE}-{SPAN}-01"})
        assert status == 200
        accept = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5"
        _, headers, body = g.request("GET", "/metrics", headers={"accept": accept}, operator=True)
        assert headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        samples = [one for family in text_string_to_metric_families(body.decode()) for one in family.samples]
        told = {one.name: one.exemplar.labels["trace_id"] for one in samples if one.exemplar}
        assert told.keys() >= {"tidegate_ttft_seconds_bucket", "tidegate_phase_seconds_bucket"}
        assert set(told.values()) == {TRACE}
        assert it.arrived.wait(5)
        assert {span.trace_id.hex() for _, span in it.spans} == {TRACE}
    finally:
        g.kill()
        worker.kill()


def test_collector_that_is_down_costs_nothing_but_traces() -> None:
    traces = writer("http://127.0.0.1:9", timeout=0.5)
    started = time.monotonic()
    for _ in range(200):
        traces.offer(record())
    assert time.monotonic() - started < 0.25
    traces.close()
    assert (traces.exported, traces.dropped) == (0, 200)
    assert time.monotonic() - started < 5


def test_queue_is_bounded_and_its_drops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MAX_QUEUED", 10)
    hangs = threading.Event()
    exporting = threading.Event()

    class Hanging:
        def export(self, spans: Any) -> Any:
            exporting.set()
            hangs.wait(10)
            raise RuntimeError("it never worked")

        def shutdown(self) -> None:
            pass

    traces = TraceWriter(Hanging(), TailSampler(1.0, 1000), SpanBuilder("g", "0"), SYSTEM_CLOCK)
    traces.offer(record())
    assert exporting.wait(5)
    for _ in range(25):
        traces.offer(record())
    assert traces.dropped == 15
    hangs.set()
    traces.close()
    assert (traces.exported, traces.dropped) == (0, 26)


def endpoint_of(text: str) -> str:
    flags = {"tracing.otlp_endpoint": text}
    return settings.load(GatewaySettings, "gateway", file=None, environ={}, flags=flags).tracing.otlp_endpoint


@pytest.mark.parametrize("text", ["", "http://127.0.0.1:4317", "https://collector.example:4317/", "http://[::1]:4317"])
def test_endpoint_is_an_address(text: str) -> None:
    assert endpoint_of(text) == text


@pytest.mark.parametrize("text", ["jaeger", "jaeger:4317", "http://jaeger", "ftp://jaeger:4317", "http://a b:4317"])
def test_endpoint_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.tracing\.otlp_endpoint: expected str matching"):
        endpoint_of(text)
