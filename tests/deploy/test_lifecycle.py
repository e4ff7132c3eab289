from __future__ import annotations

from deploy.lifecycle import (
    EXIT_MISCONFIGURED,
    BecameReady,
    Died,
    GaveUp,
    Lifecycle,
    RestartPolicy,
    Start,
    State,
    restart_delay_ns,
)

S = 1_000_000_000
POLICY = RestartPolicy(first_delay_ns=S, cap_ns=8 * S, ran_well_ns=60 * S, first_tries=3)


def ready_part(now_ns: int = 0) -> Lifecycle:
    life = Lifecycle(POLICY)
    assert life.observe(now_ns, exit_code=None, answers=False) == Start()
    assert life.observe(now_ns + 1, exit_code=None, answers=True) == BecameReady(1)
    return life


def test_delay_doubles_up_to_the_cap() -> None:
    assert [restart_delay_ns(n, POLICY) // S for n in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 8, 8, 8]


def test_part_is_started_at_once_and_ready_when_it_answers() -> None:
    life = Lifecycle(POLICY)
    assert life.observe(5 * S, exit_code=None, answers=False) == Start()
    assert life.observe(6 * S, exit_code=None, answers=False) is None
    assert life.state is State.STARTING
    assert life.observe(8 * S, exit_code=None, answers=True) == BecameReady(3 * S)
    assert life.state is State.READY


def test_dead_part_waits_its_delay_and_is_started_again() -> None:
    life = ready_part()
    assert life.observe(10 * S, exit_code=-9, answers=False) == Died(-9, 10 * S, S)
    assert life.observe(10 * S + S - 1, exit_code=None, answers=False) is None
    assert life.observe(11 * S, exit_code=None, answers=False) == Start()
    assert life.restarts == 1


def test_part_that_keeps_dying_is_never_given_up_once_it_was_ready() -> None:
    life, now, delays = ready_part(), 0, []
    for _ in range(10):
        now += S
        died = life.observe(now, exit_code=EXIT_MISCONFIGURED, answers=False)
        assert isinstance(died, Died)
        delays.append(died.delay_ns // S)
        now += died.delay_ns
        assert life.observe(now, exit_code=None, answers=False) == Start()
    assert delays == [1, 2, 4, 8, 8, 8, 8, 8, 8, 8]


def test_part_that_ran_well_starts_from_the_first_delay_again() -> None:
    life = ready_part()
    life.observe(S, exit_code=1, answers=False)
    life.observe(2 * S, exit_code=None, answers=False)
    assert life.observe(3 * S, exit_code=1, answers=False) == Died(1, S, 2 * S)
    life.observe(5 * S, exit_code=None, answers=False)
    assert life.observe(65 * S, exit_code=1, answers=False) == Died(1, 60 * S, S)


def test_misconfigured_part_is_given_up_at_once() -> None:
    life = Lifecycle(POLICY)
    life.observe(0, exit_code=None, answers=False)
    assert life.observe(S, exit_code=EXIT_MISCONFIGURED, answers=False) == GaveUp(EXIT_MISCONFIGURED, 1)
    assert life.observe(100 * S, exit_code=None, answers=False) is None


def test_part_that_was_never_ready_is_given_up_after_its_tries() -> None:
    life, decisions = Lifecycle(POLICY), []
    for now in range(0, 20 * S, S // 2):
        running = life.state is State.STARTING
        decisions.append(life.observe(now, exit_code=1 if running else None, answers=False))
    assert [type(d).__name__ for d in decisions if d] == ["Start", "Died", "Start", "Died", "Start", "GaveUp"]


def test_part_that_stops_answering_is_silent_until_it_answers_again() -> None:
    life = ready_part()
    life.observe(S, exit_code=None, answers=False)
    assert life.state is State.SILENT
    life.observe(2 * S, exit_code=None, answers=True)
    assert life.state is State.READY
