from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from protos.core.errors import CaptureError
from replay.workload import (
    FullBody,
    SyntheticBody,
    Workload,
    WorkloadFacts,
    WorkloadRequest,
    first_part,
    in_order,
    load,
    save,
)

FACTS = WorkloadFacts(kind="synth", source="test", settings={"rate": 5})


def request(at_ns: int, after: int | None = None) -> WorkloadRequest:
    body = SyntheticBody(5, ("a", "b"), 3)
    return WorkloadRequest(at_ns=at_ns, session=f"s{at_ns}", body=body, after=after, output_tokens=3)


@pytest.mark.parametrize("name", ["w.jsonl", "w.jsonl.zst"])
def test_saved_workload_comes_back(name: str, tmp_path: Path) -> None:
    full = WorkloadRequest(at_ns=7, session="x", body=FullBody(msgspec.Raw(b'{"prompt":"\xc3\xa4"}')))
    workload = Workload(FACTS, [request(0), request(3, after=0), full])
    save(workload, tmp_path / name)
    assert load(tmp_path / name) == workload


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b""], "w.jsonl:1: not a line of a workload"),
        ([b"{}"], "w.jsonl:1: not a line of a workload"),
        ([], "it has no facts line"),
        ([b'{"t":"facts","kind":"synth","source":"x","format_version":9}'], "format 9 is newer"),
        ([b'{"t":"request","at_ns":0,"session":"s","body":{"type":"full","json":[1]}}'], "not a JSON object"),
        (
            [b'{"t":"request","at_ns":0,"session":"s","after":0,"body":{"type":"full","json":{}}}'],
            "waits for request 0",
        ),
        (
            [b'{"t":"request","at_ns":0,"session":"s","endpoint":"/admin","body":{"type":"full","json":{}}}'],
            "Invalid enum value '/admin'",
        ),
        ([b'{"t":"request","at_ns":0,"session":"s","body":{"type":"synthetic","prompt_tokens":1}}'], "w.jsonl:1"),
        ([b"\xff\xfe"], "w.jsonl:1"),
        (
            [
                b'{"t":"request","at_ns":9,"session":"s","body":{"type":"full","json":{}}}',
                b'{"t":"request","at_ns":8,"session":"s","body":{"type":"full","json":{}}}',
            ],
            "w.jsonl:2: sent before the request above it",
        ),
        ([b'{"t":"request","at_ns":-1,"session":"s","body":{"type":"full","json":{}}}'], "w.jsonl:1"),
        (
            [
                b'{"t":"request","at_ns":0,"session":"s","body":'
                b'{"type":"synthetic","prompt_tokens":10000000000000,"blocks":["a"],"block_tokens":1}}'
            ],
            "w.jsonl:1",
        ),
    ],
)
def test_malformed_line_is_named(lines: list[bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if lines else b""))
    with pytest.raises(CaptureError) as caught:
        load(path)
    assert message in str(caught.value)


def test_damaged_compressed_file_is_a_capture_error(tmp_path: Path) -> None:
    save(Workload(FACTS, [request(n) for n in range(100)]), tmp_path / "w.zst")
    data = (tmp_path / "w.zst").read_bytes()
    for damaged in (data[:-1], data[:-5], data[:20], data[:30] + b"\x00" * 40 + data[70:]):
        (tmp_path / "w.zst").write_bytes(damaged)
        with pytest.raises(CaptureError):
            load(tmp_path / "w.zst")


def test_compressed_file_cut_between_two_blocks_is_a_capture_error(tmp_path: Path) -> None:
    """Cut there, what is left has whole lines only."""
    lines = [msgspec.json.encode(FACTS) + b"\n", msgspec.json.encode(request(0)) + b"\n"]
    compressor = zstandard.ZstdCompressor().compressobj()
    start = compressor.compress(b"".join(lines)) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    end = compressor.compress(lines[1]) + compressor.flush()
    (tmp_path / "w.zst").write_bytes(start + end)
    assert len(load(tmp_path / "w.zst").requests) == 2
    (tmp_path / "w.zst").write_bytes(start)
    with pytest.raises(CaptureError, match="cut short"):
        load(tmp_path / "w.zst")


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_order_keeps_who_waits_for_whom(times: list[int]) -> None:
    """Each request waits for the one before it, where that was sent earlier."""
    given_requests = [
        request(at_ns, after=index - 1 if index and times[index - 1] < at_ns else None)
        for index, at_ns in enumerate(times)
    ]
    ordered = in_order(given_requests)
    assert [each.at_ns for each in ordered] == sorted(times)
    for each in ordered:
        if each.after is not None:
            assert ordered[each.after].at_ns < each.at_ns


def test_first_part_is_by_time_of_the_source() -> None:
    workload = Workload(FACTS, [request(0), request(10), request(20)])
    assert [each.at_ns for each in first_part(workload, 20).requests] == [0, 10]
