from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from protos.core.errors import CaptureError
from replay.cli import capture_app, workload_app
from replay.importers import from_capture
from replay.workload import load
from tests.replay.records import item, record, write_capture


def run(app: object, *arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, arguments)  # type: ignore[arg-type]
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.output


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    return write_capture(tmp_path, [item(record(n, n * 10)) for n in range(30)])


def test_ls_lists_what_is_there(capture: Path) -> None:
    (capture.parent / "broken").mkdir()
    (capture.parent / "broken/manifest.json").write_text("{")
    code, output = run(capture_app, "ls", str(capture.parent))
    assert code == 0
    assert "capture-1" in output
    assert "full" in output
    assert " 30 " in output
    assert "closed" in output
    assert "not a manifest" in output


def test_show_prints_facts_and_requests(capture: Path) -> None:
    code, output = run(capture_app, "show", str(capture), "--limit", "3")
    assert code == 0
    assert "30 requests, 0 dropped, level full" in output
    assert "... and 27 more" in output
    assert f"{2:032x}" in output


def test_show_json_is_one_entry_per_line(capture: Path) -> None:
    code, output = run(capture_app, "show", str(capture), "--json", "--limit", "2")
    assert code == 0
    first, _ = (msgspec.json.decode(line) for line in output.splitlines())
    assert first["record"]["request_id"] == "req-0"


def test_verify_accepts_what_is_whole(capture: Path) -> None:
    code, output = run(capture_app, "verify", str(capture))
    assert code == 0
    assert "sound, 30 entries, 0 dropped" in output


def test_verify_refuses_what_is_damaged(capture: Path) -> None:
    segment = capture / "segment-000001.jsonl.zst"
    segment.write_bytes(segment.read_bytes()[:-30])
    code, output = run(capture_app, "verify", str(capture))
    assert code == 1
    assert "DAMAGED" in output
    assert "problem: segment-000001.jsonl.zst: SHA-256" in output


def test_verify_accepts_a_crash_and_says_so(capture: Path) -> None:
    """The manifest as it is while the capture is written, and a file that stops in the middle."""
    manifest = msgspec.json.decode((capture / "manifest.json").read_bytes())
    manifest |= {"is_closed": False, "segments": [], "entries": 0}
    (capture / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    segment = capture / "segment-000001.jsonl.zst"
    segment.write_bytes(segment.read_bytes()[:-30])
    code, output = run(capture_app, "verify", str(capture))
    assert code == 0
    assert "still open, or never closed" in output
    assert "cut after" in output


def test_folder_of_captures_names_them(capture: Path) -> None:
    for arguments in (("show", str(capture.parent)), ("verify", str(capture.parent))):
        with pytest.raises(CaptureError, match="name one of them"):
            run(capture_app, *arguments)


def test_workload_commands_write_what_they_show(capture: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.zst"
    code, output = run(workload_app, "synth", "--rate", "10", "--duration", "20", "-o", str(file))
    assert code == 0
    assert "CC-BY-4.0" in output
    assert len(load(file).requests) > 100
    assert "rate, busiest second" in run(workload_app, "show", str(file))[1]
    assert "30 (30)" in run(workload_app, "show", str(capture))[1]
    assert len(from_capture(capture).requests) == 30


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "1e-320"])
def test_prompts_at_no_rate_are_refused(rate: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("one\ntwo\n")
    code, _ = run(workload_app, "import", "prompts", str(tmp_path / "p"), "-o", str(tmp_path / "w"), "--rate", rate)
    assert code == 2
    assert not (tmp_path / "w").exists()


def test_prompts_become_a_workload(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    arguments = ("import", "prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "w.jsonl"), "--rate", "4")
    assert run(workload_app, *arguments)[0] == 0
    assert [each.at_ns for each in load(tmp_path / "w.jsonl").requests] == [0, 250_000_000]
