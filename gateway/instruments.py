"""Counters and histograms for one event loop.

prometheus-client's own take a lock and several calls per sample, which is a tenth of what a request costs here; what
they hand over at a scrape is the same.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import msgspec
from prometheus_client.core import CounterMetricFamily, Exemplar, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

Values = tuple[str, ...]
"""Of the labels, in their order."""


class Trace(msgspec.Struct, frozen=True):
    """Of the request that a sample is from."""

    trace_id: str
    ended_unix_s: float


class Count(Collector):
    """A Prometheus counter; one without labels is there from the start."""

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._totals: dict[Values, float] = {} if labels else {(): 0.0}
        registry.register(self)

    def add(self, values: Values, amount: float = 1.0) -> None:
        self._totals[values] = self._totals.get(values, 0.0) + amount

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, total in self._totals.items():
            family.add_metric(values, total)
        yield family

    def describe(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._text, labels=self._labels)


class Distribution(Collector):
    """A Prometheus histogram with upper `bounds`, the infinite one left out.

    Each bucket has the last sample that came with a trace as its exemplar, which OpenMetrics tells.
    """

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = bounds
        self._les = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._samples: dict[Values, tuple[list[int], list[float], dict[int, Exemplar]]] = {}
        """(samples by bucket, their sum alone in a list, exemplars by bucket)"""
        registry.register(self)

    def observe(self, values: Values, sample: float, trace: Trace | None = None) -> None:
        counts, total, exemplars = self._samples.get(values) or self._new(values)
        bucket = bisect.bisect_left(self._bounds, sample)
        counts[bucket] += 1
        total[0] += sample
        if trace is not None:
            exemplars[bucket] = Exemplar({"trace_id": trace.trace_id}, sample, trace.ended_unix_s)

    def _new(self, values: Values) -> tuple[list[int], list[float], dict[int, Exemplar]]:
        samples = self._samples[values] = ([0] * len(self._les), [0.0], {})
        return samples

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, (counts, total, exemplars) in self._samples.items():
            buckets = [
                (le, count, exemplars[bucket]) if bucket in exemplars else (le, count)
                for bucket, (le, count) in enumerate(zip(self._les, itertools.accumulate(counts), strict=True))
            ]
            family.add_metric(values, buckets, total[0])
        yield family

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._text, labels=self._labels)
