"""Whose turn comes when, on an engine of which everything is known."""

import pytest

from gateway import turn
from gateway.forecast import ENOUGH_STEPS, WARM, EngineForecast
from gateway.ledger import Lease, Ledger
from gateway.lengths import AnswerLength
from gateway.limiter import SequenceLimit
from gateway.order import Work
from gateway.pace import SHARE, Pace
from gateway.router import Worker
from tests.gateway.fakes import model_info

MS = 1_000_000
STEP_MS, TOKEN_MS = 20, 0.5
SLOTS = 4
BATCH_TOKENS = 1_000
ENOUGH_TOKENS = ENOUGH_STEPS * STEP_MS / TOKEN_MS
NOW_NS = 3_600_000 * MS


def worker(pace: Pace | None = None) -> Worker:
    """Its steps take 20 ms, and half of one for each prompt token."""
    model = model_info(max_sequences=SLOTS)
    return Worker(name="w", model=model, limit=SequenceLimit(SLOTS), forecast=_warm(pace or Pace()))


def _warm(pace: Pace) -> EngineForecast:
    forecast, now_ns = EngineForecast(BATCH_TOKENS, pace=pace), 0
    for number in range(-2 * WARM, 0):
        tokens = 10 * -number
        forecast.placed(number, tokens, now_ns)
        forecast.started(number)
        for computed in (tokens, 0):
            now_ns += int((STEP_MS + TOKEN_MS * computed) * MS)
            forecast.stepped(now_ns, is_idle=not computed)
    return forecast


def run(on: Worker, *lengths: AnswerLength) -> None:
    """Answers whose first token has come, in a step that ends at NOW_NS."""
    ledger = Ledger()
    on.held = ledger.account(on.name)
    for number, length in enumerate(lengths):
        ledger.acquire(Lease(request=number, worker=on.name, sequences=1, tokens=1))
        on.forecast.placed(number, 0, NOW_NS - STEP_MS * MS, length)
    for number in range(len(lengths)):
        on.forecast.started(number)
    on.forecast.stepped(NOW_NS, is_idle=False)


def exact(*tokens: int) -> list[AnswerLength]:
    return [AnswerLength(count, is_exact=True) for count in tokens]


def wait_ms(on: Worker, ahead: Work, *, share: float = 1.0, after_ms: int = 0) -> float:
    wait_ns = turn.wait_ns(on, ahead, share, 0, NOW_NS + after_ms * MS)
    assert wait_ns is not None
    return wait_ns / MS


def test_a_turn_comes_when_enough_answers_have_ended() -> None:
    on = worker()
    run(on, *exact(3, 11, 6, 30))  # a token of each has come
    assert wait_ms(on, Work()) == pytest.approx(2 * STEP_MS)
    assert wait_ms(on, Work(), after_ms=5) == pytest.approx(2 * STEP_MS - 5)
    ahead = Work(requests=2, tokens=100)
    assert wait_ms(on, ahead) == pytest.approx(10 * STEP_MS + 100 * TOKEN_MS)
    assert wait_ms(on, ahead, share=0.5) == pytest.approx(5 * STEP_MS + 50 * TOKEN_MS), "another does the rest"


def test_where_places_are_free_only_the_running_step_is_waited_for() -> None:
    on = worker()
    run(on, *exact(30, 30))
    assert wait_ms(on, Work(requests=1)) == pytest.approx(STEP_MS)
    assert wait_ms(on, Work(requests=2)) == pytest.approx(29 * STEP_MS)


def test_answers_of_unknown_length_are_expected_at_their_mean_rate() -> None:
    on = worker()
    run(on, *[AnswerLength(40.0)] * SLOTS)
    assert wait_ms(on, Work()) == pytest.approx((1 + 10) * STEP_MS)


def test_the_pace_makes_prompts_wait_until_their_time_is_earned() -> None:
    target_ms = 2 * STEP_MS / SHARE
    on = worker(Pace(int(target_ms * MS)))
    run(on, *exact(90))
    for _ in range(20):
        on.forecast.pace.stepped(20 * STEP_MS * MS, has_prefill=True)  # far behind
    debt_ms = 10 * 2 * STEP_MS
    ahead = Work(requests=1, tokens=60)
    steps = (debt_ms + 60 * TOKEN_MS) / STEP_MS
    assert wait_ms(on, ahead) == pytest.approx((1 + steps) * STEP_MS + 60 * TOKEN_MS)


def test_a_step_is_given_only_so_many_tokens_of_prompts() -> None:
    on = worker()
    run(on, *exact(90))
    steps = 30_000 / ENOUGH_TOKENS
    assert wait_ms(on, Work(requests=1, tokens=30_000)) == pytest.approx((1 + steps) * STEP_MS + 30_000 * TOKEN_MS)


def test_a_queue_of_more_than_the_worker_runs_is_waited_for_answer_by_answer() -> None:
    on = worker()
    run(on, *exact(100, 100, 100, 100))
    ahead = Work(requests=10 * SLOTS, output_tokens=10 * SLOTS * 100)
    assert wait_ms(on, ahead) == pytest.approx(11 * 100 * STEP_MS, rel=0.1)


def test_nobody_knows_when_nobody_has_come_or_nobody_will_leave() -> None:
    on = worker()
    on.limit.value = 0
    assert turn.wait_ns(on, Work(), 1.0, 0, NOW_NS) is None, "no place, and none taken"
    on.forecast = EngineForecast()
    assert turn.wait_ns(on, Work(), 1.0, 0, NOW_NS) is None
