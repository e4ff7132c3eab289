from __future__ import annotations

from array import array
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.core.errors import ConfigError
from protos.core.record import Outcome, Phases
from replay.answer import Timing
from replay.report import render
from replay.result import Fate, Result
from replay.run import Run, RunEnd, RunFacts
from replay.scale import measure
from replay.slo import Slo, parse_slo
from replay.stats import quantile, quantiles_ms, quantiles_of_counts_ms, summarize
from replay.workload import Recorded, WorkloadFacts

MS = 1_000_000


def result(index: int = 0, **changes: object) -> Result:
    """Intended at 0, sent at 1 ms, first content at 11 ms, nine more tokens until 101 ms, done at 102 ms."""
    values: dict[str, object] = {
        "index": index,
        "session": "s",
        "fate": Fate.FINISHED,
        "intended_ns": 0,
        "started_ns": MS // 2,
        "sent_ns": MS,
        "first_byte_ns": 5 * MS,
        "first_content_ns": 11 * MS,
        "last_content_ns": 101 * MS,
        "done_ns": 102 * MS,
        "status": 200,
        "prompt_tokens": 5,
        "output_tokens": 10,
        "gaps_us": array("q", [10_000] * 9),
    }
    return Result(**values | changes)  # type: ignore[arg-type]


def a_run(results: list[Result], end: RunEnd | None = None, **facts: object) -> Run:
    values: dict[str, object] = {
        "id": "r",
        "started_unix_ns": 0,
        "target": "http://t",
        "model": "m",
        "is_simulated": False,
        "driver": "open",
        "speed": 1.0,
        "planned": len(results),
        "slo": Slo(),
        "workload": WorkloadFacts(kind="synth", source="x"),
        "source_shape": measure([]),
        "scaled_shape": measure([]),
    }
    return Run(RunFacts(**values | facts), end, results, 0, ())  # type: ignore[arg-type]


def test_latencies_are_from_intended_and_from_sent() -> None:
    found = summarize(a_run([result()])).latency_ms
    assert {name: round(each.p50, 6) for name, each in found.items()} == {
        "ttft": 11.0,
        "ttft from sent": 10.0,
        "tpot": 10.0,
        "itl": 10.0,
        "e2e": 102.0,
        "e2e from sent": 101.0,
        "schedule lag": 0.5,
    }


def test_tpot_is_undefined_for_one_token_and_for_whole_answers() -> None:
    assert result(output_tokens=1).tpot_ns is None
    assert result(output_tokens=None).tpot_ns is None
    assert result(is_stream=False).tpot_ns is None
    assert result().tpot_ns == 10 * MS


@pytest.mark.parametrize(
    ("changes", "is_met"),
    [
        ({}, True),
        ({"first_content_ns": 51 * MS}, False),
        ({"last_content_ns": 10_000 * MS}, False),
        ({"output_tokens": 1}, True),
        ({"fate": Fate.FAILED, "error_kind": "error_event"}, False),
        ({"fate": Fate.REJECTED, "status": 429}, False),
        ({"first_content_ns": None, "last_content_ns": None}, False),
    ],
)
def test_only_finished_requests_within_every_limit_are_good(changes: dict[str, object], is_met: bool) -> None:
    slo = parse_slo("ttft=50ms, tpot=20ms")
    assert slo.is_met_by(result(**changes)) is is_met
    assert summarize(a_run([result(**changes)], slo=slo)).goodput_met == is_met


def test_slo_is_read_with_its_units() -> None:
    assert parse_slo("ttft=1.5s,tpot=100ms,e2e=250us") == Slo(1_500 * MS, 100 * MS, 250_000)
    assert str(parse_slo("ttft=1s")) == "ttft=1000ms"
    for text in ("", "ttft", "ttft=1", "ttft=-1s", "itl=1s", "ttft=1s;tpot=1s"):
        with pytest.raises(ConfigError, match="--slo"):
            parse_slo(text)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_quantile_lies_between_neighbours(values: list[float], q: float) -> None:
    values.sort()
    assert values[0] <= quantile(values, q) <= values[-1]
    assert (quantile(values, 0), quantile(values, 1)) == (values[0], values[-1])


def test_quantiles_of_known_values() -> None:
    found = quantiles_ms(n * MS for n in range(101))
    assert found is not None
    assert (found.p50, found.p95, found.p99, found.max, found.mean) == (50, 95, 99, 100, 50)
    assert quantiles_ms([None, None]) is None


@given(st.lists(st.integers(0, 10**7), min_size=1))
def test_quantiles_of_counts_are_those_of_the_values(values_us: list[int]) -> None:
    found, whole = quantiles_of_counts_ms(Counter(values_us)), quantiles_ms(value * 1000 for value in values_us)
    assert found is not None
    assert whole is not None
    assert msgspec.structs.astuple(found) == pytest.approx(msgspec.structs.astuple(whole))


TIMING = Timing(phases_ns=Phases(queue=2 * MS, prefill=6 * MS, decode=90 * MS), total_ns=98 * MS)


def test_phase_shares_and_outside_are_of_the_clients_time() -> None:
    summary = summarize(a_run([result(timing=TIMING)]))
    shares = {phase.phase: (phase.share_of_ttft, phase.share_of_e2e) for phase in summary.phases}
    assert shares["queue"] == (pytest.approx(0.2), pytest.approx(2 / 101))
    assert shares["decode"] == (None, pytest.approx(90 / 101))
    assert summary.outside_share_of_ttft == pytest.approx(0.2)
    assert summary.outside_share_of_e2e == pytest.approx(3 / 101)


def test_whole_answers_have_no_part_in_shares_of_ttft() -> None:
    """To a whole answer its client waits for the decoding too, which is neither before the first token nor outside."""
    whole = result(1, is_stream=False, first_content_ns=101 * MS, timing=TIMING)
    alone, both = summarize(a_run([result(timing=TIMING)])), summarize(a_run([result(timing=TIMING), whole]))
    assert both.outside_share_of_ttft == alone.outside_share_of_ttft
    assert [each.share_of_ttft for each in both.phases] == [each.share_of_ttft for each in alone.phases]
    assert [each.count for each in both.phases] == [2, 2, 2]
    assert summarize(a_run([whole])).outside_share_of_ttft is None


def test_ttft_of_streams_only_is_compared() -> None:
    recorded = Recorded(outcome=Outcome.FINISHED, status=200, first_token_at_ns=10 * MS, total_ns=98 * MS)
    whole = result(1, is_stream=False, first_content_ns=101 * MS, timing=TIMING, recorded=recorded)
    summary = summarize(a_run([result(timing=TIMING, recorded=recorded), whole]))
    rows = {row.name: row for row in summary.comparison}
    assert (rows["ttft"].recorded.count, rows["ttft"].replayed.count) == (1, 1)
    assert (rows["ttft"].recorded.mean, rows["ttft"].replayed.mean) == (10.0, 10.0)
    assert rows["total"].replayed.count == 2


def test_parts_of_the_slowest_request_are_its_whole_time() -> None:
    summary = summarize(a_run([result(started_ns=MS // 2, sent_ns=40 * MS, done_ns=141 * MS, timing=TIMING)]))
    slowest = summary.slowest
    assert slowest is not None
    assert slowest.connect_ms == 39.5
    assert slowest.outside_ms is not None
    parts = [slowest.lag_ms, slowest.connect_ms, *slowest.phases_ms.values(), slowest.outside_ms]
    assert sum(parts) == pytest.approx(slowest.e2e_ms)
    assert "encode, connect" in render(summary)


def test_sum_check_finds_phases_that_do_not_add_up() -> None:
    broken = Timing(phases_ns=Phases(queue=2 * MS), total_ns=5 * MS)
    loose = Timing(phases_ns=Phases(queue=4 * MS), total_ns=5 * MS, unattributed_ns=MS)
    check = summarize(a_run([result(timing=timing) for timing in (TIMING, broken, loose)])).sum_check
    assert (check.checked, check.broken) == (3, 1)
    assert check.max_unattributed_share == pytest.approx(0.2)


def test_slowest_request_is_from_intended_send() -> None:
    slow = result(3, intended_ns=-500 * MS, timing=TIMING, trace_id="t")
    slowest = summarize(a_run([result(), slow, result(2)])).slowest
    assert slowest is not None
    assert (slowest.index, slowest.e2e_ms, slowest.trace_id) == (3, 602.0, "t")
    assert slowest.phases_ms == {"queue": 2.0, "prefill": 6.0, "decode": 90.0}


def test_first_error_of_a_kind_is_in_the_report() -> None:
    failed = {"fate": Fate.FAILED, "error_kind": "http_403", "status": 403}
    text = render(summarize(a_run([result(**failed, error=f"the key\nis {name}'s") for name in ("a", "b")])))
    assert """error http_403: 2, the first: "the key is a's\"""" in text


def test_stalled_loop_is_client_limited() -> None:
    calm = RunEnd(is_interrupted=False, sent=1, stalled_ns=9 * MS, longest_stall_ns=9 * MS, duration_ns=1000 * MS)
    stalled = RunEnd(is_interrupted=False, sent=1, stalled_ns=11 * MS, longest_stall_ns=11 * MS, duration_ns=1000 * MS)
    assert not summarize(a_run([result()], calm)).is_client_limited
    summary = summarize(a_run([result()], stalled))
    assert summary.is_client_limited
    assert "stalled for 1.1%" in render(summary)


def test_what_the_source_lost_is_in_the_report() -> None:
    facts = WorkloadFacts(kind="capture", source="x", dropped=7, cuts=("segment-000001: cut",), skipped={"no": 2})
    text = render(summarize(a_run([result()], workload=facts)))
    assert "the source dropped 7 requests" in text
    assert "segment-000001: cut" in text
    assert "2 requests of the source not replayed: no" in text


def test_run_without_any_result_has_a_report() -> None:
    text = render(summarize(a_run([])))
    assert "0 of 0 requests sent" in text
    assert "Slowest" not in text
