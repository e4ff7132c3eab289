"""Captures, journals and workloads as lines for people."""

from __future__ import annotations

import datetime
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from protos.core import journal
from protos.core.capture import read_capture
from protos.core.errors import CaptureError
from protos.core.record import RequestRecord
from replay.report import shape_lines
from replay.scale import measure
from replay.workload import Workload


def _journal_folders(directory: Path) -> list[Path]:
    try:
        return sorted(path.parent for path in directory.glob("*/manifest.json"))
    except OSError as error:
        raise CaptureError(f"{directory}: {error.strerror}") from None


def list_journals(directory: Path) -> Iterator[str]:
    """One line per capture in `directory`. Raises CaptureError when there is no such folder."""
    if not directory.is_dir():
        raise CaptureError(f"{directory}: no such folder; name the one that the gateway's --capture-dir says")
    folders = _journal_folders(directory)
    if not folders:
        yield f"no captures in {directory}"
        return
    yield f"{'ID':<34}{'KIND':<9}{'LEVEL':<8}{'STARTED (UTC)':<21}{'ENTRIES':>9}{'DROPPED':>9}{'MIB':>8}  STATE"
    for folder in folders:
        yield _journal_line(folder)


def _journal_line(folder: Path) -> str:
    try:
        manifest = journal.read_manifest(folder)
    except CaptureError as error:
        return f"{folder.name:<34}{error}"
    # The manifest of an open journal is behind its segments: those are counted.
    entries = manifest.entries if manifest.is_closed else sum(1 for _ in journal.read(folder))
    size_mib = sum(path.stat().st_size for path in folder.glob("segment-*")) / 2**20
    return (
        f"{folder.name:<34}{manifest.kind:<9}{manifest.facts.get('level', '')!s:<8}{_utc(manifest.created_unix_ns):<21}"
        f"{entries:>9}{manifest.dropped:>9}{size_mib:>8.2f}  {'closed' if manifest.is_closed else 'open'}"
    )


def check_is_capture(path: Path) -> None:
    """Raises CaptureError naming the captures inside, when `path` is a folder of them."""
    inside = [] if (path / "manifest.json").exists() else _journal_folders(path)
    if inside:
        names = ", ".join(folder.name for folder in inside[-3:])
        raise CaptureError(f"{path} is a folder of captures: name one of them (the last: {names})")


def show_capture(path: Path, limit: int) -> Iterator[str]:
    """Facts and the first `limit` requests. Raises CaptureError."""
    check_is_capture(path)
    manifest = journal.read_manifest(path)
    cuts: list[journal.Cut] = []
    records: list[RequestRecord] = []
    outcomes: Counter[str] = Counter()
    for entry in read_capture(path, cuts.append):
        outcomes[entry.record.outcome.value] += 1
        if len(records) < limit:
            records.append(entry.record)
    yield f"capture {manifest.id}, by {manifest.writer}, started {_utc(manifest.created_unix_ns)} UTC"
    yield f"{outcomes.total()} requests, {manifest.dropped} dropped, " + ", ".join(
        f"{name} {value}" for name, value in manifest.facts.items() if value is not None
    )
    yield from (f"{cut.segment}: cut after {cut.after_entries} entries ({cut.reason})" for cut in cuts)
    yield ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    yield ""
    yield (
        f"{'ARRIVED':<14}{'OUTCOME':<11}{'STATUS':>6}{'IN':>8}{'OUT':>7}{'TTFT MS':>10}{'TOTAL MS':>11}  "
        f"{'WORKER':<22}{'ENDPOINT':<22}TRACE"
    )
    yield from map(_record_line, records)
    if outcomes.total() > limit:
        yield f"... and {outcomes.total() - limit} more (--limit)"


def _record_line(record: RequestRecord) -> str:
    ttft = "-" if record.first_token_at_ns is None else f"{record.first_token_at_ns / 1e6:.1f}"
    return (
        f"{_utc(record.arrived_unix_ns)[11:]:<14}{record.outcome.value:<11}{record.status:>6}"
        f"{record.prompt_tokens if record.prompt_tokens is not None else '-':>8}{record.output_tokens:>7}"
        f"{ttft:>10}{record.total_ns / 1e6:>11.1f}  {record.worker or '-':<22}{record.endpoint:<22}{record.trace_id}"
    )


def capture_json(path: Path, limit: int) -> Iterator[str]:
    """The first `limit` entries as they are. Raises CaptureError."""
    check_is_capture(path)
    for entry in itertools.islice(read_capture(path), limit):
        yield msgspec.json.encode(entry).decode()


def verify(path: Path) -> journal.Verdict:
    """Raises CaptureError when there is no journal."""
    check_is_capture(path)
    return journal.verify(path)


def verdict_lines(path: Path, verdict: journal.Verdict) -> Iterator[str]:
    manifest = verdict.manifest
    state = "sound" if verdict.is_sound else "DAMAGED"
    yield f"{path}: {manifest.kind} {manifest.id}: {state}, {verdict.entries} entries, {verdict.dropped} dropped"
    if not manifest.is_closed:
        yield "  still open, or never closed: everything up to the last flush is there"
    for cut in verdict.cuts:
        yield f"  {cut.segment}: cut after {cut.after_entries} entries ({cut.reason})"
    for problem in verdict.problems:
        yield f"  problem: {problem}"


def show_workload(workload: Workload) -> Iterator[str]:
    facts = workload.facts
    yield f"{facts.kind} from {facts.source}" + (f" ({facts.level})" if facts.level else "")
    for note in (*facts.notes, *facts.cuts):
        yield f"note: {note}"
    if facts.dropped:
        yield f"note: the source dropped {facts.dropped} requests"
    yield from (f"note: {count} requests skipped: {why}" for why, count in facts.skipped.items())
    yield from shape_lines(measure(workload.requests))


def _utc(unix_ns: int) -> str:
    return f"{datetime.datetime.fromtimestamp(unix_ns / 1e9, datetime.UTC):%Y-%m-%d %H:%M:%S}"
