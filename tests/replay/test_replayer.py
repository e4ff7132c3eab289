from __future__ import annotations

import asyncio
import io
import json
import os
import resource
import signal
import socket
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from protos.core import journal
from protos.core.errors import CaptureError, ConfigError
from protos.core.record import Outcome
from replay import replayer, report, run
from replay.importers import from_capture
from replay.settings import ReplaySettings
from replay.stats import Summary
from replay.synth import SynthSettings, synthesize
from replay.target import parse_models, parse_target
from replay.workload import Workload, save
from tests.replay import fake_server as fake
from tests.replay.fake_server import FakeServer
from tests.replay.records import item, record, write_capture

QUIET = Console(file=io.StringIO())


def small_workload(requests: int = 5) -> Workload:
    settings = SynthSettings(rate=1000, duration_s=(requests + 0.5) / 1000, arrivals="constant", max_prompt_tokens=20)
    return synthesize(settings)


async def replay(
    workload: Workload, directory: Path, url: str, *, run_id: str = "run-1", **settings: object
) -> Summary:
    plan = await replayer.make_plan(workload, msgspec.convert({"target": url, **settings}, ReplaySettings), run_id)
    return await replayer.perform(plan, directory, QUIET)


async def test_run_sends_everything_and_writes_its_folder(tmp_path: Path) -> None:
    async with FakeServer(fake.good_stream(4)) as server:
        summary = await replay(small_workload(), tmp_path / "run", server.url)
    assert (summary.planned, summary.sent, summary.fates) == (5, 5, {"finished": 5})
    assert summary.latency_ms["ttft"].count == 5
    assert summary.latency_ms["itl"].count == 15
    assert summary.output_tokens == 20
    assert (summary.sum_check.checked, summary.sum_check.broken) == (5, 0)
    assert summary.slowest is not None
    assert summary.slowest.trace_id == "ab" * 16
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "manifest.json",
        "segment-000001.jsonl.zst",
        "end.json",
        "summary.json",
        "report.txt",
        "requests.parquet",
    }
    assert journal.verify(tmp_path / "run").is_sound
    assert json.loads((tmp_path / "run/summary.json").read_bytes())["sent"] == 5
    table = pq.read_table(tmp_path / "run/requests.parquet")
    assert table.num_rows == 5
    assert table["gaps_us"].to_pylist() == [each.gaps_us.tolist() for each in run.read_run(tmp_path / "run").results]
    assert [len(gaps) for gaps in table["gaps_us"].to_pylist()] == [3] * 5
    assert table["prefill_ns"].to_pylist() == [700_000] * 5


async def test_table_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PARQUET_ROWS", 2)
    async with FakeServer(fake.good_stream()) as server:
        await replay(small_workload(), tmp_path / "run", server.url)
    assert pq.ParquetFile(tmp_path / "run/requests.parquet").num_row_groups == 3
    assert sorted(pq.read_table(tmp_path / "run/requests.parquet")["index"].to_pylist()) == [0, 1, 2, 3, 4]


async def test_made_up_prompts_are_new_in_every_run(tmp_path: Path) -> None:
    """The second of two runs would have found those of the first one in the prefix cache."""
    shared = "x" * 1024
    items = [item(record(n, n, prompt_tokens=400), shared + str(n) * 500) for n in range(2)]
    workload = from_capture(write_capture(tmp_path, items, "hashed"))
    starts: list[set[str]] = []
    for run_id in ("run-1", "run-2"):
        async with FakeServer(fake.good_stream()) as server:
            await replay(workload, tmp_path / run_id, server.url, run_id=run_id)
        starts.append({seen.json["messages"][0]["content"][:200] for seen in server.seen})
    assert [len(each) for each in starts] == [1, 1]
    assert starts[0] != starts[1]


async def test_report_can_be_made_again(tmp_path: Path) -> None:
    async with FakeServer(fake.good_stream()) as server:
        await replay(small_workload(), tmp_path / "run", server.url)
    before = (tmp_path / "run/report.txt").read_text()
    assert "Where the time went" in before
    assert report.render(replayer.write_report(tmp_path / "run")) == before


async def test_every_request_carries_what_the_gateway_needs(tmp_path: Path) -> None:
    capture = write_capture(tmp_path, [item(record(7, 0, session="s-1", tenant="team-a", priority="batch"))])
    async with FakeServer(fake.good_stream()) as server:
        await replay(from_capture(capture), tmp_path / "run", server.url, api_key="secret")
    (seen,) = server.seen
    assert seen.headers["x-tidegate-timing"] == "1"
    assert seen.headers["x-tidegate-session"] == "s-1"
    assert seen.headers["x-tidegate-tenant"] == "team-a"
    assert seen.headers["x-tidegate-priority"] == "batch"
    assert seen.headers["x-tidegate-replay-of"] == f"00-{7:032x}-{7:016x}-01"
    assert seen.headers["authorization"] == "Bearer secret"
    assert len(seen.headers["traceparent"]) == 55
    assert f"{7:032x}" not in seen.headers["traceparent"]
    assert "secret" not in (tmp_path / "run/manifest.json").read_text()


async def test_recorded_values_cannot_end_a_header_line(tmp_path: Path) -> None:
    capture = write_capture(tmp_path, [item(record(1, 0, session="a\r\nx-evil: 1", tenant="\u00fc"))])
    async with FakeServer(fake.good_stream()) as server:
        await replay(from_capture(capture), tmp_path / "run", server.url)
    assert "x-evil" not in server.seen[0].headers
    assert server.seen[0].headers["x-tidegate-session"] == "a%0D%0Ax-evil%3A%201"


async def test_capture_is_compared_with_its_replay(tmp_path: Path) -> None:
    capture = write_capture(tmp_path, [item(record(n, n * 10)) for n in range(4)])
    async with FakeServer(fake.good_stream()) as server:
        summary = await replay(from_capture(capture), tmp_path / "run", server.url, speed=10.0)
    rows = {row.name: row for row in summary.comparison}
    assert summary.compared == 4
    assert rows["total"].recorded.mean == pytest.approx(100.0)
    assert rows["total"].replayed.mean == pytest.approx(1.9)
    assert rows["ttft"].recorded.mean == pytest.approx(30.0)
    assert rows["ttft"].replayed.mean == pytest.approx(summary.latency_ms["ttft from sent"].mean)
    assert rows["queue"].recorded.mean == pytest.approx(9.0)
    assert summary.facts.scaled_shape.duration_s == pytest.approx(summary.facts.source_shape.duration_s / 10)
    assert "Recorded against replayed" in report.render(summary)


async def test_errors_are_counted_by_kind_and_meet_no_slo(tmp_path: Path) -> None:
    refusal = fake.answer_json({"error": {"message": "full"}}, 429, {"x-tidegate-reject-reason": "queue_full"})
    broken = fake.stream(fake.delta("a"), fake.event({"error": {"message": "died"}}), fake.DONE)
    scripts = iter([refusal, broken, fake.raw(b""), fake.answer_json({}, 500), fake.good_stream()])

    async def script(seen: fake.Seen, writer: asyncio.StreamWriter) -> None:
        await next(scripts)(seen, writer)

    async with FakeServer(script) as server:
        summary = await replay(small_workload(), tmp_path / "run", server.url)
    assert summary.fates == {"failed": 3, "rejected": 1, "finished": 1}
    assert summary.errors == {"http_429": 1, "error_event": 1, "disconnected": 1, "http_500": 1}
    assert summary.reject_reasons == {"queue_full": 1}
    assert summary.goodput_met == 1


async def test_recorded_cancel_is_no_error(tmp_path: Path) -> None:
    gone = record(1, 0, outcome=Outcome.CANCELLED, status=499, cancelled_at_ns=20_000_000)
    capture = write_capture(tmp_path, [item(gone)])
    async with FakeServer(fake.silence) as server:
        summary = await replay(from_capture(capture), tmp_path / "run", server.url)
        await asyncio.wait_for(server.lost.wait(), 2)
    assert (summary.fates, summary.errors) == ({"cancelled": 1}, {})


async def test_next_turn_is_sent_after_the_last_one_ended(tmp_path: Path) -> None:
    turns = [item(record(1, 0, session="s")), item(record(2, 105, session="s"))]
    capture = write_capture(tmp_path, turns)
    async with FakeServer(fake.good_stream()) as server:
        await replay(from_capture(capture), tmp_path / "run", server.url)
    first, second = run.read_run(tmp_path / "run").results
    assert second.intended_ns == first.done_ns + 5_000_000


async def test_users_share_the_workload(tmp_path: Path) -> None:
    async with FakeServer(fake.good_stream()) as server:
        summary = await replay(
            small_workload(12), tmp_path / "run", server.url, users=3, spawn_rate=1000.0, think_time=0.0
        )
        assert server.connections <= 4
    assert (summary.sent, summary.facts.driver) == (12, "users")


async def test_unserved_model_is_replaced_and_noted(tmp_path: Path) -> None:
    capture = write_capture(tmp_path, [item(record(1, 0, model="gone"))])
    async with FakeServer(fake.good_stream()) as server:
        summary = await replay(from_capture(capture), tmp_path / "run", server.url)
    assert server.seen[0].json["model"] == "fake"
    assert any("gone" in warning for warning in summary.warnings)


async def test_simulated_engine_is_announced(tmp_path: Path) -> None:
    extra = {"backend": "sim", "simulated": True, "context_tokens": 30, "workers": 1}
    models = {"data": [{"id": "sim", "tidegate": extra}]}
    async with FakeServer(fake.good_stream(), models) as server:
        summary = await replay(small_workload(), tmp_path / "run", server.url)
    assert summary.is_simulated
    assert any("context of 30 tokens" in warning for warning in summary.warnings)
    assert "SIMULATED ENGINE" in report.render(summary)


async def test_interrupt_while_the_report_is_written_does_not_cost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who presses Ctrl-C presses it twice."""
    write_report = replayer.write_report

    def interrupted(directory: Path) -> Summary:
        os.kill(os.getpid(), signal.SIGINT)
        return write_report(directory)

    monkeypatch.setattr(replayer, "write_report", interrupted)
    async with FakeServer(fake.good_stream()) as server:
        try:
            summary = await replay(small_workload(), tmp_path / "run", server.url)
        except KeyboardInterrupt:
            pytest.fail("the report was not finished")
    assert summary.sent == 5


async def test_late_generator_is_client_limited(tmp_path: Path) -> None:
    async with FakeServer(fake.good_stream()) as server:
        await replay(small_workload(), tmp_path / "run", server.url)
    found = run.read_run(tmp_path / "run")
    late = [msgspec.structs.replace(each, started_ns=each.intended_ns + 11_000_000) for each in found.results]
    from replay.stats import summarize

    summary = summarize(msgspec.structs.replace(found, results=late))
    assert summary.is_client_limited
    text = report.render(summary)
    assert "CLIENT-LIMITED" in text
    assert "NOT the server's" in text


@pytest.mark.parametrize(
    ("now", "most", "wanted"),
    [(256, 4096, 4096), (256, resource.RLIM_INFINITY, 10240), (20_000, resource.RLIM_INFINITY, 20_000)],
)
async def test_open_files_are_never_set_to_unlimited(
    now: int, most: int, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS refuses that, and says that the hard limit is."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (now, most))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    async with FakeServer(fake.good_stream()) as server:
        await replay(small_workload(), tmp_path / "run", server.url)
    assert asked == [(wanted, most)]


# ---------------------------------------------------------------- what stops a run before it starts


@pytest.mark.parametrize(
    "url", ["nowhere", "ftp://a", "http://", "http://a:b", "http://a b", "http://u:p@h", "http://h/?q", "http://a..b"]
)
async def test_target_that_is_no_address_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not an address like"):
        await replay(small_workload(), tmp_path / "run", url)


async def test_target_that_is_down_is_refused_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConfigError, match=r"nothing answers at .*connection refused.*tidegate up"):
        await replay(small_workload(), tmp_path / "run", f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("models", [{"data": []}, {"hello": 1}, [1], b"<html>"])
async def test_target_without_models_is_refused(models: object, tmp_path: Path) -> None:
    async with FakeServer(fake.good_stream(), models) as server:
        with pytest.raises(ConfigError):
            await replay(small_workload(), tmp_path / "run", server.url)


async def test_target_that_asks_for_a_key_is_told_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TIDEGATE__REPLAY__API_KEY"):
        parse_models(parse_target("http://a"), 401, b'{"error":{"message":"an API key is required"}}')


async def test_unknown_model_is_refused_with_those_that_are_served(tmp_path: Path) -> None:
    async with FakeServer(fake.good_stream()) as server:
        with pytest.raises(ConfigError, match="serves fake"):
            await replay(small_workload(), tmp_path / "run", server.url, model="other")


async def test_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    async with FakeServer(fake.good_stream()) as server:
        with pytest.raises(CaptureError, match="choose another"):
            await replay(small_workload(), tmp_path, server.url)


# ---------------------------------------------------------------- real processes, with uvloop


async def start_cli(*arguments: str, cwd: Path) -> asyncio.subprocess.Process:
    code = "import sys; from deploy.cli import main; sys.exit(main())"
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *arguments,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def first_results(directory: Path, count: int) -> None:
    """Until so many results can be read from the run's folder."""
    while not (directory / "manifest.json").exists() or sum(1 for _ in journal.read(directory)) < count:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


def half_good() -> fake.Script:
    """Every second request is never answered."""
    counted = Counter[str]()

    async def script(seen: fake.Seen, writer: asyncio.StreamWriter) -> None:
        counted["all"] += 1
        await (fake.good_stream() if counted["all"] % 2 else fake.silence)(seen, writer)

    return script


async def test_command_replays_a_workload_file(tmp_path: Path) -> None:
    save(small_workload(), tmp_path / "w.jsonl.zst")
    async with FakeServer(fake.good_stream()) as server:
        process = await start_cli(
            "replay", "run", "w.jsonl.zst", "--target", server.url, "--speed", "2", "-o", "run", cwd=tmp_path
        )
        out, err = await process.communicate()
    assert process.returncode == 0, err
    assert b"5 of 5 requests sent" in out
    assert b"rate, busiest second" in err


async def test_run_in_which_nothing_was_answered_fails(tmp_path: Path) -> None:
    save(small_workload(), tmp_path / "w.jsonl.zst")
    async with FakeServer(fake.answer_json({"error": {"message": "full"}}, 429)) as server:
        process = await start_cli("replay", "run", "w.jsonl.zst", "--target", server.url, "-o", "run", cwd=tmp_path)
        out, err = await process.communicate()
    assert process.returncode == 1, err
    assert b"5 of 5 requests sent" in out
    assert b"no request was answered" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_run_keeps_its_results(number: signal.Signals, tmp_path: Path) -> None:
    save(small_workload(40), tmp_path / "w.jsonl")
    async with FakeServer(half_good()) as server:
        process = await start_cli("replay", "run", "w.jsonl", "--target", server.url, "-o", "run", cwd=tmp_path)
        await first_results(tmp_path / "run", 20)
        process.send_signal(number)
        out, err = await process.communicate()
    assert process.returncode == 130, err
    assert b"INTERRUPTED" in out
    assert b"20 finished, 20 interrupted" in out


async def test_killed_run_keeps_its_results(tmp_path: Path) -> None:
    save(small_workload(40), tmp_path / "w.jsonl")
    async with FakeServer(half_good()) as server:
        process = await start_cli("replay", "run", "w.jsonl", "--target", server.url, "-o", "run", cwd=tmp_path)
        await first_results(tmp_path / "run", 20)
        process.kill()
        await process.communicate()
    verdict = journal.verify(tmp_path / "run")
    assert verdict.is_sound
    assert verdict.entries == 20
    assert len(verdict.cuts) == 1
    summary = replayer.write_report(tmp_path / "run")
    assert not summary.is_complete
    assert "KILLED" in report.render(summary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "run", "missing.zst"], b"missing.zst: cannot be read: No such file"),
        (["replay", "run", ".", "--target", "http://127.0.0.1:1"], b"is not a capture"),
        (["replay", "run", "w.jsonl", "--target", "http://127.0.0.1:1"], b"nothing answers at http://127.0.0.1:1"),
        (["replay", "run", "w.jsonl", "--target", "tidegate"], b"is not an address like"),
        (["replay", "run", "w.jsonl", "--speed", "0"], b"speed"),
        (["replay", "run", "w.jsonl", "--limit-duration", "inf"], b"--limit-duration"),
        (["replay", "run", "w.jsonl", "--users", "1", "--think-time", "inf"], b"--think-time"),
        (["replay", "run", "w.jsonl", "--slo", "ttft=fast"], b"expected terms like"),
        (["replay", "report", "."], b"is not a capture"),
        (["capture", "verify", "."], b"is not a capture"),
        (["capture", "ls", "missing"], b"no such folder"),
        (["workload", "import", "azure", "w.jsonl", "-o", "x"], b"w.jsonl:1: expected the header"),
        (["workload", "synth", "--preset", "azure", "-o", "x"], b"no preset 'azure'"),
        (["workload", "synth", "--arrivals", "gamma:x", "-o", "x"], b"CV must be a number"),
    ],
)
async def test_what_cannot_be_done_is_one_line_and_exit_2(arguments: list[str], message: bytes, tmp_path: Path) -> None:
    save(small_workload(), tmp_path / "w.jsonl")
    process = await start_cli(*arguments, cwd=tmp_path)
    out, err = await process.communicate()
    assert process.returncode == 2, err
    assert message in err
    assert err.count(b"\n") == 1
    assert out == b""
