"""A workload: what to send and when, and the file that keeps it.

The file is JSON lines, zstd-compressed when its name ends in `.zst`: one `{"t":"facts",...}` line, then one
`{"t":"request",...}` line per request in order of `at_ns`. The unit of pacing is the chain: a request whose `after` is
None starts one at `at_ns`; any other waits for request number `after` (counted from 0) to end, and then `think_ns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
import zstandard

from protos.core.contract import Sampling
from protos.core.errors import CaptureError
from protos.core.record import Outcome, Phases

FORMAT_VERSION = 1
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
READ_BYTES = 1 << 17

Nanoseconds = Annotated[int, msgspec.Meta(ge=0)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]


class FullBody(msgspec.Struct, frozen=True, tag="full"):
    """The client's own JSON body."""

    json: msgspec.Raw


class SyntheticBody(msgspec.Struct, frozen=True, tag="synthetic", omit_defaults=True):
    """A prompt to be made up: block i is named blocks[i] and holds `block_tokens` tokens, the last one what remains."""

    prompt_tokens: Tokens
    blocks: tuple[str, ...]
    block_tokens: Tokens
    sampling: Sampling = Sampling()


Body = FullBody | SyntheticBody
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/generate"]


class Recorded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of the request when it was recorded: the part of its RequestRecord that a comparison needs."""

    request_id: str = ""
    trace_id: str = ""
    span_id: str = ""
    outcome: Outcome
    status: int
    reject_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    phases: Phases = Phases()
    total_ns: int = 0
    unattributed_ns: int = 0
    first_token_at_ns: int | None = None
    is_simulated: bool = False

    @property
    def traceparent(self) -> str | None:
        return f"00-{self.trace_id}-{self.span_id}-01" if self.trace_id and self.span_id else None


class WorkloadRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t", tag="request"):
    at_ns: Nanoseconds
    """Intended send, nanoseconds after the start. For a request with `after`, when it was sent in the source."""
    session: str
    turn: int = 0
    after: int | None = None
    think_ns: Nanoseconds = 0
    endpoint: Endpoint = "/v1/chat/completions"
    is_stream: bool = True
    model: str = ""
    body: Body
    output_tokens: Tokens | None = None
    """Tokens that the answer shall have; None leaves the length to the model."""
    cancel_after_ns: Nanoseconds | None = None
    """The client left this long after it sent the request."""
    tenant: str = ""
    priority: str = ""
    recorded: Recorded | None = None


class WorkloadFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t", tag="facts"):
    """Where a workload comes from and what it lacks."""

    format_version: int = FORMAT_VERSION
    kind: str
    """"capture", "azure", "prompts" or "synth"."""
    source: str
    level: str = ""
    """Privacy level of a capture."""
    settings: dict[str, Any] = {}
    dropped: int = 0
    """Requests that the source saw and did not keep."""
    cuts: tuple[str, ...] = ()
    skipped: dict[str, int] = {}
    """Requests of the source that cannot be replayed, by reason."""
    notes: tuple[str, ...] = ()


class Workload(msgspec.Struct, frozen=True):
    facts: WorkloadFacts
    requests: Sequence[WorkloadRequest]


_encoder = msgspec.json.Encoder()
_line_decoder = msgspec.json.Decoder(WorkloadFacts | WorkloadRequest)


def in_order(requests: Iterable[WorkloadRequest]) -> list[WorkloadRequest]:
    """Sorted by `at_ns`, with `after` renumbered."""
    given = list(requests)
    order = sorted(range(len(given)), key=lambda index: given[index].at_ns)
    place = {index: position for position, index in enumerate(order)}
    return [
        request if request.after is None else msgspec.structs.replace(request, after=place[request.after])
        for request in (given[index] for index in order)
    ]


def first_part(workload: Workload, duration_ns: int) -> Workload:
    """The requests that the source sent in its first `duration_ns`."""
    kept = [request for request in workload.requests if request.at_ns < duration_ns]
    return Workload(workload.facts, kept)


def save(workload: Workload, path: Path) -> None:
    """Raises CaptureError when the file cannot be written."""
    try:
        with path.open("wb") as file:
            if path.suffix == ".zst":
                with zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False) as compressed:
                    _write(workload, compressed)
            else:
                _write(workload, file)
    except OSError as error:
        raise CaptureError(f"{path}: cannot be written: {error.strerror}") from None


def _write(workload: Workload, file: IO[bytes] | zstandard.ZstdCompressionWriter) -> None:
    file.write(_encoder.encode(workload.facts) + b"\n")
    for request in workload.requests:
        file.write(_encoder.encode(request) + b"\n")


def load(path: Path) -> Workload:
    """Raises CaptureError with the line at fault."""
    try:
        with path.open("rb") as file:
            return _read(path, _lines(path, file))
    except OSError as error:
        raise CaptureError(f"{path}: cannot be read: {error.strerror}") from None
    except zstandard.ZstdError as error:
        raise CaptureError(f"{path}: damaged: {error}") from None


def _lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    is_compressed = file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC
    file.seek(0)
    if not is_compressed:
        yield from file
        return
    rest = b""
    for data in _decompressed(path, file):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decompressed(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame, because only a frame knows that it is cut."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    while data := file.read(READ_BYTES):
        while data:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
    if not frame.eof:
        raise CaptureError(f"{path}: damaged: it is cut short")


def _read(path: Path, lines: Iterator[bytes]) -> Workload:
    facts: WorkloadFacts | None = None
    requests: list[WorkloadRequest] = []
    for number, line in enumerate(lines, 1):
        try:
            item = _line_decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CaptureError(f"{path}:{number}: not a line of a workload: {error}") from None
        if isinstance(item, WorkloadFacts):
            facts = item
            if facts.format_version > FORMAT_VERSION:
                raise CaptureError(f"{path}: format {facts.format_version} is newer than this Tidegate: upgrade it")
        elif requests and item.at_ns < requests[-1].at_ns:
            raise CaptureError(f"{path}:{number}: sent before the request above it: they must be in order of at_ns")
        elif item.after is not None and not 0 <= item.after < len(requests):
            raise CaptureError(f"{path}:{number}: waits for request {item.after}, which does not come before it")
        elif isinstance(item.body, FullBody) and not bytes(item.body.json).startswith(b"{"):
            raise CaptureError(f"{path}:{number}: the body is not a JSON object")
        elif isinstance(item.body, SyntheticBody) and not item.body.blocks:
            raise CaptureError(f"{path}:{number}: a made-up prompt needs at least one block")
        else:
            requests.append(item)
    if facts is None:
        raise CaptureError(f"{path}: not a workload: it has no facts line")
    return Workload(facts, requests)
