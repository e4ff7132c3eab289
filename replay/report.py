"""A summary as text for people, and the requests as a table for tools."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from protos.core.errors import CaptureError
from protos.core.record import PHASES
from replay.result import Result
from replay.scale import Shape
from replay.stats import Quantiles, Summary

PARQUET_ROWS = 4096


def render(summary: Summary) -> str:
    """Plain text, at most 100 columns or so."""
    sections = [
        _head(summary),
        _warnings(summary),
        _outcomes(summary),
        _latencies(summary),
        _phases(summary),
        _comparison(summary),
        _slowest(summary),
        _shapes(summary),
        _definitions(summary),
    ]
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section))) + "\n"


def _head(summary: Summary) -> Iterator[str]:
    facts = summary.facts
    yield f"Tidegate replay {facts.id}"
    if summary.is_simulated:
        yield "*** SIMULATED ENGINE: tokens and latencies come from a model of an engine, not from one ***"
    if summary.is_client_limited:
        yield "*** CLIENT-LIMITED: " + "; ".join(summary.limits) + " ***"
    if summary.is_interrupted:
        yield "*** INTERRUPTED: stopped before its end ***"
    if not summary.is_complete:
        yield "*** KILLED: made from what was written until then ***"
    pace = f"{facts.speed:g}x, open loop" if facts.driver == "open" else f"{facts.users} users, closed loop"
    yield f"source   {facts.workload.source}" + (f" ({facts.workload.level})" if facts.workload.level else "")
    yield f"target   {facts.target}, model {facts.model}, {pace}"


def _warnings(summary: Summary) -> Iterator[str]:
    for warning in summary.warnings:
        yield f"note: {warning}"


def _outcomes(summary: Summary) -> Iterator[str]:
    yield (
        f"{summary.sent} of {summary.planned} requests sent in {summary.duration_s:.1f} s: "
        + ", ".join(f"{count} {fate}" for fate, count in summary.fates.items())
    )
    yield (
        f"{summary.requests_per_s:.2f} requests/s finished, {summary.output_tokens_per_s:,.0f} output tokens/s "
        f"({summary.output_tokens:,} out, {summary.prompt_tokens:,} in, {summary.cached_tokens:,} of them cached, "
        f"{summary.preemptions} preemptions)"
    )
    slo = str(summary.facts.slo)
    if slo:
        yield f"goodput {summary.goodput_per_s:.2f} requests/s ({summary.goodput_met} met {slo})"
    for kind, count in summary.errors.items():
        message = summary.error_messages.get(kind)
        yield f"  error {kind}: {count}" + (f', the first: "{textwrap.shorten(message, 70)}"' if message else "")
    for reason, count in summary.reject_reasons.items():
        yield f"  refused {reason}: {count}"


def _latencies(summary: Summary) -> Iterator[str]:
    if summary.is_client_limited:
        yield "Latency seen by a generator that was late (ms): NOT the server's"
    else:
        yield "Latency (ms)"
    yield _row("", "count", "mean", "p50", "p90", "p95", "p99", "max")
    for name, found in summary.latency_ms.items():
        yield _row(name, found.count, *(_ms(value) for value in _columns(found)))


def _columns(found: Quantiles) -> tuple[float, ...]:
    return found.mean, found.p50, found.p90, found.p95, found.p99, found.max


def _phases(summary: Summary) -> Iterator[str]:
    if not summary.phases:
        return
    yield "Where the time went (the gateway's phases; shares of the client's time from sent)"
    yield _row("", "count", "mean ms", "p50 ms", "p95 ms", "of TTFT", "of e2e")
    for phase in summary.phases:
        yield _row(
            phase.phase,
            phase.count,
            _ms(phase.mean_ms),
            _ms(phase.p50_ms),
            _ms(phase.p95_ms),
            _percent(phase.share_of_ttft),
            _percent(phase.share_of_e2e),
        )
    outside = _percent(summary.outside_share_of_ttft), _percent(summary.outside_share_of_e2e)
    yield _row("outside", "", "", "", "", *outside)
    check = summary.sum_check
    verdict = "holds" if not check.broken else f"BROKEN for {check.broken}"
    yield (
        f"phases + unattributed = total: {verdict} ({check.checked} checked); unattributed "
        f"{check.mean_unattributed_share:.3%} on average, {check.max_unattributed_share:.3%} at most"
    )


def _comparison(summary: Summary) -> Iterator[str]:
    if not summary.comparison:
        return
    yield f"Recorded against replayed (ms, {summary.compared} requests that finished both times)"
    yield _row("", "p50", "->", "p95", "->", "mean", "->", "change")
    for row in summary.comparison:
        old, new = row.recorded, row.replayed
        change = f"{new.mean / old.mean - 1:+.0%}" if old.mean > 0 and new.count else "-"
        values = (_ms(value) for value in (old.p50, new.p50, old.p95, new.p95, old.mean, new.mean))
        yield _row(row.name, *values, change)


def _slowest(summary: Summary) -> Iterator[str]:
    slowest = summary.slowest
    if slowest is None:
        return
    yield f"Slowest request: number {slowest.index}, {_ms(slowest.e2e_ms)} ms, trace {slowest.trace_id}"
    ttft = f"TTFT {_ms(slowest.ttft_ms)} ms, " if slowest.ttft_ms is not None else ""
    yield (
        f"  {ttft}{slowest.prompt_tokens} tokens in, {slowest.output_tokens} out"
        + (f", on {slowest.worker}" if slowest.worker else "")
        + (f", replays trace {slowest.recorded_trace_id}" if slowest.recorded_trace_id else "")
    )
    parts = {"generator late": slowest.lag_ms}
    if slowest.connect_ms is not None:
        parts["encode, connect"] = slowest.connect_ms
    parts |= slowest.phases_ms
    if slowest.unattributed_ms is not None:
        parts["unattributed"] = slowest.unattributed_ms
    if slowest.outside_ms is not None:
        parts["outside"] = slowest.outside_ms
    for name, value in parts.items():
        yield f"  {name:<15}{_ms(value):>12} ms  {_bar(value, slowest.e2e_ms)}"


def _bar(value: float, whole: float) -> str:
    return "#" * round(40 * value / whole) if whole > 0 else ""


def _shapes(summary: Summary) -> Iterator[str]:
    yield from shape_lines(summary.facts.source_shape, summary.facts.scaled_shape)


def shape_lines(source: Shape, scaled: Shape | None = None) -> Iterator[str]:
    """A workload's shape; with `scaled`, both next to each other."""
    shapes = [source] if scaled is None else [source, scaled]
    yield _wide("Workload", *(["source", "scaled"] if scaled else [""]))
    rows = {
        "requests (chains)": [f"{shape.requests} ({shape.chains})" for shape in shapes],
        "duration": [f"{shape.duration_s:.1f} s" for shape in shapes],
        "rate, busiest second": [f"{shape.rate:.2f}/s, {shape.peak_rate:.0f}" for shape in shapes],
        "gap CV": ["-" if shape.gap_cv is None else f"{shape.gap_cv:.2f}" for shape in shapes],
        **_dispersion_rows(shapes),
        "prompt tokens": [_lengths(shape.prompt_tokens) for shape in shapes],
        "output tokens": [_lengths(shape.output_tokens) for shape in shapes],
        "shared prefix": [_percent(shape.prefix_share) for shape in shapes],
    }
    for name, values in rows.items():
        yield _wide("  " + name, *values)


def _dispersion_rows(shapes: Sequence[Shape]) -> dict[str, list[str]]:
    windows = dict.fromkeys(window for shape in shapes for window in shape.dispersion)
    return {
        f"dispersion in {window}": [
            f"{shape.dispersion[window]:.2f}" if window in shape.dispersion else "-" for shape in shapes
        ]
        for window in windows
    }


def _lengths(found: Sequence[int]) -> str:
    return "-" if not found else f"{found[0]} to {found[3]}, median {found[1]}, p95 {found[2]}"


def _definitions(summary: Summary) -> Iterator[str]:
    yield "Definitions"
    for name, meaning in summary.definitions.items():
        yield f"  {name}: {meaning}"


def _row(name: str, *values: object) -> str:
    return f"{name:<18}" + "".join(f"{value!s:>11}" for value in values)


def _wide(name: str, *values: str) -> str:
    return (f"{name:<24}" + "".join(f"{value:<52}" for value in values)).rstrip()


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


# ---------------------------------------------------------------- Parquet


def write_parquet(results: Sequence[Result], path: Path) -> None:
    """One row per request, times in nanoseconds after the start of the run; raises CaptureError.

    In parts, because there is a gap for each token.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, _parquet_type(pa, name)) for name in _parquet_row(None)])
    temporary = path.with_name(path.name + ".tmp")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for start in range(0, len(results), PARQUET_ROWS):
                rows = [_parquet_row(result) for result in results[start : start + PARQUET_ROWS]]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        os.replace(temporary, path)
    except OSError as error:
        raise CaptureError(f"{path}: cannot be written: {error.strerror or error}") from None


_TEXT_COLUMNS = (
    "session", "fate", "trace_id", "request_id", "worker", "error_kind", "error", "reject_reason", "recorded_trace_id",
    "recorded_outcome",
)  # fmt: skip
_NUMBER_COLUMNS = (
    "index", "intended_ns", "started_ns", "sent_ns", "first_byte_ns", "first_content_ns", "last_content_ns", "done_ns",
    "status", "prompt_tokens", "cached_tokens", "output_tokens", "content_events", "lag_ns", "ttft_ns", "ttft_sent_ns",
    "e2e_ns", "e2e_sent_ns",
)  # fmt: skip


def _parquet_row(result: Result | None) -> dict[str, Any]:
    timing = result.timing if result else None
    recorded = result.recorded if result else None
    row: dict[str, Any] = {name: getattr(result, name, None) for name in _NUMBER_COLUMNS + _TEXT_COLUMNS}
    row["fate"] = result.fate.value if result else None
    row["recorded_trace_id"] = recorded.trace_id if recorded else None
    row["recorded_outcome"] = recorded.outcome.value if recorded else None
    row["is_stream"] = result.is_stream if result else None
    row["tpot_ns"] = result.tpot_ns if result else None
    row["gaps_us"] = list(result.gaps_us) if result else None
    row["total_ns"] = timing.total_ns if timing else None
    row["unattributed_ns"] = timing.unattributed_ns if timing else None
    row["preemptions"] = timing.preemptions if timing else None
    row["recorded_total_ns"] = recorded.total_ns if recorded else None
    for phase in PHASES:
        row[f"{phase}_ns"] = getattr(timing.phases_ns, phase) if timing else None
        row[f"recorded_{phase}_ns"] = getattr(recorded.phases, phase) if recorded else None
    return row


def _parquet_type(pa: Any, name: str) -> Any:
    if name in _TEXT_COLUMNS:
        return pa.string()
    match name:
        case "is_stream":
            return pa.bool_()
        case "tpot_ns":
            return pa.float64()
        case "gaps_us":
            return pa.list_(pa.int64())
        case _:
            return pa.int64()
