from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos.core import journal
from protos.core.errors import CaptureError
from protos.core.journal import JournalWriter

SEGMENT = "segment-000001.jsonl.zst"


def writer(directory: Path, **limits: Any) -> JournalWriter[Any]:
    return JournalWriter(
        directory, kind="capture", id="j", writer="test", encode=lambda item: json.dumps(item).encode(), **limits
    )


def write(directory: Path, items: list[Any], **limits: Any) -> None:
    journal_writer = writer(directory, **limits)
    for item in items:
        assert journal_writer.offer(item)
    journal_writer.close()


def contents(directory: Path) -> list[Any]:
    return [json.loads(bytes(entry.data)) for entry in journal.read(directory)]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed journal of one segment whose entries differ."""
    directory = tmp_path_factory.mktemp("journal") / "j"
    write(directory, [{"n": n, "text": str(n) * (n % 50)} for n in range(200)])
    return directory


def test_what_is_offered_is_read_in_order(tmp_path: Path) -> None:
    items = [{"n": n} for n in range(1000)]
    write(tmp_path / "j", items, segment_bytes=500)
    assert contents(tmp_path / "j") == items
    verdict = journal.verify(tmp_path / "j")
    assert verdict.is_sound
    assert (verdict.entries, verdict.dropped, verdict.cuts) == (1000, 0, [])
    assert len(verdict.manifest.segments) >= 1
    assert verdict.manifest.is_closed


def test_segments_number_on_where_the_last_one_ended(tmp_path: Path) -> None:
    """Random text, so that compression does not keep the segment small."""
    write(tmp_path / "j", [os.urandom(40_000).hex() for _ in range(20)], segment_bytes=100_000)
    segments = journal.read_manifest(tmp_path / "j").segments
    assert len(segments) > 2
    assert [entry.seq for entry in journal.read(tmp_path / "j")] == list(range(20))
    assert journal.verify(tmp_path / "j").is_sound


def test_open_journal_can_be_read(tmp_path: Path) -> None:
    open_writer = writer(tmp_path / "j")
    open_writer.offer({"n": 1})
    until(lambda: open_writer.stats().written == 1)
    until(lambda: contents(tmp_path / "j") == [{"n": 1}])
    assert journal.verify(tmp_path / "j").is_sound
    open_writer.close()


def test_full_queue_drops_and_counts(tmp_path: Path) -> None:
    slow = writer(tmp_path / "j", max_items=10)
    offered = [slow.offer(n) for n in range(10_000)]
    slow.close()
    kept, dropped = offered.count(True), offered.count(False)
    assert dropped > 0
    verdict = journal.verify(tmp_path / "j")
    assert (verdict.entries, verdict.dropped) == (kept, dropped)
    assert verdict.is_sound


def test_queue_is_bounded_by_bytes(tmp_path: Path) -> None:
    full = writer(tmp_path / "j", max_bytes=100)
    assert full.offer("a", 60)
    assert not full.offer("b", 60)
    full.close()
    assert full.stats().dropped == 1


def test_item_that_cannot_be_encoded_is_dropped_and_the_rest_is_written(tmp_path: Path) -> None:
    write_to = JournalWriter[Any](
        tmp_path / "j", kind="capture", id="j", writer="test", encode=lambda item: bytes(f"{10 // item}", "ascii")
    )
    for item in (1, 0, 2):
        write_to.offer(item)
    write_to.close()
    assert contents(tmp_path / "j") == [10, 5]
    assert journal.verify(tmp_path / "j").dropped == 1
    assert "ZeroDivisionError" in (write_to.stats().last_error or "")


def test_folder_that_exists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="choose another directory"):
        writer(tmp_path)


# ---------------------------------------------------------------- cuts and damage


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_file_cut_anywhere_gives_what_came_before(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    data = (whole / SEGMENT).read_bytes()
    length = int(share * len(data))
    directory = _copy(whole, tmp_path_factory, data[:length])
    cuts: list[journal.Cut] = []
    entries = list(journal.read(directory, cuts.append))
    assert [bytes(entry.data) for entry in entries] == [bytes(entry.data) for entry in journal.read(whole)][
        : len(entries)
    ]
    # The last bytes are the checksum of the zstd frame: without them nothing is missing but the checksum.
    assert [cut.after_entries for cut in cuts] == ([] if length > len(data) - 8 and not cuts else [len(entries)])
    assert journal.verify(directory).is_sound == (length == len(data))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), value=st.integers(1, 255))
def test_damaged_byte_is_noticed_and_never_crashes(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    data = bytearray((whole / SEGMENT).read_bytes())
    data[position % len(data)] ^= value
    directory = _copy(whole, tmp_path_factory, bytes(data))
    assert not journal.verify(directory).is_sound
    for _ in journal.read(directory):
        pass


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), manifest=st.one_of(st.none(), st.binary(max_size=60)))
def test_only_capture_error_escapes_for_any_bytes(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: bytes, manifest: bytes | None
) -> None:
    directory = _copy(whole, tmp_path_factory, data)
    if manifest is not None:
        (directory / "manifest.json").write_bytes(manifest)
    try:
        verdict = journal.verify(directory)
    except CaptureError:
        assert manifest is not None
    else:
        assert not verdict.is_sound


def _copy(source: Path, tmp_path_factory: pytest.TempPathFactory, segment: bytes) -> Path:
    directory = tmp_path_factory.mktemp("copy")
    (directory / "manifest.json").write_bytes((source / "manifest.json").read_bytes())
    (directory / SEGMENT).write_bytes(segment)
    return directory


def test_missing_segment_is_a_problem(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = _copy(whole, tmp_path_factory, b"")
    (directory / SEGMENT).unlink()
    assert journal.verify(directory).problems == [f"{SEGMENT}: listed in the manifest, but missing"]


def test_newer_format_says_upgrade(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = _copy(whole, tmp_path_factory, b"")
    manifest = json.loads((directory / "manifest.json").read_bytes()) | {"format_version": 99}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CaptureError, match="newer than this Tidegate reads"):
        journal.read_manifest(directory)


def test_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="missing: no such folder"):
        journal.read_manifest(tmp_path / "missing")


@pytest.mark.parametrize("path", ["file", "empty"])
def test_what_is_no_journal_is_a_capture_error(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaptureError, match="is not a capture"):
        journal.verify(tmp_path / path)


# ---------------------------------------------------------------- faults of the process and of the disk


def start_writer(directory: Path, body: str) -> subprocess.Popen[str]:
    """A process that makes a journal; `body` runs with `w`, its writer."""
    code = (
        "import json, os, signal, sys, time, resource\n"
        "from pathlib import Path\n"
        "from protos.core.journal import JournalWriter\n"
        f"w = JournalWriter(Path({str(directory)!r}), kind='capture', id='j', writer='test',\n"
        "    encode=lambda item: json.dumps(item).encode())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code + body],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_killed_writer_loses_at_most_its_last_second(tmp_path: Path) -> None:
    body = """
n = 0
while True:
    w.offer({"n": n, "at": time.monotonic(), "text": os.urandom(50).hex()})
    n += 1
    if n % 100 == 0:
        time.sleep(0.001)
"""
    with start_writer(tmp_path / "j", body) as process:
        time.sleep(2.0)
        process.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
    verdict = journal.verify(tmp_path / "j")
    assert verdict.is_sound
    assert len(verdict.cuts) == 1
    found = contents(tmp_path / "j")
    numbers = [item["n"] for item in found]
    assert numbers == sorted(set(numbers))
    assert killed_at - found[-1]["at"] < 1.0


def test_full_disk_drops_and_counts_and_traffic_goes_on(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: writes fail part of the way through, as there."""
    body = """
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def settle():
    while w.stats().queued:
        time.sleep(0.01)
    time.sleep(0.6)

sent = 0
def send(count):
    global sent
    for _ in range(count):
        assert w.offer({"n": sent, "text": os.urandom(2000).hex()})
        sent += 1

send(20)
settle()
limit(200_000)
send(400)
settle()
stats = w.stats()
assert stats.dropped > 0, stats
assert "too large" in stats.last_error, stats
limit(resource.RLIM_INFINITY)
time.sleep(1.0)
send(20)
w.close()
stats = w.stats()
print(json.dumps({"sent": sent, "written": stats.written, "dropped": stats.dropped}))
"""
    with start_writer(tmp_path / "j", body) as process:
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    seen = json.loads(out)
    verdict = journal.verify(tmp_path / "j")
    assert verdict.problems == []
    numbers = [item["n"] for item in contents(tmp_path / "j")]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == seen["written"] == verdict.entries
    assert seen["sent"] - len(numbers) == seen["dropped"] == verdict.dropped
    assert numbers[:20] == list(range(20))
    assert numbers[-20:] == list(range(seen["sent"] - 20, seen["sent"]))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_that_is_full_for_good_keeps_what_it_took(small_disk: Path) -> None:
    full = writer(small_disk / "j")
    for number in range(200):
        assert full.offer({"n": number, "text": os.urandom(10_000).hex()})
    until(lambda: full.stats().dropped > 0)
    full.close()
    stats = full.stats()
    assert stats.written + stats.dropped == 200
    assert "No space left" in (stats.last_error or "")
    verdict = journal.verify(small_disk / "j")
    assert verdict.problems == []
    assert verdict.entries == stats.written
    assert [item["n"] for item in contents(small_disk / "j")] == list(range(stats.written))


def test_file_size_limit_is_what_the_tests_think() -> None:
    """RLIMIT_FSIZE gives EFBIG instead of a signal, because Python ignores SIGXFSZ."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
