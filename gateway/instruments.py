"""Counters and histograms for one event loop.

prometheus-client's own take a lock and several calls per sample, which is a tenth of what a request costs here; what
they hand over at a scrape is the same.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

Values = tuple[str, ...]
"""Of the labels, in their order."""


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
    """A Prometheus histogram with upper `bounds`, the infinite one left out."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = bounds
        self._les = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._samples: dict[Values, tuple[list[int], list[float]]] = {}
        """(samples by bucket, their sum alone in a list)"""
        registry.register(self)

    def observe(self, values: Values, sample: float) -> None:
        counts, total = self._samples.get(values) or self._new(values)
        counts[bisect.bisect_left(self._bounds, sample)] += 1
        total[0] += sample

    def _new(self, values: Values) -> tuple[list[int], list[float]]:
        samples = self._samples[values] = ([0] * len(self._les), [0.0])
        return samples

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, (counts, total) in self._samples.items():
            cumulated = itertools.accumulate(counts)
            family.add_metric(values, list(zip(self._les, cumulated, strict=True)), total[0])
        yield family

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._text, labels=self._labels)
