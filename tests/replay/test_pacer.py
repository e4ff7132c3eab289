from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.pacer import Decision, Due, OpenPacer, Pacer, UserPacer
from replay.workload import SyntheticBody, WorkloadRequest

BODY = SyntheticBody(4, ("a",), 4)


def request(at_ns: int, after: int | None = None, think_ns: int = 0) -> WorkloadRequest:
    return WorkloadRequest(at_ns=at_ns, session="s", body=BODY, after=after, think_ns=think_ns)


@pytest.mark.parametrize(
    ("now_ns", "due", "wait_until_ns", "is_over"),
    [
        (0, [(0, 0)], 100, False),
        (99, [(0, 0)], 100, False),
        (100, [(0, 0), (1, 100)], 250, False),
        (249, [(0, 0), (1, 100)], 250, False),
        (1_000_000, [(0, 0), (1, 100), (2, 250)], None, True),
    ],
)
def test_open_pacer_gives_what_is_due(
    now_ns: int, due: list[tuple[int, int]], wait_until_ns: int | None, is_over: bool
) -> None:
    decision = OpenPacer([request(0), request(100), request(250)]).decide(now_ns)
    assert decision == Decision(tuple(Due(*pair) for pair in due), wait_until_ns, is_over)


def test_late_call_keeps_the_intended_times() -> None:
    decision = OpenPacer([request(0), request(10)]).decide(5_000)
    assert [due.intended_ns for due in decision.due] == [0, 10]


def test_nothing_is_given_twice() -> None:
    pacer = OpenPacer([request(0), request(10)])
    assert len(pacer.decide(20).due) == 2
    assert pacer.decide(30) == Decision((), None, True)


def test_next_turn_waits_for_the_last_one_and_the_think_time() -> None:
    pacer = OpenPacer([request(0), request(1_000, after=0, think_ns=300)])
    assert pacer.decide(5_000) == Decision((Due(0, 0),), None, False)
    pacer.ended(0, 7_000)
    assert pacer.decide(7_299) == Decision((), 7_300, False)
    assert pacer.decide(7_300) == Decision((Due(1, 7_300),), None, True)


def test_empty_workload_is_over_at_once() -> None:
    assert OpenPacer([]).decide(0).is_over


def test_users_start_one_after_another() -> None:
    pacer = UserPacer([request(0)] * 5, users=3, spawn_rate=2.0, think_ns=None)
    assert pacer.decide(0) == Decision((Due(0, 0),), 500_000_000, False)
    assert [due.index for due in pacer.decide(1_000_000_000).due] == [1, 2]


def test_user_takes_the_next_chain_when_done() -> None:
    pacer = UserPacer([request(0), request(0), request(0)], users=1, spawn_rate=1.0, think_ns=50)
    assert [due.index for due in pacer.decide(0).due] == [0]
    pacer.ended(0, 100)
    assert pacer.decide(100) == Decision((), 150, False)
    assert pacer.decide(150).due == (Due(1, 150),)


def test_user_stays_within_a_chain() -> None:
    pacer = UserPacer(
        [request(0), request(5, after=0, think_ns=40), request(9)], users=1, spawn_rate=1.0, think_ns=None
    )
    assert [due.index for due in pacer.decide(0).due] == [0]
    pacer.ended(0, 10)
    assert pacer.decide(50).due == (Due(1, 50),)
    pacer.ended(1, 60)
    assert pacer.decide(60) == Decision((Due(2, 60),), None, True)


@st.composite
def workloads(draw: st.DrawFn) -> list[WorkloadRequest]:
    """Linear chains, as captures have them."""
    tails: list[int] = []
    requests: list[WorkloadRequest] = []
    for index in range(draw(st.integers(1, 30))):
        after = draw(st.sampled_from([None, *tails])) if tails else None
        if after is not None:
            tails.remove(after)
        tails.append(index)
        requests.append(request(draw(st.integers(0, 10_000)), after, draw(st.integers(0, 100))))
    return requests


@given(workloads(), st.integers(0, 5), st.lists(st.integers(0, 500), min_size=1))
def test_every_request_is_sent_once_and_never_early(
    requests: list[WorkloadRequest], users: int, durations_ns: list[int]
) -> None:
    pacer: Pacer = UserPacer(requests, users=users, spawn_rate=1e6, think_ns=None) if users else OpenPacer(requests)
    running: list[tuple[int, int]] = []
    sent: list[int] = []
    now_ns = 0
    while True:
        decision = pacer.decide(now_ns)
        for due in decision.due:
            assert due.intended_ns <= now_ns
            assert requests[due.index].after in (None, *sent)
            sent.append(due.index)
            running.append((now_ns + durations_ns[due.index % len(durations_ns)], due.index))
        if decision.is_over:
            break
        moments = [at_ns for at_ns, _ in running]
        if decision.wait_until_ns is not None:
            moments.append(decision.wait_until_ns)
        now_ns = max(now_ns, min(moments))
        for at_ns, index in [each for each in running if each[0] <= now_ns]:
            running.remove((at_ns, index))
            pacer.ended(index, at_ns)
    assert sorted(sent) == list(range(len(requests)))
