"""The breaker, with time passed in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.breaker import (
    CALM_NS,
    FAILURES_IN_A_ROW,
    FIRST_OPEN_NS,
    LONGEST_OPEN_NS,
    SECOND_NS,
    WINDOW,
    Breaker,
    Verdict,
)


def opened(now_ns: int = 0, breaker: Breaker | None = None) -> Breaker:
    breaker = breaker or Breaker()
    for _ in range(FAILURES_IN_A_ROW):
        breaker.record(now_ns, Verdict.FAILURE)
    assert not breaker.allows(now_ns)
    return breaker


def test_opens_after_failures_in_a_row_and_not_before() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.record(0, Verdict.FAILURE)
    assert breaker.allows(0)
    breaker.record(0, Verdict.SUCCESS)
    breaker.record(0, Verdict.FAILURE)
    assert breaker.allows(0), "a success starts the count anew"


def test_opens_when_half_of_many_attempts_fail() -> None:
    breaker = Breaker()
    for attempt in range(WINDOW):
        assert breaker.allows(0), attempt
        breaker.record(0, Verdict.FAILURE if attempt % 2 else Verdict.SUCCESS)
    assert breaker.state(0) == "open"


@given(st.lists(st.sampled_from([Verdict.SUCCESS, Verdict.NEITHER])))
def test_nothing_but_failures_opens(verdicts: list[Verdict]) -> None:
    """429s, cancels, deadlines and wrong requests are NEITHER."""
    breaker = Breaker()
    for now_ns, verdict in enumerate(verdicts):
        breaker.record(now_ns, verdict)
        assert breaker.allows(now_ns)


def test_half_open_lets_one_probe_through_and_its_success_closes() -> None:
    breaker = opened()
    assert not breaker.allows(FIRST_OPEN_NS - 1)
    assert breaker.allows(FIRST_OPEN_NS)
    assert breaker.state(FIRST_OPEN_NS) == "half-open"
    breaker.began(FIRST_OPEN_NS)
    assert not breaker.allows(FIRST_OPEN_NS), "one at a time"
    breaker.record(FIRST_OPEN_NS, Verdict.SUCCESS)
    assert breaker.state(FIRST_OPEN_NS) == "closed"


def test_probe_that_says_nothing_makes_room_for_another() -> None:
    breaker = opened()
    breaker.began(FIRST_OPEN_NS)
    breaker.record(FIRST_OPEN_NS, Verdict.NEITHER)
    assert breaker.allows(FIRST_OPEN_NS)
    assert breaker.state(FIRST_OPEN_NS) == "half-open"


def test_failed_probe_opens_for_twice_as_long_up_to_a_limit() -> None:
    breaker = opened()
    now_ns, open_ns = FIRST_OPEN_NS, FIRST_OPEN_NS
    for _ in range(10):
        breaker.began(now_ns)
        breaker.record(now_ns, Verdict.FAILURE)
        open_ns = min(2 * open_ns, LONGEST_OPEN_NS)
        assert not breaker.allows(now_ns + open_ns - 1)
        now_ns += open_ns
        assert breaker.allows(now_ns)
    assert open_ns == LONGEST_OPEN_NS


def test_time_without_failures_makes_it_patient_again() -> None:
    breaker = opened()
    breaker.began(FIRST_OPEN_NS)
    breaker.record(FIRST_OPEN_NS, Verdict.SUCCESS)
    soon_ns, late_ns = 2 * FIRST_OPEN_NS, 2 * FIRST_OPEN_NS + 2 * CALM_NS
    assert not opened(soon_ns, breaker).allows(soon_ns + FIRST_OPEN_NS)
    breaker.began(soon_ns + 2 * FIRST_OPEN_NS)
    breaker.record(soon_ns + 2 * FIRST_OPEN_NS, Verdict.SUCCESS)
    assert opened(late_ns, breaker).allows(late_ns + FIRST_OPEN_NS)


def test_ends_of_attempts_from_before_do_not_move_an_open_breaker() -> None:
    breaker = opened()
    for verdict in (Verdict.FAILURE, Verdict.SUCCESS, Verdict.NEITHER):
        breaker.record(SECOND_NS // 2, verdict)
    assert not breaker.allows(FIRST_OPEN_NS - 1)
    assert breaker.allows(FIRST_OPEN_NS)
