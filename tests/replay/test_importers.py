from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from protos.core.errors import CaptureError
from protos.core.record import Outcome
from replay.importers import from_azure, from_capture, from_prompts
from replay.workload import FullBody, SyntheticBody
from tests.replay.records import MS, item, record, write_capture

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROWS = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109", "2023-11-16 18:16:00.0,7,1"]


def azure(tmp_path: Path, rows: list[str], end: str = "\n") -> Path:
    path = tmp_path / "azure.csv"
    path.write_bytes(end.join([HEADER, *rows, ""]).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_azure_rows_are_requests_of_their_own(end: str, tmp_path: Path) -> None:
    requests = from_azure(azure(tmp_path, ROWS, end)).requests
    assert [each.at_ns for each in requests] == [0, 4_314_579_000, 13_319_410_000]
    assert [each.output_tokens for each in requests] == [44, 109, 1]
    assert [each.body.prompt_tokens for each in requests if isinstance(each.body, SyntheticBody)] == [374, 396, 7]
    assert len({each.session for each in requests}) == 3


def test_azure_rows_of_2024_name_their_zone(tmp_path: Path) -> None:
    rows = ["2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 00:00:01+00:00,2399,6"]
    assert [each.at_ns for each in from_azure(azure(tmp_path, rows)).requests] == [0, 990_070_000]


def test_azure_window_starts_at_zero(tmp_path: Path) -> None:
    (request,) = from_azure(azure(tmp_path, ROWS), start_s=4, duration_s=5).requests
    assert request.at_ns == 314_579_000


def test_azure_rows_out_of_order_are_sorted_and_noted(tmp_path: Path) -> None:
    workload = from_azure(azure(tmp_path, [ROWS[0], ROWS[2], ROWS[1]]))
    assert [each.output_tokens for each in workload.requests] == [44, 109, 1]
    assert workload.facts.notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2023-11-16 18:15:46.68,374", ":3: not a row"),
        ("2023-11-16 18:15:46.68,374,x", ":3: not a row"),
        ("yesterday,374,4", ":3: not a row"),
        ("2023-11-16 18:15:46.6x,374,4", ":3: not a row"),
        ("2023-11-16 18:15:46,-1,4", ":3: negative"),
        ("2023-11-16 18:15:46.68+01:00,374,4", ":3: not a row"),
    ],
)
def test_azure_row_that_is_wrong_is_named(row: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=message):
        from_azure(azure(tmp_path, [ROWS[0], row]))


def test_azure_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b").write_text("a,b\n")
    for name in ("a", "b", "missing"):
        with pytest.raises(CaptureError):
            from_azure(tmp_path / name)
    with pytest.raises(CaptureError, match="no requests in the window"):
        from_azure(azure(tmp_path, ROWS), start_s=1000)


def test_prompts_are_read_from_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(
        "What is the capital of France?\n\n"
        '{"prompt": "b"}\n{"turns": ["c", "d"], "id": 1}\n{"messages": [{"role": "user", "content": "e"}]}\n'
    )
    workload = from_prompts(path, rate=2.0, output_tokens=8)
    assert [each.at_ns for each in workload.requests] == [0, 500 * MS, 1000 * MS, 1500 * MS]
    assert b"capital of France" in _json(workload.requests[0].body)
    assert b'"content":"c"' in _json(workload.requests[2].body)


@pytest.mark.parametrize("line", ['{"prompt": 1}', '{"other": "a"}', "{oops"])
def test_prompt_line_that_is_wrong_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text(f"good\n{line}\n")
    with pytest.raises(CaptureError, match="p:2: "):
        from_prompts(tmp_path / "p", rate=1, output_tokens=1)


def _json(body: object) -> bytes:
    assert isinstance(body, FullBody)
    return bytes(body.json)


# ---------------------------------------------------------------- captures


def test_full_capture_keeps_the_clients_body(tmp_path: Path) -> None:
    workload = from_capture(write_capture(tmp_path, [item(record(1, 0))]))
    (request,) = workload.requests
    assert b"capital of France" in _json(request.body)
    assert request.output_tokens == 5
    assert request.recorded is not None
    assert request.recorded.traceparent == f"00-{1:032x}-{1:016x}-01"
    assert (workload.facts.kind, workload.facts.level) == ("capture", "full")


def test_hashed_capture_keeps_lengths_and_shared_prefixes(tmp_path: Path) -> None:
    shared = "x" * 1024
    items = [item(record(n, n, prompt_tokens=400), shared + str(n) * 500) for n in range(2)]
    one, other = from_capture(write_capture(tmp_path, items, "hashed")).requests
    assert isinstance(one.body, SyntheticBody)
    assert isinstance(other.body, SyntheticBody)
    assert one.body.prompt_tokens == 400
    assert one.body.blocks[:4] == other.body.blocks[:4]
    assert one.body.blocks[4] != other.body.blocks[4]
    # 1,557 bytes of prompt are 400 tokens, so a block of 256 bytes is about 66
    assert one.body.block_tokens == 66


def test_requests_without_content_are_skipped_and_counted(tmp_path: Path) -> None:
    workload = from_capture(write_capture(tmp_path, [item(record(1, 0))], "off"))
    assert (list(workload.requests), workload.facts.skipped) == ([], {"their content was not kept": 1})


def test_requests_refused_before_they_were_understood_are_skipped_and_counted(tmp_path: Path) -> None:
    refused = msgspec.structs.replace(item(record(1, 0, outcome=Outcome.REJECTED, status=404)), sampling=None)
    workload = from_capture(write_capture(tmp_path, [refused]))
    assert (list(workload.requests), workload.facts.skipped) == ([], {"they were refused unread": 1})


def test_requests_are_in_order_of_arrival_not_of_settling(tmp_path: Path) -> None:
    settled = [item(record(1, 50)), item(record(2, 0)), item(record(3, 20))]
    workload = from_capture(write_capture(tmp_path, settled))
    assert [each.at_ns // MS for each in workload.requests] == [0, 20, 50]


def test_turns_of_a_session_wait_for_each_other(tmp_path: Path) -> None:
    """Session s: 0 to 100 ms, 120 to 220 ms; a parallel request from 150 to 250 ms is its second chain."""
    items = [
        item(record(1, 0, session="s")),
        item(record(2, 10, session="t")),
        item(record(3, 120, session="s", total_ms=100)),
        item(record(4, 150, session="s")),
        item(record(5, 300, session="s")),
    ]
    requests = from_capture(write_capture(tmp_path, items)).requests
    assert [each.after for each in requests] == [None, None, 0, None, 3]
    assert [each.think_ns // MS for each in requests] == [0, 0, 20, 0, 50]
    assert [each.turn for each in requests] == [0, 0, 1, 0, 1]


def test_turns_stay_one_chain_after_a_request_beside_one_of_them(tmp_path: Path) -> None:
    """A title made from 10 to 30 ms, beside the first turn, must not take turns away from the conversation."""
    items = [
        item(record(1, 0, session="s")),
        item(record(2, 10, session="s", total_ms=20)),
        *(item(record(n, 200 * n, session="s")) for n in range(3, 8)),
    ]
    requests = from_capture(write_capture(tmp_path, items)).requests
    assert [each.after for each in requests] == [None, None, 0, 2, 3, 4, 5]


def test_requests_without_a_session_are_their_own(tmp_path: Path) -> None:
    requests = from_capture(write_capture(tmp_path, [item(record(n, n)) for n in range(3)])).requests
    assert [each.after for each in requests] == [None] * 3
    assert len({each.session for each in requests}) == 3


def test_cancelled_request_is_to_be_cancelled_again(tmp_path: Path) -> None:
    gone = record(1, 0, outcome=Outcome.CANCELLED, status=499, cancelled_at_ns=40 * MS, max_tokens=90)
    (request,) = from_capture(write_capture(tmp_path, [item(gone)])).requests
    assert (request.cancel_after_ns, request.output_tokens) == (40 * MS, 90)


def test_what_the_source_lost_is_known(tmp_path: Path) -> None:
    capture = write_capture(tmp_path, [item(record(n, n)) for n in range(50)])
    segment = capture / "segment-000001.jsonl.zst"
    segment.write_bytes(segment.read_bytes()[:-40])
    workload = from_capture(capture)
    assert len(workload.requests) < 51
    assert "cut after" in workload.facts.cuts[0]
