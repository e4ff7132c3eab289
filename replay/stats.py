"""Numbers of a run, from its results: percentiles, errors, phases, and recorded against replayed."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from protos.core.record import PHASES, Outcome, Phases
from replay.answer import Timing
from replay.result import Fate, Result
from replay.run import Run, RunFacts

LAG_LIMIT_NS = 10_000_000
STALL_LIMIT_SHARE = 0.01
BEFORE_FIRST_TOKEN = PHASES[: PHASES.index("decode")]

DEFINITIONS = {
    "intended": "when the schedule wanted a request sent; 'sent' is when it was handed to the socket",
    "schedule lag": "how late the generator turned to a request, after its intended time",
    "ttft": "time to first token: intended send to the first non-empty content (a whole answer is one content)",
    "ttft from sent": "the same from the time it was sent",
    "tpot": "time per output token: (last content - first content) / (output tokens - 1), streams only",
    "itl": "inter-token latency: gaps between content events of a stream",
    "e2e": "end to end: intended send to the end of the answer",
    "goodput": "finished requests that meet every SLO, per second; errors, rejections and missing tokens meet none",
    "tokens": "from the usage that the server reports",
    "errors": "every answer that is not a complete one of status 200; a stream that ends in an error event is an error",
    "phases": "the gateway's own account of each request; they partition its time from arrival to settle",
    "of ttft": "shares of the ttft of streams: the time to a whole answer has its decoding in it",
    "recorded against replayed": "both at the gateway, but for the replayed ttft, the client's from sent; of streams",
    "outside": "what the client saw beyond those: network, kernel, itself; of TTFT also delivering the first token",
    "dispersion": "variance over mean of the sends per window; 1 for Poisson arrivals, more for bursts",
    "client-limited": "the generator was late (p99 schedule lag over 10 ms) or its loop stalled for over 1% of the run",
}


class Quantiles(msgspec.Struct, frozen=True):
    """Milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class PhaseShare(msgspec.Struct, frozen=True, kw_only=True):
    phase: str
    count: int
    """Requests that went through it."""
    mean_ms: float
    p50_ms: float
    p95_ms: float
    share_of_ttft: float | None
    """Of the summed time to first token from sent, of streams; None for a phase that follows the first token."""
    share_of_e2e: float
    """Of the summed end-to-end time from sent."""


class Comparison(msgspec.Struct, frozen=True):
    """One quantity of the requests that finished both times."""

    name: str
    recorded: Quantiles
    replayed: Quantiles


class SumCheck(msgspec.Struct, frozen=True, kw_only=True):
    """phases + unattributed = total, for every request with timing."""

    checked: int
    broken: int
    max_unattributed_share: float
    mean_unattributed_share: float


class Slowest(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    trace_id: str
    request_id: str
    recorded_trace_id: str
    ttft_ms: float | None
    e2e_ms: float
    lag_ms: float
    connect_ms: float | None
    """Encoding the body and connecting."""
    prompt_tokens: int | None
    output_tokens: int | None
    worker: str
    phases_ms: dict[str, float]
    outside_ms: float | None
    unattributed_ms: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    facts: RunFacts
    is_complete: bool
    """False for a run that was killed: requests that were under way then are missing."""
    is_interrupted: bool
    is_client_limited: bool
    limits: tuple[str, ...]
    """Why it is client-limited."""
    is_simulated: bool
    warnings: tuple[str, ...]
    planned: int
    sent: int
    fates: dict[str, int]
    errors: dict[str, int]
    error_messages: dict[str, str]
    """What the first one of each kind said, where it said something."""
    reject_reasons: dict[str, int]
    statuses: dict[str, int]
    duration_s: float
    requests_per_s: float
    output_tokens: int
    output_tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    preemptions: int
    goodput_met: int
    goodput_per_s: float
    latency_ms: dict[str, Quantiles]
    phases: list[PhaseShare]
    outside_share_of_ttft: float | None
    outside_share_of_e2e: float | None
    sum_check: SumCheck
    comparison: list[Comparison]
    compared: int
    slowest: Slowest | None
    definitions: dict[str, str]


def quantile(ordered: Sequence[float], q: float) -> float:
    """Between neighbours by linear interpolation, as NumPy does. `ordered` is sorted and not empty."""
    return _interpolated(ordered.__getitem__, len(ordered), q)


def _interpolated(at: Callable[[int], float], count: int, q: float) -> float:
    position = q * (count - 1)
    low = int(position)
    high = min(low + 1, count - 1)
    return at(low) + (at(high) - at(low)) * (position - low)


def quantiles_ms(values_ns: Iterable[float | None]) -> Quantiles | None:
    """Of what is there; None when nothing is."""
    ordered = sorted(value / 1e6 for value in values_ns if value is not None)
    if not ordered:
        return None
    p50, p90, p95, p99 = (quantile(ordered, q) for q in (0.5, 0.9, 0.95, 0.99))
    return Quantiles(len(ordered), sum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


def quantiles_of_counts_ms(counts_us: Counter[int]) -> Quantiles | None:
    """The same of microseconds by how often each was there: gaps are too many to be sorted one by one."""
    if not counts_us:
        return None
    values = sorted(counts_us)
    ends = list(itertools.accumulate(counts_us[value] for value in values))
    total = ends[-1]

    def at(rank: int) -> int:
        return values[bisect.bisect_right(ends, rank)]

    p50, p90, p95, p99 = (_interpolated(at, total, q) / 1e3 for q in (0.5, 0.9, 0.95, 0.99))
    mean = sum(value * count for value, count in counts_us.items()) / total / 1e3
    return Quantiles(total, mean, p50, p90, p95, p99, values[-1] / 1e3)


def summarize(run: Run) -> Summary:
    facts, results = run.facts, run.results
    finished = [result for result in results if result.fate is Fate.FINISHED]
    timed = [(result, result.timing) for result in finished if result.timing is not None]
    duration_s = _duration_s(run)
    output_tokens = sum(result.output_tokens or 0 for result in results)
    met = sum(facts.slo.is_met_by(result) for result in results)
    limits = _limits(run)
    pairs = _pairs(results)
    return Summary(
        facts=facts,
        is_complete=run.end is not None,
        is_interrupted=run.end is not None and run.end.is_interrupted,
        is_client_limited=bool(limits),
        limits=limits,
        is_simulated=facts.is_simulated or any(timing.is_simulated for _, timing in timed),
        warnings=_warnings(run),
        planned=facts.planned,
        sent=run.end.sent if run.end else len(results) + run.dropped,
        fates=_counted(result.fate.value for result in results),
        errors=_counted(result.error_kind for result in results if result.fate in (Fate.FAILED, Fate.REJECTED)),
        error_messages=_first_messages(results),
        reject_reasons=_counted(result.reject_reason for result in results),
        statuses=_counted(str(result.status) for result in results if result.status),
        duration_s=duration_s,
        requests_per_s=len(finished) / duration_s if duration_s else 0.0,
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration_s if duration_s else 0.0,
        prompt_tokens=sum(result.prompt_tokens or 0 for result in results),
        cached_tokens=sum(result.cached_tokens or 0 for result in results),
        preemptions=sum(timing.preemptions for _, timing in timed),
        goodput_met=met,
        goodput_per_s=met / duration_s if duration_s else 0.0,
        latency_ms=_latencies(results, finished),
        phases=_phase_shares(timed),
        outside_share_of_ttft=_outside_share(
            _streamed(timed), lambda result: result.ttft_sent_ns, _before_first_token_ns
        ),
        outside_share_of_e2e=_outside_share(timed, lambda result: result.e2e_sent_ns, lambda timing: timing.total_ns),
        sum_check=_sum_check([timing for _, timing in timed]),
        comparison=_comparison(pairs),
        compared=len(pairs),
        slowest=_slowest(finished),
        definitions=DEFINITIONS,
    )


def _first_messages(results: Iterable[Result]) -> dict[str, str]:
    messages: dict[str, str] = {}
    for result in results:
        if result.fate in (Fate.FAILED, Fate.REJECTED) and result.error_kind and result.error:
            messages.setdefault(result.error_kind, result.error)
    return messages


def _counted(values: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(value for value in values if value is not None).most_common())


def _duration_s(run: Run) -> float:
    """Until the last answer ended."""
    last_ns = max((result.done_ns for result in run.results), default=0)
    return last_ns / 1e9


def _limits(run: Run) -> tuple[str, ...]:
    reasons = []
    lag = quantiles_ms(result.lag_ns for result in run.results)
    if lag is not None and lag.p99 * 1e6 > LAG_LIMIT_NS:
        reasons.append(f"p99 schedule lag was {lag.p99:.1f} ms, over {LAG_LIMIT_NS / 1e6:g} ms")
    if run.end is not None and run.end.stalled_ns > STALL_LIMIT_SHARE * run.end.duration_ns:
        share = run.end.stalled_ns / run.end.duration_ns
        reasons.append(f"its loop stalled for {share:.1%} of the run, {run.end.longest_stall_ns / 1e6:.0f} ms at most")
    return tuple(reasons)


def _warnings(run: Run) -> tuple[str, ...]:
    facts, warnings = run.facts, [*run.facts.notes, *run.facts.workload.notes]
    if run.end is None:
        warnings.append("the run did not end by itself: what was under way then is missing")
    if run.dropped:
        warnings.append(f"{run.dropped} results could not be written and are missing")
    if facts.workload.dropped:
        warnings.append(f"the source dropped {facts.workload.dropped} requests when it was recorded")
    warnings += [f"the source's {cut}" for cut in facts.workload.cuts]
    warnings += [f"{count} requests of the source not replayed: {why}" for why, count in facts.workload.skipped.items()]
    return tuple(warnings)


def _latencies(results: Sequence[Result], finished: Sequence[Result]) -> dict[str, Quantiles]:
    gaps_us: Counter[int] = Counter()
    for result in finished:
        gaps_us.update(result.gaps_us)
    rows = {
        "ttft": quantiles_ms(result.ttft_ns for result in finished),
        "ttft from sent": quantiles_ms(result.ttft_sent_ns for result in finished),
        "tpot": quantiles_ms(result.tpot_ns for result in finished),
        "itl": quantiles_of_counts_ms(gaps_us),
        "e2e": quantiles_ms(result.e2e_ns for result in finished),
        "e2e from sent": quantiles_ms(result.e2e_sent_ns for result in finished),
        "schedule lag": quantiles_ms(result.lag_ns for result in results),
    }
    return {name: found for name, found in rows.items() if found is not None}


def _streamed(timed: Sequence[tuple[Result, Timing]]) -> list[tuple[Result, Timing]]:
    """Those with a first token before the last one."""
    return [(result, timing) for result, timing in timed if result.is_stream and result.ttft_sent_ns is not None]


def _phase_shares(timed: Sequence[tuple[Result, Timing]]) -> list[PhaseShare]:
    streamed = _streamed(timed)
    ttft_ns = sum(result.ttft_sent_ns or 0 for result, _ in streamed)
    e2e_ns = sum(result.e2e_sent_ns or 0 for result, _ in timed)
    shares = []
    for phase in PHASES:
        values = [value for _, timing in timed if (value := getattr(timing.phases_ns, phase)) is not None]
        found = quantiles_ms(values)
        if found is None:
            continue
        shares.append(
            PhaseShare(
                phase=phase,
                count=found.count,
                mean_ms=found.mean,
                p50_ms=found.p50,
                p95_ms=found.p95,
                share_of_ttft=_phase_sum(streamed, phase) / ttft_ns
                if phase in BEFORE_FIRST_TOKEN and ttft_ns
                else None,
                share_of_e2e=sum(values) / e2e_ns if e2e_ns else 0.0,
            )
        )
    return shares


def _phase_sum(timed: Sequence[tuple[Result, Timing]], phase: str) -> int:
    return sum(getattr(timing.phases_ns, phase) or 0 for _, timing in timed)


def _outside_share(
    timed: Sequence[tuple[Result, Timing]],
    seen_ns: Callable[[Result], int | None],
    inside_ns: Callable[[Timing], int],
) -> float | None:
    seen = sum(seen_ns(result) or 0 for result, _ in timed)
    inside = sum(inside_ns(timing) for _, timing in timed)
    return (seen - inside) / seen if seen else None


def _before_first_token_ns(timing: Timing) -> int:
    return sum(getattr(timing.phases_ns, name) or 0 for name in BEFORE_FIRST_TOKEN)


def _sum_check(timings: Sequence[Timing]) -> SumCheck:
    shares = [abs(timing.unattributed_ns) / timing.total_ns for timing in timings if timing.total_ns]
    return SumCheck(
        checked=len(timings),
        broken=sum(not timing.is_partition for timing in timings),
        max_unattributed_share=max(shares, default=0.0),
        mean_unattributed_share=sum(shares) / len(shares) if shares else 0.0,
    )


class _Side(msgspec.Struct, frozen=True):
    ttft_ns: int | None
    total_ns: int
    phases: Phases


def _pairs(results: Sequence[Result]) -> list[tuple[_Side, _Side]]:
    """(recorded, replayed) of the requests that finished both times, as their gateways saw them.

    The gateway's timing leaves before it knows when the first content left, so the replayed TTFT is the client's. A
    client sees none of a whole answer, but the recorded gateway did: such a pair has no TTFT.
    """
    return [
        (
            _Side(recorded.first_token_at_ns if result.is_stream else None, recorded.total_ns, recorded.phases),
            _Side(result.ttft_sent_ns if result.is_stream else None, result.timing.total_ns, result.timing.phases_ns),
        )
        for result in results
        if (recorded := result.recorded) is not None
        and recorded.outcome is Outcome.FINISHED
        and result.fate is Fate.FINISHED
        and result.timing is not None
    ]


def _comparison(pairs: Sequence[tuple[_Side, _Side]]) -> list[Comparison]:
    rows = [
        _row("ttft", pairs, lambda side: side.ttft_ns),
        _row("total", pairs, lambda side: side.total_ns),
        *(_row(phase, pairs, _phase_of(phase)) for phase in PHASES),
    ]
    return [row for row in rows if row is not None]


def _phase_of(phase: str) -> Callable[[_Side], int | None]:
    return lambda side: getattr(side.phases, phase)


def _row(name: str, pairs: Sequence[tuple[_Side, _Side]], value_ns: Callable[[_Side], int | None]) -> Comparison | None:
    recorded = quantiles_ms(value_ns(side) for side, _ in pairs)
    replayed = quantiles_ms(value_ns(side) for _, side in pairs)
    if recorded is None and replayed is None:
        return None
    return Comparison(name, recorded or _NOTHING, replayed or _NOTHING)


_NOTHING = Quantiles(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _slowest(finished: Sequence[Result]) -> Slowest | None:
    if not finished:
        return None
    result = max(finished, key=lambda result: result.e2e_ns)
    timing = result.timing
    sent_e2e_ns = result.e2e_sent_ns
    return Slowest(
        index=result.index,
        trace_id=(timing.trace_id if timing else "") or result.trace_id,
        request_id=result.request_id,
        recorded_trace_id=result.recorded.trace_id if result.recorded else "",
        ttft_ms=None if result.ttft_ns is None else result.ttft_ns / 1e6,
        e2e_ms=result.e2e_ns / 1e6,
        lag_ms=result.lag_ns / 1e6,
        connect_ms=None if result.sent_ns is None else (result.sent_ns - result.started_ns) / 1e6,
        prompt_tokens=result.prompt_tokens,
        output_tokens=result.output_tokens,
        worker=result.worker,
        phases_ms={name: value / 1e6 for name, value in timing.phases_ns.present()} if timing else {},
        outside_ms=(sent_e2e_ns - timing.total_ns) / 1e6 if timing and sent_e2e_ns is not None else None,
        unattributed_ms=timing.unattributed_ns / 1e6 if timing else None,
    )
