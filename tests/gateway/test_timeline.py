from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.timeline import Timeline
from protos.core.contract import Stamps
from protos.core.record import PHASES

STAMPS = (
    "received_ns",
    "admitted_ns",
    "dequeued_ns",
    "routed_ns",
    "dispatched_ns",
    "engine_received_ns",
    "engine_queued_ns",
    "engine_scheduled_ns",
    "first_token_ns",
    "last_token_ns",
)
NAMES = ("receive", "admit", "queue", "route", "retry", *PHASES[5:])


def timeline(arrived_ns: int = 1000, **stamps: int) -> Timeline:
    it = Timeline(arrived_ns, 0)
    for name, value in stamps.items():
        setattr(it, name, value)
    return it


stamp = st.just(0) | st.integers(1, 5000)


@given(st.integers(1, 3000), st.integers(0, 5000), st.fixed_dictionaries(dict.fromkeys(STAMPS, stamp)))
def test_phases_and_the_rest_are_the_total_whatever_the_stamps(
    arrived_ns: int, lasted_ns: int, stamps: dict[str, int]
) -> None:
    phases, unattributed_ns = timeline(arrived_ns, **stamps).freeze(arrived_ns + lasted_ns)
    assert phases.sum_ns() + unattributed_ns == lasted_ns
    assert all(value >= 0 for _, value in phases.present())
    assert unattributed_ns >= 0


@given(st.lists(st.integers(1, 1000), min_size=11, max_size=11))
def test_stamps_in_order_give_every_phase_its_own_time(lengths: list[int]) -> None:
    at, stamps = 1000, {}
    for name, length in zip(STAMPS, lengths, strict=False):
        at += length
        stamps[name] = at
    phases, unattributed_ns = timeline(**stamps).freeze(at + lengths[-1])
    assert unattributed_ns == 0
    assert dict(phases.present()) == dict(zip(PHASES, lengths, strict=True))


def test_phase_that_never_happened_is_absent() -> None:
    phases, _ = timeline(received_ns=1100, admitted_ns=1200, dequeued_ns=1500).freeze(1500)
    assert dict(phases.present()) == {"receive": 100, "admit": 100, "queue": 300}


def test_request_that_ends_in_the_queue_spent_its_time_there() -> None:
    phases, unattributed_ns = timeline(received_ns=1100, admitted_ns=1200).freeze(9200)
    assert (phases.queue, unattributed_ns) == (8000, 0)


def test_first_attempt_is_no_retry() -> None:
    stamps = {"received_ns": 1001, "admitted_ns": 1002, "dequeued_ns": 1003, "routed_ns": 1004}
    first, _ = timeline(**stamps, dispatched_ns=1004, engine_received_ns=1010).freeze(1020)
    assert first.retry is None
    again, _ = timeline(**stamps, dispatched_ns=1500, engine_received_ns=1510).freeze(1520)
    assert (again.retry, again.dispatch) == (496, 10)


def test_time_that_a_worker_owes_is_unattributed() -> None:
    sent = {"received_ns": 1001, "admitted_ns": 1002, "dequeued_ns": 1003, "routed_ns": 1004, "dispatched_ns": 1004}
    assert timeline(**sent).freeze(2004)[1] == 1000
    assert timeline(**sent, engine_received_ns=1104).freeze(2004)[1] == 900


def test_new_attempt_forgets_what_the_last_worker_said() -> None:
    it = timeline(received_ns=1001, admitted_ns=1002, dequeued_ns=1003, routed_ns=1004, dispatched_ns=1004)
    it.take_stamps(Stamps(1010, 1020, 1030, 1040, 1050), 0)
    it.forget_engine()
    assert it.first_token_ns == it.engine_received_ns == 0


def test_workers_stamps_are_shifted_into_our_clock() -> None:
    it = timeline()
    it.take_stamps(Stamps(5010, 5020, 0, 5040, 5050), 4000)
    assert (it.engine_received_ns, it.engine_scheduled_ns, it.last_token_ns) == (1010, 0, 1050)
