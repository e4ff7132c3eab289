"""Admission, clock offset, tail sampling, identity, outlet, metrics: one table or property each."""

from __future__ import annotations

import asyncio
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from gateway import admission
from gateway.calls import Call, parse_chat
from gateway.fleet import Fleet
from gateway.identity import identify, new_id
from gateway.metrics import MAX_TENANTS, Metrics, StateCollector
from gateway.offset import ClockOffset
from gateway.order import Ticket
from gateway.outlet import Outlet
from gateway.sampling import TailSampler
from gateway.scheduler import Scheduler
from gateway.settings import Limits
from gateway.tenants import Band
from protos.core.clock import SYSTEM_CLOCK
from protos.core.errors import InvalidRequest, Overloaded, Unavailable, UnknownModel
from protos.core.journal import JournalStats
from protos.core.record import Attempt, Outcome
from tests.gateway.fakes import FakeClient, LoopClock, chat_body, in_virtual_time, model_info, settle_down
from tests.gateway.records import record


def call(**fields: object) -> Call:
    parsed = parse_chat(chat_body(**fields))
    assert isinstance(parsed, Call)
    return parsed


# ---------------------------------------------------------------- admission


def test_model_is_resolved_or_refused_for_the_right_reason() -> None:
    scheduler = Scheduler()
    assert isinstance(admission.resolve_model(call(), scheduler), Unavailable)
    assert isinstance(admission.resolve_model(call(model="a"), scheduler), Unavailable)
    scheduler.worker_joined("w", model_info(names=("a", "alias")))
    assert admission.resolve_model(call(), scheduler) == "a"
    assert admission.resolve_model(call(model="alias"), scheduler) == "alias"
    assert isinstance(admission.resolve_model(call(model="z"), scheduler), UnknownModel)
    scheduler.worker_joined("v", model_info(names=("b",)))
    assert isinstance(admission.resolve_model(call(), scheduler), InvalidRequest)
    scheduler.worker_left("w")
    assert isinstance(admission.resolve_model(call(model="a"), scheduler), Unavailable)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, None),
        ({"max_tokens": 100}, None),
        ({"max_tokens": 999}, None),
        ({"max_tokens": 1000}, "context_length_exceeded"),
        ({"max_tokens": 500, "n": 4}, None),
        ({"max_tokens": 501, "n": 4}, "invalid_value"),
    ],
)
def test_lengths_are_checked_before_anything_is_tokenized(fields: dict[str, int], code: str | None) -> None:
    scheduler = Scheduler()
    scheduler.worker_joined("w", model_info(names=("a",), context_tokens=1000))
    refusal = admission.check_lengths(call(**fields), "a", scheduler, Limits(max_tokens=2000))
    assert (refusal.code if refusal else None) == code
    if refusal:
        assert refusal.param == "max_tokens"


def test_length_refusal_names_the_field_that_the_client_sent() -> None:
    scheduler = Scheduler()
    scheduler.worker_joined("w", model_info(names=("a",)))
    refusal = admission.check_lengths(call(max_completion_tokens=5000), "a", scheduler, Limits(max_tokens=10))
    assert refusal is not None
    assert refusal.param == "max_completion_tokens"
    assert refusal.message.startswith("max_completion_tokens: ")


def test_queue_refusal_says_when_to_come_back() -> None:
    refusal = admission.check_queue(10, "a", Scheduler(), Limits(queue_bytes=9), 1, Band(name="b"))
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_after_s
    assert refusal.reason == "queue_full"
    assert admission.check_queue(9, "a", Scheduler(), Limits(queue_bytes=9), 1, Band(name="b")) is None


def test_a_band_has_its_own_bound() -> None:
    scheduler = Scheduler()
    scheduler.enqueue(Ticket(request=1, model="a", band=2, deadline_ns=1))
    narrow = Band(name="batch", queue_requests=1)
    refusal = admission.check_queue(1, "a", scheduler, Limits(), 2, narrow)
    assert isinstance(refusal, Overloaded)
    assert refusal.reason == "queue_full"
    assert admission.check_queue(1, "a", scheduler, Limits(), 1, Band(name="standard")) is None


# ---------------------------------------------------------------- offset


@given(
    offset_ns=st.integers(-(10**15), 10**15),
    trips=st.lists(st.tuples(st.integers(1, 10**7), st.integers(0, 10**7), st.integers(0, 10**7)), min_size=1),
)
def test_offset_is_wrong_by_at_most_half_a_round_trip(offset_ns: int, trips: list[tuple[int, int, int]]) -> None:
    offset = ClockOffset()
    for sent_ns, there_ns, back_ns in trips:
        offset.add(sent_ns, sent_ns + there_ns + offset_ns, sent_ns + there_ns + back_ns)
    assert offset.is_known
    assert abs(offset.offset_ns - offset_ns) <= offset.round_trip_ns / 2 + 1
    assert offset.round_trip_ns == min(there + back for _, there, back in trips[-16:])


def test_offset_follows_a_drifting_clock() -> None:
    offset = ClockOffset(window=4)
    offset.add(0, 100, 2)
    for ping in range(4):
        offset.add(ping * 1000, ping * 1000 + 505, ping * 1000 + 10)
    assert offset.offset_ns == 500
    assert not ClockOffset().is_known
    assert ClockOffset().offset_ns == 0


# ---------------------------------------------------------------- sampling

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    "facts",
    [
        {"outcome": Outcome.FAILED},
        {"outcome": Outcome.REJECTED},
        {"outcome": Outcome.CANCELLED},
        {"outcome": Outcome.TIMED_OUT},
        {"attempts": (Attempt("a", 1, 2, "lost"), Attempt("b", 2, 3))},
        {"preemptions": 1},
    ],
)
def test_what_somebody_will_look_for_is_kept(facts: dict[str, object]) -> None:
    assert TailSampler(0.0, 100).is_kept(record(**facts), SECOND)
    assert not TailSampler(0.0, 100).is_kept(record(), SECOND)
    assert not TailSampler(1.0, 100).is_kept(record(is_sampled=False, **facts), SECOND)


def test_slow_requests_are_kept() -> None:
    sampler = TailSampler(0.0, 100)
    for _ in range(100):
        sampler.is_kept(record(total_ns=1000), SECOND)
    assert sampler.is_kept(record(total_ns=5000), SECOND)
    assert not sampler.is_kept(record(total_ns=1000), SECOND)


def test_fraction_is_decided_on_the_trace_id() -> None:
    sampler = TailSampler(0.25, 1e9)
    ids = [new_id(128) for _ in range(2000)]
    kept = [sampler.is_kept(record(trace_id=trace_id), SECOND) for trace_id in ids]
    assert 400 < sum(kept) < 600
    assert kept == [TailSampler(0.25, 1e9).is_kept(record(trace_id=trace_id), SECOND) for trace_id in ids]


def test_storm_cannot_flood_the_store() -> None:
    sampler = TailSampler(1.0, 50)
    kept = sum(sampler.is_kept(record(outcome=Outcome.REJECTED), SECOND + i * 1_000_000) for i in range(10_000))
    assert 50 + 50 * 9 <= kept <= 50 + 50 * 10


def test_rate_below_one_still_keeps_some() -> None:
    sampler = TailSampler(1.0, 0.5)
    kept = [sampler.is_kept(record(), SECOND * (second + 1)) for second in range(10)]
    assert 4 <= sum(kept) <= 6


# ---------------------------------------------------------------- identity

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_clients_trace_is_continued() -> None:
    identity = identify([(b"traceparent", f"00-{TRACE}-{SPAN}-00".encode())])
    assert (identity.trace_id, identity.parent_span_id, identity.is_sampled) == (TRACE, SPAN, False)
    assert identity.traceparent == f"00-{TRACE}-{identity.span_id}-00"
    assert identity.span_id != SPAN


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        "00-" + "é" * 32 + f"-{SPAN}-01",
    ],
)
def test_malformed_traceparent_counts_as_absent(value: str) -> None:
    identity = identify([(b"traceparent", value.encode())])
    assert identity.trace_id != TRACE
    assert identity.parent_span_id is None
    assert identity.is_sampled


@pytest.mark.parametrize("value", ["a b", "x" * 129, "", "a\x00", "é"])
def test_bad_request_id_is_replaced(value: str) -> None:
    assert re.fullmatch("[0-9a-f]{32}", identify([(b"x-request-id", value.encode("latin-1"))]).request_id)


def test_other_headers_of_the_request() -> None:
    identity = identify(
        [
            (b"x-request-id", b"mine"),
            (b"x-tidegate-session", b"s-1"),
            (b"x-tidegate-replay-of", f"00-{TRACE}-{SPAN}-01".encode()),
            (b"x-tidegate-timing", b"1"),
            (b"authorization", b"Bearer secret"),
        ]
    )
    assert (identity.request_id, identity.session, identity.wants_timing) == ("mine", "s-1", True)
    assert identity.replay_of == f"00-{TRACE}-{SPAN}-01"
    assert "secret" not in repr(identity)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"x-request-id", b"traceparent", b"x-tidegate-replay-of", b"x"]), st.binary(max_size=70)
        )
    )
)
def test_no_header_makes_identify_raise(headers: list[tuple[bytes, bytes]]) -> None:
    identity = identify(headers)
    assert identity.request_id.isascii()
    assert len(identity.trace_id) == 32


# ---------------------------------------------------------------- outlet


@in_virtual_time
async def test_write_to_a_willing_socket_is_done_when_push_returns() -> None:
    client = FakeClient("/", {})
    async with asyncio.TaskGroup() as tasks:
        outlet = Outlet(client.send, tasks, LoopClock().mono_ns)
        outlet.start(200, [])
        outlet.push(b"a")
        assert client.body == b"a"
        outlet.finish(b"b")
        assert client.is_complete
        assert not outlet.is_blocked
        assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_blocked_socket_is_reported_and_its_time_counted() -> None:
    client = FakeClient("/", {})
    drained = []
    async with asyncio.TaskGroup() as tasks:
        outlet = Outlet(client.send, tasks, LoopClock().mono_ns)
        outlet.on_drained = lambda: drained.append(client.body)
        outlet.start(200, [])
        client.stall()
        outlet.push(b"a")
        assert outlet.is_blocked
        with pytest.raises(AssertionError, match="socket is full"):
            outlet.push(b"b")
        await asyncio.sleep(2)
        client.take_again()
        await outlet.unblocked()
        assert not outlet.is_blocked
        assert drained == [b"a"]
        assert outlet.blocked_ns == 2 * SECOND
        outlet.close()
        assert outlet.blocked_ns == 2 * SECOND


@in_virtual_time
async def test_closed_outlet_gives_up_its_write() -> None:
    client = FakeClient("/", {})
    async with asyncio.TaskGroup() as tasks:
        outlet = Outlet(client.send, tasks, LoopClock().mono_ns)
        client.stall()
        outlet.start(200, [])
        await asyncio.sleep(3)
        outlet.close()
        outlet.close()
        assert outlet.blocked_ns == 3 * SECOND
    assert client.messages == []


@in_virtual_time
async def test_socket_error_of_a_leaving_client_ends_nothing_else() -> None:
    fails = asyncio.Event()

    async def send(_: object) -> None:
        await fails.wait()
        raise ConnectionResetError

    async with asyncio.TaskGroup() as tasks:
        outlet = Outlet(send, tasks, LoopClock().mono_ns)
        outlet.start(200, [])
        fails.set()
        await outlet.unblocked()
        await settle_down()
        assert not outlet.is_blocked


# ---------------------------------------------------------------- metrics


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_settled_request_is_counted_in_every_view() -> None:
    metrics = Metrics()
    metrics.observe(record(first_token_at_ns=SECOND // 2, last_token_at_ns=SECOND, output_tokens=6, prompt_tokens=9))
    found = samples(metrics)
    of_request = "endpoint=/v1/chat/completions model=tide-1"
    assert found[f"tidegate_requests_total {of_request} outcome=finished reason= status=200"] == 1
    assert found[f"tidegate_ttft_seconds_sum {of_request}"] == 0.5
    assert found[f"tidegate_tpot_seconds_sum {of_request}"] == pytest.approx(0.1)
    assert found["tidegate_tokens_total kind=output model=tide-1"] == 6
    assert found["tidegate_phase_seconds_count phase=queue"] == 1


def test_attempts_after_the_first_are_counted_and_those_that_went_on() -> None:
    metrics = Metrics()
    metrics.observe(record(attempts=(Attempt("a", 0, 1, "lost"), Attempt("b", 1, 2, "lost", 5), Attempt("c", 2, 3))))
    found = samples(metrics)
    assert found["tidegate_retries_total model=tide-1"] == 2
    assert found["tidegate_resumes_total model=tide-1"] == 1


def test_hedges_are_counted_apart_from_retries() -> None:
    metrics = Metrics()
    lost, won = Attempt("b", 1, 2, "hedged", is_hedge=True), Attempt("b", 1, 2, None, 5, is_hedge=True)
    metrics.observe(record(attempts=(lost, Attempt("a", 0, 2, None, 5))))
    metrics.observe(record(attempts=(Attempt("a", 0, 2, "hedged"), won)))
    found = samples(metrics)
    assert found["tidegate_hedges_total model=tide-1"] == 2
    assert found["tidegate_hedges_won_total model=tide-1"] == 1
    assert found["tidegate_retries_total model=tide-1"] == 0


def test_exemplars_are_requests_whose_traces_were_kept() -> None:
    metrics = Metrics()
    kept, lost = record(trace_id="a" * 32, total_ns=SECOND // 5), record(trace_id="b" * 32, total_ns=3 * SECOND)
    metrics.observe(kept, is_traced=True)
    metrics.observe(lost)
    metrics.observe(msgspec.structs.replace(lost, total_ns=SECOND // 5))
    families = openmetrics_families(openmetrics.generate_latest(metrics.registry).decode())
    found = {
        sample.labels["le"]: sample.exemplar
        for family in families
        for sample in family.samples
        if sample.name == "tidegate_request_seconds_bucket" and sample.exemplar
    }
    assert list(found) == ["0.25"]
    assert (found["0.25"].labels, found["0.25"].value) == ({"trace_id": kept.trace_id}, 0.2)
    assert float(found["0.25"].timestamp) == pytest.approx(kept.arrived_unix_ns / 1e9 + 0.2)
    assert "trace_id" not in generate_latest(metrics.registry).decode()


def test_one_token_has_no_time_per_token() -> None:
    metrics = Metrics()
    metrics.observe(record(first_token_at_ns=5, last_token_at_ns=5, output_tokens=1))
    assert not any(name.startswith("tidegate_tpot_seconds_count") and value for name, value in samples(metrics).items())


def test_clients_cannot_make_labels() -> None:
    metrics = Metrics()
    counts = set()
    for number in range(50):
        metrics.observe(
            record(model="", outcome=Outcome.REJECTED, status=404, request_id=f"{number}", session=f"s{number}")
        )
        counts.add(len(samples(metrics)))
    assert len(counts) == 1


def scrape(
    metrics: Metrics, scheduler: Scheduler, capture: JournalStats | None = None, traces: tuple[int, int] = (0, 0)
) -> dict[str, float]:
    """All samples of a gateway with one worker that it cannot reach."""

    async def state() -> dict[str, float]:
        fleet = Fleet(["h:1"], gateway="g", version="0", clock=SYSTEM_CLOCK, scheduler=scheduler)
        metrics.registry.register(
            StateCollector(scheduler, fleet, lambda: capture, lambda: traces, SYSTEM_CLOCK, metrics.tenant_names)
        )
        return samples(metrics)

    return asyncio.run(state())


def test_state_is_read_at_scrape_time() -> None:
    found = scrape(Metrics(), Scheduler(), JournalStats(5, 2, 0, None), (3, 1))
    assert found["tidegate_worker_ready worker=h:1"] == 0
    assert found["tidegate_capture_entries_total"] == 5
    assert found["tidegate_capture_dropped_total"] == 2
    assert found["tidegate_traces_dropped_total"] == 1
    assert found["tidegate_leases"] == found["tidegate_queue_requests"] == 0


def test_tenant_beyond_the_bound_is_called_other_in_every_metric() -> None:
    metrics, scheduler = Metrics(), Scheduler()
    for number in range(MAX_TENANTS):
        metrics.observe(record(tenant=f"tenant-{number}"))
    metrics.observe(record(tenant="late"))
    scheduler.enqueue(Ticket(request=1, model="m", tenant="late", deadline_ns=1))
    found = scrape(metrics, scheduler)
    assert [name for name in found if name.startswith("tidegate_queue_depth")] == [
        "tidegate_queue_depth band=1 model=m tenant=other"
    ]
    assert (
        sum(found[name] for name in found if name.startswith("tidegate_tenant_requests_total") and "other" in name) == 1
    )
    assert not any("late" in name for name in found)
