"""Prometheus metrics: a view of settled records and of the scheduler's and the workers' state at scrape time.

Histograms hold every request, not a sample; their exemplars are requests whose traces were kept. Labels are bounded:
models are those that workers serve, endpoints are routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.fleet import Fleet
from gateway.instruments import Count, Distribution, Trace
from gateway.scheduler import Scheduler
from protos.core.clock import Clock
from protos.core.contract import Load
from protos.core.journal import JournalStats
from protos.core.record import RequestRecord

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
MAX_TENANTS = 50
JournalSource = Callable[[], JournalStats | None]
TraceSource = Callable[[], tuple[int, int]]
"""(exported, dropped) traces."""

WORKER_GAUGES: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("running", "Sequences in the engine's batch", lambda load: load.running),
    ("waiting", "Sequences in the engine's queue", lambda load: load.waiting),
    ("kv_blocks_used", "KV blocks in use", lambda load: load.kv_blocks_used),
    ("kv_blocks_total", "KV blocks in all", lambda load: load.kv_blocks_total),
    ("preemptions", "Preemptions since boot", lambda load: load.preemptions),
    ("step_seconds", "Duration of the last engine step", lambda load: load.step_ns / 1e9),
    ("queued_prefill_tokens", "Prompt tokens not yet computed", lambda load: load.queued_prefill_tokens),
    ("prefix_queries", "Tokens asked of the prefix cache since boot", lambda load: load.prefix_queries),
    ("prefix_hits", "Tokens found in the prefix cache since boot", lambda load: load.prefix_hits),
    ("host_cpu_percent", "CPU use of its host", lambda load: load.host.cpu_percent if load.host else 0),
    (
        "host_memory_used_bytes",
        "Memory use of the worker's host",
        lambda load: load.host.memory_used_bytes if load.host else 0,
    ),
)

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """One registry per gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        of_request = ("endpoint", "model")
        self._requests = self._count(
            "tidegate_requests", "Settled requests", *of_request, "outcome", "status", "reason"
        )
        self._tokens = self._count("tidegate_tokens", "Tokens of settled requests", "model", "kind")
        self._tenant_requests = self._count(
            "tidegate_tenant_requests", "Settled requests", "tenant", "priority", "outcome"
        )
        self._tenant_tokens = self._count("tidegate_tenant_tokens", "Tokens", "tenant", "kind")
        self.tenant_names = TenantNames()
        self._retries = self._count("tidegate_retries", "Attempts after the first, without hedges", "model")
        self._resumes = self._count("tidegate_resumes", "Of these, the ones that went on with an answer", "model")
        self._hedges = self._count("tidegate_hedges", "Requests sent to a second worker beside the first", "model")
        self._hedges_won = self._count("tidegate_hedges_won", "Of these, the ones that it answered", "model")
        self._ttft = self._distribution("tidegate_ttft_seconds", "Arrival to first content", of_request, SECONDS)
        self._tpot = self._distribution(
            "tidegate_tpot_seconds", "Time per output token after the first", of_request, TOKEN_SECONDS
        )
        self._total = self._distribution("tidegate_request_seconds", "Arrival to settle", of_request, SECONDS)
        self._phase = self._distribution("tidegate_phase_seconds", "Time in one phase", ("phase",), SECONDS)
        self._unattributed = self._count("tidegate_unattributed_seconds", "Request time that no phase explains")
        self._backpressure = self._count("tidegate_backpressure_seconds", "Time in which clients' sockets took nothing")

    def observe(self, record: RequestRecord, *, is_traced: bool = False) -> None:
        """Count one settled request. Where its trace is kept, the histograms point at it."""
        trace = Trace(record.trace_id, (record.arrived_unix_ns + record.total_ns) / 1e9) if is_traced else None
        model, endpoint, outcome = record.model, record.endpoint, record.outcome.value
        self._requests.add((endpoint, model, outcome, str(record.status), record.reject_reason or ""))
        tenant = self.tenant_names.label(record.tenant)
        self._tenant_requests.add((tenant, record.priority, outcome))
        self._tenant_tokens.add((tenant, "prompt"), record.prompt_tokens or 0)
        self._tenant_tokens.add((tenant, "output"), record.output_tokens)
        for name, value_ns in record.phases.present():
            self._phase.observe((name,), value_ns / 1e9, trace)
        if record.unattributed_ns:
            self._unattributed.add((), record.unattributed_ns / 1e9)
        if record.backpressure_ns:
            self._backpressure.add((), record.backpressure_ns / 1e9)
        if not model:
            return  # refused before it was known what it wanted
        of_request = (endpoint, model)
        self._total.observe(of_request, record.total_ns / 1e9, trace)
        self._tokens.add((model, "prompt"), record.prompt_tokens or 0)
        self._tokens.add((model, "cached"), record.cached_tokens or 0)
        self._tokens.add((model, "expected_cached"), record.expected_cached_tokens or 0)
        self._tokens.add((model, "output"), record.output_tokens)
        if len(record.attempts) > 1:
            hedges = [attempt for attempt in record.attempts if attempt.is_hedge]
            self._hedges.add((model,), len(hedges))
            self._hedges_won.add((model,), sum(hedge.output_tokens > 0 for hedge in hedges))
            self._retries.add((model,), len(record.attempts) - 1 - len(hedges))
            self._resumes.add((model,), sum(before.output_tokens > 0 for before in record.attempts[:-1]))
        first_ns, last_ns = record.first_token_at_ns, record.last_token_at_ns
        if first_ns is not None:
            self._ttft.observe(of_request, first_ns / 1e9, trace)
            if last_ns is not None and record.output_tokens > 1:
                self._tpot.observe(of_request, (last_ns - first_ns) / 1e9 / (record.output_tokens - 1), trace)

    def _count(self, name: str, text: str, *labels: str) -> Count:
        return Count(name, text, labels, self.registry)

    def _distribution(self, name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> Distribution:
        return Distribution(name, text, labels, bounds, self.registry)


class TenantNames:
    """Tenants as labels: the first MAX_TENANTS by name, all later ones together, so that label sets stay bounded.

    One per gateway: a tenant has one name in all metrics.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def label(self, tenant: str) -> str:
        if tenant in self._names:
            return tenant
        if len(self._names) >= MAX_TENANTS:
            return "other"
        self._names.add(tenant)
        return tenant


class StateCollector(Collector):
    """What is true now: queue, leases, workers, capture."""

    def __init__(
        self,
        scheduler: Scheduler,
        fleet: Fleet,
        capture: JournalSource,
        traces: TraceSource,
        clock: Clock,
        tenant_names: TenantNames,
    ) -> None:
        self._scheduler = scheduler
        self._fleet = fleet
        self._clock = clock
        self._capture = capture
        self._traces = traces
        self._tenant_names = tenant_names

    def collect(self) -> Iterator[Metric]:
        scheduler = self._scheduler
        yield GaugeMetricFamily("tidegate_queue_requests", "Requests waiting for a worker", scheduler.queued)
        yield GaugeMetricFamily("tidegate_queue_bytes", "Bodies of waiting requests", scheduler.queued_bytes)
        yield GaugeMetricFamily("tidegate_leases", "Requests running on workers", len(scheduler.ledger))
        yield from self._queue()
        yield from self._workers()
        yield from self._pipes()

    def _queue(self) -> Iterator[Metric]:
        labels = ("model", "band", "tenant")
        depth = GaugeMetricFamily("tidegate_queue_depth", "Requests waiting, by band and tenant", labels=labels)
        oldest = GaugeMetricFamily("tidegate_queue_oldest_seconds", "Wait of the oldest of them", labels=labels)
        now_ns = self._clock.mono_ns()
        waiting: dict[tuple[str, str, str], tuple[int, int]] = {}
        for item in self._scheduler.depths():
            values = (item.model, str(item.band), self._tenant_names.label(item.tenant))
            requests, oldest_ns = waiting.get(values, (0, now_ns))
            waiting[values] = (requests + item.requests, min(oldest_ns, item.oldest_ns))
        for values, (requests, oldest_ns) in waiting.items():
            depth.add_metric(values, requests)
            oldest.add_metric(values, (now_ns - oldest_ns) / 1e9)
        yield depth
        yield oldest

    def _workers(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("tidegate_worker_ready", "1 when the session is open", labels=("worker",))
        limit = GaugeMetricFamily(
            "tidegate_worker_sequence_limit", "Sequences that it is given at once", labels=("worker",)
        )
        families = [
            (GaugeMetricFamily(f"tidegate_worker_{name}", text, labels=("worker",)), read)
            for name, text, read in WORKER_GAUGES
        ]
        for address, session in self._fleet.sessions.items():
            ready.add_metric((address,), session.state == "ready")
            if (worker := self._scheduler.worker(session.name)) is not None:
                limit.add_metric((address,), worker.limit.value)
            for family, read in families:
                family.add_metric((address,), read(session.load))
        yield ready
        yield limit
        yield from (family for family, _ in families)

    def _pipes(self) -> Iterator[Metric]:
        capture = self._capture()
        if capture is not None:
            yield CounterMetricFamily("tidegate_capture_entries", "Requests captured", value=capture.written)
            yield CounterMetricFamily("tidegate_capture_dropped", "Requests not captured", value=capture.dropped)
        exported, dropped = self._traces()
        yield CounterMetricFamily("tidegate_traces_exported", "Traces handed to the collector", value=exported)
        yield CounterMetricFamily("tidegate_traces_dropped", "Traces lost on the way to it", value=dropped)
