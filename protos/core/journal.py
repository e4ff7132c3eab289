"""An append-only log of JSON lines in zstd segments with a manifest: captures and replay results are kept in it.

    DIRECTORY/manifest.json            what should be there: written at every change, atomically
    DIRECTORY/segment-000001.jsonl.zst head line, entry lines, drop lines, and an end line when it was closed

Lines: {"t":"head",...} {"t":"entry","seq":n,"data":{...}} {"t":"drop","count":n} {"t":"end",...}. Sequence numbers
count entries from 0 without holes. Entries are flushed as whole zstd blocks at least once a second, so a process that
dies loses at most its last second, and a file cut anywhere is read up to the cut.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec
import zstandard

from protos.core.errors import CaptureError

FORMAT_VERSION = 1
FLUSH_SECONDS = 0.5
RETRY_SECONDS = 1.0
READ_BYTES = 1 << 17

T = TypeVar("T")


class SegmentInfo(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    first_seq: int
    entries: int
    compressed_bytes: int
    sha256: str


class Manifest(msgspec.Struct, kw_only=True):
    """What a journal holds. `segments` lists the closed ones; an open one is on disk only."""

    format_version: int = FORMAT_VERSION
    kind: str
    """"capture" or "replay"."""
    id: str
    writer: str
    """Name and version of what wrote it."""
    created_unix_ns: int
    facts: dict[str, Any] = {}
    """What the kind wants to remember: privacy level, key id, target, scaling."""
    is_closed: bool = False
    entries: int = 0
    dropped: int = 0
    segments: list[SegmentInfo] = []


class Head(msgspec.Struct, frozen=True, tag_field="t", tag="head"):
    format_version: int
    kind: str
    id: str
    segment: int
    first_seq: int


class Entry(msgspec.Struct, frozen=True, tag_field="t", tag="entry"):
    seq: int
    data: msgspec.Raw


class Drop(msgspec.Struct, frozen=True, tag_field="t", tag="drop"):
    count: int


class End(msgspec.Struct, frozen=True, tag_field="t", tag="end"):
    entries: int
    dropped: int


Line = Head | Entry | Drop | End
_encoder = msgspec.json.Encoder()
_line_decoder = msgspec.json.Decoder(Line)
_manifest_decoder = msgspec.json.Decoder(Manifest)


class JournalStats(msgspec.Struct, frozen=True):
    written: int
    dropped: int
    queued: int
    last_error: str | None


class JournalWriter(Generic[T]):
    """A bounded queue drained by one thread.

    `offer` never blocks and never raises: when the queue is full, or the disk is, entries are dropped and counted. The
    count is in the manifest, in the segment itself, and in `stats`. `encode` turns an item into one JSON object on one
    line and runs on the writer's thread.
    """

    def __init__(
        self,
        directory: Path,
        *,
        kind: str,
        id: str,
        writer: str,
        encode: Callable[[T], bytes],
        facts: dict[str, Any] | None = None,
        max_items: int = 20_000,
        max_bytes: int = 256 * 1024 * 1024,
        segment_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        """Creates `directory` and its manifest; raises CaptureError when it cannot."""
        self.directory = directory
        self._encode = encode
        self._max_items, self._max_bytes, self._segment_bytes = max_items, max_bytes, segment_bytes
        self._manifest = Manifest(kind=kind, id=id, writer=writer, created_unix_ns=time.time_ns(), facts=facts or {})
        # Shared between the caller's thread and the writer's: the deque (atomic append and popleft) and the counters
        # below, each of which only one side adds to.
        self._queue: collections.deque[tuple[T, int]] = collections.deque()
        self._bytes_in = self._bytes_out = 0
        self._dropped_at_door = 0
        self._dropped_at_disk = 0
        self._dropped_noted = 0
        self._last_error: str | None = None
        self._segment: _Segment | None = None
        self._segment_number = 0
        self._retry_at = 0.0
        self._closing = threading.Event()
        self._wake = threading.Event()
        try:
            directory.mkdir(parents=True, exist_ok=False)
            self._write_manifest()
        except OSError as error:
            raise CaptureError(f"cannot write to {directory}: {error.strerror}; choose another directory") from None
        self._thread = threading.Thread(target=self._run, name=f"{kind}-writer", daemon=True)
        self._thread.start()

    def offer(self, item: T, size_bytes: int = 0) -> bool:
        """Queue one item; False when it was dropped. `size_bytes` is what it holds in memory."""
        if len(self._queue) >= self._max_items or self._bytes_in - self._bytes_out + size_bytes > self._max_bytes:
            self._dropped_at_door += 1
            return False
        self._bytes_in += size_bytes
        self._queue.append((item, size_bytes))
        return True

    def stats(self) -> JournalStats:
        return JournalStats(self._manifest.entries, self._dropped, len(self._queue), self._last_error)

    def close(self) -> None:
        """Write what is queued, close the segment and the manifest. Call it once."""
        self._closing.set()
        self._wake.set()
        self._thread.join()

    @property
    def _dropped(self) -> int:
        return self._dropped_at_door + self._dropped_at_disk

    # Everything below runs on the writer's thread.

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(FLUSH_SECONDS)
            self._drain()
        self._drain()
        self._finish()

    def _drain(self) -> None:
        """Write all that is queued, and flush it, also while more keeps coming."""
        flush_at = time.monotonic() + FLUSH_SECONDS
        while self._queue:
            item, size = self._queue.popleft()
            self._bytes_out += size
            self._write(item)
            if time.monotonic() >= flush_at:
                self._flush()
                flush_at = time.monotonic() + FLUSH_SECONDS
        self._flush()

    def _flush(self) -> None:
        self._note_drops()
        if self._segment is not None:
            self._guard(self._segment.flush)

    def _write(self, item: T) -> None:
        segment = self._open_segment()
        data = None if segment is None else self._encoded(item)
        if segment is None or data is None:
            self._dropped_at_disk += 1
            return
        line = _encoder.encode(Entry(self._manifest.entries, msgspec.Raw(data)))
        if not self._guard(lambda: segment.write_entry(line)):
            self._dropped_at_disk += 1
            return
        self._manifest.entries += 1
        if segment.compressed_bytes >= self._segment_bytes:
            self._close_segment()

    def _encoded(self, item: T) -> bytes | None:
        try:
            return self._encode(item)
        except Exception as error:  # one odd item must not end the recording of all others
            self._last_error = f"{type(error).__name__}: {error}"
            return None

    def _open_segment(self) -> _Segment | None:
        if self._segment is None and (time.monotonic() >= self._retry_at or self._closing.is_set()):
            self._guard(self._start_segment)
        return self._segment

    def _start_segment(self) -> None:
        self._segment_number += 1
        manifest = self._manifest
        head = Head(FORMAT_VERSION, manifest.kind, manifest.id, self._segment_number, manifest.entries)
        path = self.directory / f"segment-{self._segment_number:06d}.jsonl.zst"
        self._segment = _Segment(path, manifest.entries, _encoder.encode(head))

    def _close_segment(self) -> None:
        segment = self._segment
        if segment is not None and self._guard(lambda: self._manifest.segments.append(segment.close(self._dropped))):
            self._segment = None
        self._save_manifest()

    def _finish(self) -> None:
        self._close_segment()
        self._manifest.is_closed = True
        self._save_manifest()

    def _note_drops(self) -> None:
        new = self._dropped - self._dropped_noted
        segment = self._segment
        if new and segment is not None:
            line = _encoder.encode(Drop(new))
            if self._guard(lambda: segment.write_line(line)):
                self._dropped_noted += new
                self._save_manifest()

    def _guard(self, action: Callable[[], object]) -> bool:
        """Do disk work. A full or broken disk ends the segment as it is; a new one is tried after a second."""
        try:
            action()
        except OSError as error:
            self._last_error = f"{error.strerror}: {self.directory}"
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if self._segment is not None:
                lost = self._segment.abandon()
                self._dropped_at_disk += lost
                # The lost entries' numbers are given again, so that what is on disk counts without holes.
                self._manifest.entries -= lost
                self._segment = None
            return False
        return True

    def _save_manifest(self) -> None:
        """A manifest that is behind is bad, but no reason to end a segment: it is tried again at the next change."""
        try:
            self._write_manifest()
        except OSError as error:
            self._last_error = f"{error.strerror}: {self.directory}"

    def _write_manifest(self) -> None:
        self._manifest.dropped = self._dropped
        data = msgspec.json.format(_encoder.encode(self._manifest), indent=1)
        temporary = self.directory / "manifest.json.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, self.directory / "manifest.json")


class _Segment:
    """One open segment file. `write_*` buffer, `flush` makes them readable; all raise OSError."""

    def __init__(self, path: Path, first_seq: int, head: bytes) -> None:
        self.path = path
        self.first_seq = first_seq
        self.entries = 0
        self.unflushed = 0
        self.compressed_bytes = 0
        self._flushed_bytes = 0
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
        self._hash = hashlib.sha256()
        self._dirty = False
        try:
            self.write_line(head)
            self.flush()
        except OSError:
            self._file.close()
            path.unlink()
            raise

    def write_entry(self, line: bytes) -> None:
        self.entries += 1
        self.unflushed += 1
        try:
            self.write_line(line)
        except OSError:
            self.entries -= 1  # the caller counts this one
            self.unflushed -= 1
            raise

    def write_line(self, line: bytes) -> None:
        self._dirty = True
        self._put(self._compressor.compress(line + b"\n"))

    def flush(self) -> None:
        if self._dirty:
            self._put(self._compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
            self._dirty = False
        self.unflushed = 0
        self._flushed_bytes = self.compressed_bytes

    def close(self, dropped: int) -> SegmentInfo:
        self.flush()
        self.write_line(_encoder.encode(End(self.entries, dropped)))
        self._put(self._compressor.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
        os.fsync(self._file.fileno())
        self._file.close()
        return SegmentInfo(
            name=self.path.name,
            first_seq=self.first_seq,
            entries=self.entries,
            compressed_bytes=self.compressed_bytes,
            sha256=self._hash.hexdigest(),
        )

    def abandon(self) -> int:
        """Cut the file after the last flush; returns how many entries are lost by that.

        Without the cut a part of them might be readable, under numbers that are given again.
        """
        with contextlib.suppress(OSError):
            self._file.truncate(self._flushed_bytes)
        self._file.close()
        return self.unflushed

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._file.write(view)
            self._hash.update(view[:written])
            self.compressed_bytes += written
            view = view[written:]


# ---------------------------------------------------------------- reading


class Cut(msgspec.Struct, frozen=True):
    """Where a segment ends before its end line."""

    segment: str
    after_entries: int
    reason: str


class Verdict(msgspec.Struct, kw_only=True):
    """What `verify` found. `problems` are damage; `cuts` are what a crash leaves, and are accepted."""

    manifest: Manifest
    entries: int = 0
    dropped: int = 0
    cuts: list[Cut] = []
    problems: list[str] = []

    @property
    def is_sound(self) -> bool:
        return not self.problems


def read_manifest(directory: Path) -> Manifest:
    """Raises CaptureError when there is none or it is of a newer format."""
    path = directory / "manifest.json"
    try:
        manifest = _manifest_decoder.decode(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not directory.exists():
            raise CaptureError(f"{directory}: no such folder") from None
        raise CaptureError(f"{directory} is not a capture or a replay: it has no manifest.json") from None
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CaptureError(f"{path}: not a manifest: {error}") from None
    if manifest.format_version > FORMAT_VERSION:
        raise CaptureError(
            f"{path}: format {manifest.format_version} is newer than this Tidegate reads ({FORMAT_VERSION}): upgrade it"
        )
    return manifest


def read(directory: Path, on_cut: Callable[[Cut], None] | None = None) -> Iterator[Entry]:
    """All entries in order, up to the cut of each segment. Raises CaptureError only for what is not a journal."""
    read_manifest(directory)
    for path in _segment_paths(directory):
        for line in _read_segment(path, on_cut or _ignore_cut):
            if isinstance(line, Entry):
                yield line


def verify(directory: Path) -> Verdict:
    """Read everything and compare it with the manifest. Raises CaptureError when there is no journal to read."""
    verdict = Verdict(manifest=read_manifest(directory))
    listed = {segment.name: segment for segment in verdict.manifest.segments}
    paths = _segment_paths(directory)
    for name in listed.keys() - {path.name for path in paths}:
        verdict.problems.append(f"{name}: listed in the manifest, but missing")
    for path in paths:
        _verify_segment(path, listed.get(path.name), verdict)
    # Drops are also in the segments, but the manifest may know of later ones, and after a crash of earlier ones.
    verdict.dropped = max(verdict.dropped, verdict.manifest.dropped)
    return verdict


def _verify_segment(path: Path, listed: SegmentInfo | None, verdict: Verdict) -> None:
    if listed is not None:
        digest = _sha256(path)
        if digest != listed.sha256:
            verdict.problems.append(f"{path.name}: SHA-256 is {digest[:12]}…, the manifest says {listed.sha256[:12]}…")
    cuts: list[Cut] = []
    found = 0
    for line in _read_segment(path, cuts.append):
        match line:
            case Entry(seq):
                if seq != verdict.entries:
                    verdict.problems.append(f"{path.name}: entry {seq} follows {verdict.entries - 1}")
                verdict.entries = seq + 1
                found += 1
            case Drop(count):
                verdict.dropped += count
            case End(entries) if entries != found:
                verdict.problems.append(f"{path.name}: holds {found} entries, its end line says {entries}")
            case _:
                pass
    if cuts and listed is not None:
        verdict.problems.append(f"{path.name}: was closed, but is cut after {cuts[0].after_entries} entries")
    verdict.cuts += cuts


def _segment_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*.jsonl.zst"))


def _ignore_cut(_: Cut) -> None:
    pass


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}") from None


def _read_segment(path: Path, on_cut: Callable[[Cut], None]) -> Iterator[Line]:
    entries = 0
    is_ended = False
    reason = "still open, or never closed"
    try:
        for raw in _lines(path):
            line = _line_decoder.decode(raw)
            entries += isinstance(line, Entry)
            is_ended = isinstance(line, End)
            yield line
    except (zstandard.ZstdError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        reason, is_ended = f"unreadable: {error}", False
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror}") from None
    if not is_ended:
        on_cut(Cut(path.name, entries, reason))


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines only: what follows the last newline of a cut file is not one."""
    decompressor = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            *lines, rest = (rest + decompressor.decompress(chunk)).split(b"\n")
            yield from lines
