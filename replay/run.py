"""A run's folder: the journal of its results, how it ended, and what was made of it.

RUN/manifest.json, segment-*.jsonl.zst   the journal, kind "replay": one Result per request, written as it ends
RUN/end.json                             how the run ended; a killed run has none
RUN/summary.json, requests.parquet, report.txt
"""

from __future__ import annotations

import importlib.metadata
import os
from array import array
from pathlib import Path
from typing import Any

import msgspec

from protos.core import journal
from protos.core.errors import CaptureError
from replay.result import Gaps, Result
from replay.scale import Shape
from replay.slo import Slo
from replay.workload import WorkloadFacts

KIND = "replay"


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a run set out to do."""

    id: str
    started_unix_ns: int
    target: str
    model: str
    is_simulated: bool
    driver: str
    """"open" or "users"."""
    speed: float
    users: int | None = None
    is_length_pinned: bool = True
    planned: int
    slo: Slo
    workload: WorkloadFacts
    source_shape: Shape
    scaled_shape: Shape
    notes: tuple[str, ...] = ()


class RunEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended, as its generator saw it."""

    is_interrupted: bool
    sent: int
    stalled_ns: int
    """Time by which the generator's loop was late, ticks later than 10 ms only."""
    longest_stall_ns: int
    duration_ns: int


class Run(msgspec.Struct, frozen=True):
    facts: RunFacts
    end: RunEnd | None
    results: list[Result]
    dropped: int
    """Results that could not be written."""
    cuts: tuple[str, ...]


def _unpacked(value: Any) -> list[int]:
    if isinstance(value, array):
        return value.tolist()
    raise NotImplementedError(type(value).__name__)


def _packed(_: type, value: Any) -> Gaps:
    return array("q", value)


_encoder = msgspec.json.Encoder(enc_hook=_unpacked)
_result_decoder = msgspec.json.Decoder(Result, dec_hook=_packed)


def open_journal(directory: Path, facts: RunFacts) -> journal.JournalWriter[Result]:
    """Raises CaptureError when the folder exists or cannot be made."""
    return journal.JournalWriter(
        directory,
        kind=KIND,
        id=facts.id,
        writer=f"tidegate-replay {importlib.metadata.version('tidegate')}",
        encode=_encoder.encode,
        facts=msgspec.to_builtins(facts),
        max_items=200_000,
    )


def write_end(directory: Path, end: RunEnd) -> None:
    write_file(directory / "end.json", _encoder.encode(end))


def write_file(path: Path, data: bytes) -> None:
    """All of it or nothing; raises CaptureError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise CaptureError(f"{path}: cannot be written: {error.strerror}") from None


def read_run(directory: Path) -> Run:
    """Also of a run that was killed. Raises CaptureError."""
    manifest = journal.read_manifest(directory)
    if manifest.kind != KIND:
        raise CaptureError(
            f"{directory} is a {manifest.kind}, not a replay; start one with: tidegate replay run {directory}"
        )
    cuts: list[journal.Cut] = []
    try:
        facts = msgspec.convert(manifest.facts, RunFacts)
        results = [_result_decoder.decode(entry.data) for entry in journal.read(directory, cuts.append)]
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError) as error:
        raise CaptureError(f"{directory}: not a replay of this version: {error}") from None
    cut_lines = tuple(f"{cut.segment}: cut after {cut.after_entries} entries" for cut in cuts)
    return Run(facts, _read_end(directory), results, manifest.dropped, cut_lines)


def _read_end(directory: Path) -> RunEnd | None:
    try:
        return msgspec.json.decode((directory / "end.json").read_bytes(), type=RunEnd)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise CaptureError(f"{directory}/end.json: {error}") from None
