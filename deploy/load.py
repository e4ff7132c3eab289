"""What each part is doing, in a few words, from the gateway's metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from deploy.probe import fetch


class Sample(msgspec.Struct, frozen=True):
    """The gateway's metrics at one moment: values by name, summed over labels, and by worker address."""

    at_s: float
    totals: Mapping[str, float]
    workers: Mapping[str, Mapping[str, float]]


class LoadReader:
    """Asks a gateway at most once a second."""

    def __init__(self, operator_url: str, workers: Mapping[str, str]) -> None:
        """`workers` maps addresses to names."""
        self._url = f"{operator_url}/metrics"
        self._names = workers
        self._last: Sample | None = None
        self._phrases: Mapping[str, str] = {}

    def read(self) -> Mapping[str, str]:
        """One phrase per part; none while the gateway does not answer."""
        now_s = time.monotonic()
        if self._last is None or now_s - self._last.at_s >= 1.0:
            body = fetch(self._url)
            sample = Sample(now_s, {}, {}) if body is None else parse(body.decode(), now_s)
            self._phrases = phrases(self._last, sample, self._names)
            self._last = sample
        return self._phrases


def parse(text: str, at_s: float) -> Sample:
    """A scrape's text; kinds of tokens are told apart as tidegate_tokens_total:output."""
    totals: dict[str, float] = {}
    workers: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for item in family.samples:
            kind = item.labels.get("kind") or item.labels.get("outcome")
            key = f"{item.name}:{kind}" if kind else item.name
            totals[key] = totals.get(key, 0.0) + item.value
            if worker := item.labels.get("worker"):
                workers.setdefault(worker, {})[item.name] = item.value
    return Sample(at_s, totals, workers)


def phrases(before: Sample | None, now: Sample, names: Mapping[str, str]) -> dict[str, str]:
    found = {names[address]: _worker(values) for address, values in now.workers.items() if address in names}
    if now.totals:
        found["gateway"] = _gateway(before, now)
    return found


def _worker(values: Mapping[str, float]) -> str:
    total = values.get("tidegate_worker_kv_blocks_total", 0.0)
    kv_percent = 100 * values.get("tidegate_worker_kv_blocks_used", 0.0) / total if total else 0.0
    running, waiting = (values.get(f"tidegate_worker_{name}", 0.0) for name in ("running", "waiting"))
    return f"{running:.0f} running, {waiting:.0f} waiting, KV {kv_percent:.0f}%"


def _gateway(before: Sample | None, now: Sample) -> str:
    running, queued = (now.totals.get(name, 0.0) for name in ("tidegate_leases", "tidegate_queue_requests"))
    requests = _rate(before, now, "tidegate_requests_total:finished")
    tokens = _rate(before, now, "tidegate_tokens_total:output")
    return f"{running:.0f} running, {queued:.0f} queued, {requests:.1f} req/s, {tokens:.0f} tok/s"


def _rate(before: Sample | None, now: Sample, name: str) -> float:
    """Per second; 0 after a gateway's restart, when its counters begin anew."""
    if before is None or not before.totals or now.at_s <= before.at_s:
        return 0.0
    return max(0.0, now.totals.get(name, 0.0) - before.totals.get(name, 0.0)) / (now.at_s - before.at_s)
