"""Workloads out of captures, public traces and lists of prompts."""

from __future__ import annotations

import datetime
import functools
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import msgspec

from protos.core import journal
from protos.core.capture import CaptureEntry, FullContent, HashedContent, read_capture
from protos.core.errors import CaptureError
from protos.core.record import Outcome, RequestRecord
from replay.workload import (
    Body,
    Endpoint,
    FullBody,
    Recorded,
    SyntheticBody,
    Workload,
    WorkloadFacts,
    WorkloadRequest,
    in_order,
)

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
BYTES_PER_TOKEN = 4.0
ENDPOINTS = get_args(Endpoint)
_encoder = msgspec.json.Encoder()


# ---------------------------------------------------------------- captures


def from_capture(directory: Path) -> Workload:
    """Every request of a capture whose content was kept. Raises CaptureError."""
    cuts: list[journal.Cut] = []
    entries = sorted(read_capture(directory, cuts.append), key=lambda entry: entry.record.arrived_unix_ns)
    manifest = journal.read_manifest(directory)
    skipped: Counter[str] = Counter()
    kept = [entry for entry in entries if _is_kept(entry, skipped)]
    block_tokens = _tokens_per_block(kept)
    facts = WorkloadFacts(
        kind="capture",
        source=str(directory),
        level=str(manifest.facts.get("level", "")),
        dropped=manifest.dropped,
        cuts=tuple(f"{cut.segment}: cut after {cut.after_entries} entries ({cut.reason})" for cut in cuts),
        skipped=dict(skipped),
    )
    return Workload(facts, _chained([(entry.record, _body(entry, block_tokens)) for entry in kept]))


def _is_kept(entry: CaptureEntry, skipped: Counter[str]) -> bool:
    if entry.content is None:
        is_refused = entry.record.outcome is Outcome.REJECTED
        skipped["they were refused unread" if is_refused else "their content was not kept"] += 1
    elif entry.record.endpoint not in ENDPOINTS:
        skipped[f"endpoint {entry.record.endpoint}"] += 1
    else:
        return True
    return False


def _tokens_per_block(entries: Iterable[CaptureEntry]) -> dict[int, int]:
    """Tokens that a block of so many bytes holds on average: made-up prompts shall cost what the recorded ones did."""
    sizes = {content.block_bytes for entry in entries if isinstance(content := entry.content, HashedContent)}
    measured = [
        (content.prompt_bytes, entry.record.prompt_tokens)
        for entry in entries
        if isinstance(content := entry.content, HashedContent) and entry.record.prompt_tokens
    ]
    prompt_bytes, tokens = sum(size for size, _ in measured), sum(count for _, count in measured)
    bytes_per_token = prompt_bytes / tokens if tokens and prompt_bytes else BYTES_PER_TOKEN
    return {size: max(1, round(size / bytes_per_token)) for size in sizes}


def _body(entry: CaptureEntry, block_tokens: dict[int, int]) -> Body:
    content = entry.content
    if isinstance(content, FullContent):
        return FullBody(content.body)
    assert content is not None
    return SyntheticBody(
        prompt_tokens=entry.record.prompt_tokens or max(1, round(content.prompt_bytes / BYTES_PER_TOKEN)),
        blocks=content.blocks or (entry.record.request_id,),
        block_tokens=block_tokens[content.block_bytes],
        sampling=content.sampling,
    )


class _Session:
    """Which requests of a session nothing has followed yet."""

    def __init__(self) -> None:
        self._running: list[tuple[int, int]] = []
        """Heap of (end, index)."""
        self._ended: list[int] = []
        """In order of their ends."""

    def take(self, index: int, at_ns: int, end_ns: int) -> int | None:
        """Adds a request, later than all before, and returns the one that it follows.

        That is the last to have ended, for which the client had waited; one that ended before it, such as a title made
        beside a turn, is for a parallel request.
        """
        while self._running and self._running[0][0] <= at_ns:
            self._ended.append(heapq.heappop(self._running)[1])
        heapq.heappush(self._running, (end_ns, index))
        return self._ended.pop() if self._ended else None


def _chained(requests: list[tuple[RequestRecord, Body]]) -> list[WorkloadRequest]:
    """Requests of one session follow each other where the recorded client waited; parallel ones start chains."""
    if not requests:
        return []
    start_ns = requests[0][0].arrived_unix_ns
    sessions: dict[str, _Session] = {}
    chained: list[WorkloadRequest] = []
    for index, (record, body) in enumerate(requests):
        at_ns = record.arrived_unix_ns - start_ns
        after = None
        if record.session:
            after = sessions.setdefault(record.session, _Session()).take(index, at_ns, at_ns + record.total_ns)
        chained.append(
            WorkloadRequest(
                at_ns=at_ns,
                session=record.session or record.request_id,
                turn=0 if after is None else chained[after].turn + 1,
                after=after,
                think_ns=0 if after is None else at_ns - _ended_ns(chained[after]),
                endpoint=cast(Endpoint, record.endpoint),
                is_stream=record.is_stream,
                model=record.model,
                body=body,
                output_tokens=_output_tokens(record),
                cancel_after_ns=record.cancelled_at_ns if record.outcome is Outcome.CANCELLED else None,
                tenant=record.tenant,
                priority=record.priority,
                recorded=_recorded(record),
            )
        )
    return chained


def _ended_ns(request: WorkloadRequest) -> int:
    return request.at_ns + (request.recorded.total_ns if request.recorded else 0)


def _output_tokens(record: RequestRecord) -> int | None:
    """Of a cancelled or failed request the recorded length says when it ended, not how long it would have been."""
    if record.outcome is Outcome.FINISHED and record.output_tokens:
        return record.output_tokens
    return record.max_tokens or record.output_tokens or None


def _recorded(record: RequestRecord) -> Recorded:
    return Recorded(
        request_id=record.request_id,
        trace_id=record.trace_id,
        span_id=record.span_id,
        outcome=record.outcome,
        status=record.status,
        reject_reason=record.reject_reason,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        output_tokens=record.output_tokens,
        phases=record.phases,
        total_ns=record.total_ns,
        unattributed_ns=record.unattributed_ns,
        first_token_at_ns=record.first_token_at_ns,
        is_simulated=record.is_simulated,
    )


# ---------------------------------------------------------------- Azure LLM inference traces


def from_azure(path: Path, *, start_s: float = 0.0, duration_s: float | None = None) -> Workload:
    """A CSV of the Azure LLM inference traces (TIMESTAMP,ContextTokens,GeneratedTokens; LF or CRLF).

    `start_s` and `duration_s` choose a window after the first row. Raises CaptureError with the line at fault.
    """
    rows: list[tuple[int, int, int]] = []
    first_ns: int | None = None
    for time_ns, prompt_tokens, output_tokens in _azure_rows(path):
        first_ns = time_ns if first_ns is None else first_ns
        at_s = (time_ns - first_ns) / 1e9
        if at_s >= start_s and (duration_s is None or at_s < start_s + duration_s):
            rows.append((time_ns - first_ns - round(start_s * 1e9), prompt_tokens, output_tokens))
    if not rows:
        raise CaptureError(f"{path}: no requests in the window; check --start and --duration")
    notes = () if rows == sorted(rows, key=lambda row: row[0]) else ("rows were not in order of time: sorted",)
    facts = WorkloadFacts(
        kind="azure",
        source=str(path),
        settings={"start_s": start_s, "duration_s": duration_s},
        notes=notes,
    )
    requests = [_of_lengths(index, at_ns, *lengths) for index, (at_ns, *lengths) in enumerate(rows)]
    return Workload(facts, in_order(requests))


def _azure_rows(path: Path) -> Iterator[tuple[int, int, int]]:
    for number, line in _text_lines(path):
        if number == 1:
            if line.removeprefix("\ufeff") != AZURE_HEADER:
                raise CaptureError(f"{path}:1: expected the header {AZURE_HEADER}")
            continue
        if not line:
            continue
        try:
            stamp, prompt_tokens, output_tokens = line.split(",")
            row = _unix_ns(stamp), int(prompt_tokens), int(output_tokens)
        except ValueError:
            raise CaptureError(f"{path}:{number}: not a row of {AZURE_HEADER}: {line[:80]!r}") from None
        if row[1] < 0 or row[2] < 0:
            raise CaptureError(f"{path}:{number}: negative number of tokens: {line[:80]!r}")
        yield row


def _unix_ns(stamp: str) -> int:
    """`2023-11-16 18:15:46.6805900`: up to nine digits of a second, more than datetime takes.

    The traces of 2024 say `2024-05-10 00:00:00.009930+00:00`, and leave out a fraction of zero.
    """
    seconds, _, fraction = stamp.removesuffix("+00:00").partition(".")
    return _unix_s(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, "0"))


@functools.lru_cache(maxsize=4096)
def _unix_s(seconds: str) -> int:
    """Kept, because a week's trace has dozens of requests in each second."""
    return int(datetime.datetime.strptime(seconds, "%Y-%m-%d %H:%M:%S").replace(tzinfo=datetime.UTC).timestamp())


def _of_lengths(index: int, at_ns: int, prompt_tokens: int, output_tokens: int) -> WorkloadRequest:
    """A request of which only the lengths are known: a session of its own, sharing no prefix."""
    name = f"r{index}"
    tokens = max(1, prompt_tokens)
    return WorkloadRequest(
        at_ns=at_ns, session=name, body=SyntheticBody(tokens, (name,), tokens), output_tokens=max(1, output_tokens)
    )


# ---------------------------------------------------------------- prompts


def from_prompts(path: Path, *, rate: float, output_tokens: int) -> Workload:
    """One request per line: plain text, or a JSON object with `prompt`, `messages` or `turns`; `rate` per second."""
    requests: list[WorkloadRequest] = []
    for number, line in _text_lines(path):
        if line.strip():
            body = {"messages": _messages(path, number, line), "max_tokens": output_tokens, "temperature": 0}
            requests.append(_of_messages(len(requests), rate, body))
    if not requests:
        raise CaptureError(f"{path}: holds no prompt")
    facts = WorkloadFacts(kind="prompts", source=str(path), settings={"rate": rate, "output_tokens": output_tokens})
    return Workload(facts, requests)


def _of_messages(index: int, rate: float, body: dict[str, Any]) -> WorkloadRequest:
    json = msgspec.Raw(_encoder.encode(body | {"stream": True}))
    return WorkloadRequest(at_ns=int(index / rate * 1e9), session=f"p{index}", body=FullBody(json))


class _PromptLine(msgspec.Struct):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    turns: list[str] | None = None


def _messages(path: Path, number: int, line: str) -> list[dict[str, Any]]:
    if not line.startswith("{"):
        return [{"role": "user", "content": line}]
    try:
        given = msgspec.json.decode(line, type=_PromptLine)
    except msgspec.MsgspecError as error:
        raise CaptureError(f"{path}:{number}: {error}") from None
    if given.messages:
        return given.messages
    text = given.prompt or (given.turns[0] if given.turns else None)
    if text is None:
        raise CaptureError(f"{path}:{number}: has none of prompt, messages, turns")
    return [{"role": "user", "content": text}]


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a text file with LF or CRLF."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except OSError as error:
        raise CaptureError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CaptureError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
