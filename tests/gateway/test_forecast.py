"""Forecasts: what they know, and what they do not pretend to know."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.forecast import (
    EARLY_PART_STEPS,
    ENOUGH_NS,
    ENOUGH_STEPS,
    LEAST_NS,
    LONG_WAIT_NS,
    PART_NS,
    PART_STEPS,
    STALE_NS,
    WARM,
    WINDOW,
    EngineForecast,
    QueueForecast,
    RollingRatios,
)
from gateway.pace import SHARE as PACE_SHARE
from gateway.pace import Pace

MS = 1_000_000
STEP_MS = 20
TOKEN_MS = 0.2


class Steps:
    """An engine that computes all its prompts in one step and never rests."""

    def __init__(self, forecast: EngineForecast, *, step_ms: float = STEP_MS, token_ms: float = TOKEN_MS) -> None:
        self.forecast = forecast
        self.now_ns = 0
        self._step_ms, self._token_ms = step_ms, token_ms
        self._placed: list[tuple[int, int]] = []
        self._running: list[tuple[int, int]] = []
        self._requests = 0

    def give(self, tokens: int) -> None:
        self._requests += 1
        self._placed.append((self._requests, tokens))
        self.forecast.placed(self._requests, tokens, self.now_ns)

    def step(self, late_ns: int = 0) -> None:
        """One step; its frame is read so much later."""
        duration_ns = int((self._step_ms + self._token_ms * sum(tokens for _, tokens in self._running)) * MS)
        self.now_ns += duration_ns
        for request, _ in self._running:
            self.forecast.started(request)
        self.forecast.stepped(self.now_ns + late_ns, is_idle=False, step_ns=duration_ns)
        self._running, self._placed = self._placed, []


def warm(
    tokens: int = 1_000,
    *,
    step_ms: float = STEP_MS,
    token_ms: float = TOKEN_MS,
    makes_way: bool = True,
    pace: Pace | None = None,
) -> Steps:
    steps = Steps(EngineForecast(makes_way=makes_way, pace=pace), step_ms=step_ms, token_ms=token_ms)
    draw = random.Random(1)
    steps.give(tokens)
    for _ in range(10 * WARM):
        steps.step()
        if draw.random() < 0.5:
            steps.give(draw.randint(1, tokens))
    for _ in range(3):
        steps.step()
    return steps


def test_frames_that_are_read_late_and_together_do_not_make_steps_look_short() -> None:
    steps, late = warm(), warm()
    for _ in range(50):
        steps.step()
        steps.step()
        late.step(late_ns=STEP_MS * MS)
        late.step()
    assert late.forecast.step_ns() == pytest.approx(steps.forecast.step_ns(), rel=0.01) == STEP_MS * MS
    assert late.forecast.step_tokens(1) == steps.forecast.step_tokens(1) == PART_STEPS * STEP_MS / TOKEN_MS


def test_a_forecast_knows_nothing_until_it_has_seen_prompts() -> None:
    steps = Steps(EngineForecast())
    for _ in range(WARM):
        assert steps.forecast.raw_ns(100, steps.now_ns) is None
        steps.give(100)
        steps.step()
    assert QueueForecast().interval_ns() is None


def test_the_first_token_follows_the_rest_of_the_running_step() -> None:
    steps = warm()
    steps.give(500)
    half_way_ns = steps.now_ns + STEP_MS * MS // 2
    expected_ms = STEP_MS / 2 + STEP_MS + TOKEN_MS * (500 + 200)
    assert steps.forecast.raw_ns(200, half_way_ns) == pytest.approx(expected_ms * MS, rel=0.02)
    steps.step()  # the step of the 500 begins
    expected_ms = STEP_MS + TOKEN_MS * 500 + STEP_MS + TOKEN_MS * 200
    assert steps.forecast.raw_ns(200, steps.now_ns) == pytest.approx(expected_ms * MS, rel=0.02)


def test_a_prompt_that_comes_too_late_for_the_next_step_waits_for_all_of_it() -> None:
    steps = warm()
    steps.give(500)
    late_ns = steps.now_ns + STEP_MS * MS - int(steps.forecast.handover_ns) // 2
    expected_ms = STEP_MS + STEP_MS + TOKEN_MS * (500 + 200)
    assert steps.forecast.raw_ns(200, late_ns) == pytest.approx(expected_ms * MS, rel=0.03)
    steps.forecast.placed(9_999, 200, late_ns)
    steps.step()  # the step of the 500 begins, without it
    assert steps.forecast.delayed(0) == 1
    expected_ms = STEP_MS + TOKEN_MS * 500 + STEP_MS + TOKEN_MS * (200 + 100)
    assert steps.forecast.raw_ns(100, steps.now_ns) == pytest.approx(expected_ms * MS, rel=0.02)


def test_what_is_left_of_a_step_of_more_than_was_ever_seen_is_known() -> None:
    steps = warm(tokens=100)
    expected_ms = STEP_MS + TOKEN_MS * 400 + STEP_MS + TOKEN_MS * 50
    steps.give(400)
    steps.step()
    assert steps.forecast.raw_ns(50, steps.now_ns) == pytest.approx(expected_ms * MS, rel=0.03)


def test_a_prompt_far_larger_than_any_seen_is_not_guessed() -> None:
    steps = warm(tokens=100)
    expected_ms = 2 * STEP_MS + TOKEN_MS * 200
    assert steps.forecast.raw_ns(200, steps.now_ns) == pytest.approx(expected_ms * MS, rel=0.02)
    assert steps.forecast.raw_ns(1_000, steps.now_ns) is None


def test_a_prompt_that_never_started_holds_up_nobody() -> None:
    steps = warm()
    before_ns = steps.forecast.raw_ns(200, steps.now_ns)
    steps.forecast.placed(9_999, 800, steps.now_ns)
    assert steps.forecast.raw_ns(200, steps.now_ns) != before_ns
    steps.forecast.dropped(9_999)
    steps.forecast.dropped(9_999)
    assert steps.forecast.raw_ns(200, steps.now_ns) == before_ns
    assert steps.forecast.unstarted_tokens == 0


def test_steps_of_parts_of_a_prompt_are_not_taken_for_steps_without_one() -> None:
    steps = warm()
    before_ns = steps.forecast.raw_ns(200, steps.now_ns)
    steps.forecast.placed(9_999, 1_000, steps.now_ns)
    for _ in range(5):  # each as long as a quarter of the prompt takes
        steps.now_ns += 250 * MS
        steps.forecast.stepped(steps.now_ns, is_idle=False)
    steps.forecast.started(9_999)
    steps.now_ns += 250 * MS
    steps.forecast.stepped(steps.now_ns, is_idle=False)
    # The first of them began before the prompt was there, and so it was a step like any other, if a slow one.
    assert steps.forecast.raw_ns(200, steps.now_ns) == pytest.approx(before_ns, rel=0.25)


def test_full_steps_teach_though_each_ends_within_a_prompt() -> None:
    """An engine of small steps makes no others under load: nothing would be known of it, and all be admitted."""
    budget, prompt, now_ns = 1_000, 1_500, 0
    forecast = EngineForecast(budget)
    step_ns = (STEP_MS + TOKEN_MS * budget) * MS
    placed = started = partly = 0
    for _ in range(3 * WARM):
        while placed < started + 4:
            placed += 1
            forecast.placed(placed, prompt, now_ns)
        now_ns += int(step_ns)
        partly += budget
        while partly >= prompt:
            partly -= prompt
            started += 1
            forecast.started(started)
        forecast.stepped(now_ns, is_idle=False)
        assert forecast.unstarted_tokens == prompt * (placed - started) - partly
    steps = -(-forecast.unstarted_tokens // budget)
    assert forecast.raw_ns(1, now_ns) == pytest.approx(step_ns * steps, rel=0.02)


@pytest.mark.parametrize(
    ("step_ms", "token_ms", "enough"),
    [(20, 0.2, ENOUGH_STEPS * 20 / 0.2), (0.1, 0.01, ENOUGH_NS / MS / 0.01), (20, 0, 8_192)],
    ids=["by-the-step", "by-the-time", "what-a-step-can-compute"],
)
def test_the_next_step_is_full_when_it_has_enough_prompts(step_ms: float, token_ms: float, enough: float) -> None:
    steps = warm(step_ms=step_ms, token_ms=token_ms)
    assert not steps.forecast.is_next_full(0)
    steps.give(int(0.98 * enough))
    assert not steps.forecast.is_next_full(0)
    steps.give(int(0.03 * enough))
    assert steps.forecast.is_next_full(0)
    steps.step()
    assert not steps.forecast.is_next_full(0), "that step runs now"


@pytest.mark.parametrize(
    ("step_ms", "token_ms", "part"),
    [(20, 0.2, PART_STEPS * 20 / 0.2), (1, 0.01, PART_NS / MS / 0.01), (0.001, 10, PART_NS / MS / 10), (0.001, 100, 1)],
    ids=["by-the-step", "by-the-time", "few-tokens", "at-least-one"],
)
def test_prompts_that_make_way_take_a_few_times_a_step(step_ms: float, token_ms: float, part: float) -> None:
    steps = warm(step_ms=step_ms, token_ms=token_ms)
    assert steps.forecast.step_tokens(1) == pytest.approx(part, rel=0.03, abs=1)
    assert steps.forecast.step_tokens(2) == max(1, steps.forecast.step_tokens(1) // 2)
    for priority in (1, 2, 3):
        assert not steps.forecast.is_next_full(priority), "the worker has nothing to do"


def test_who_has_not_waited_long_takes_smaller_parts() -> None:
    steps = warm()
    forecast = steps.forecast
    early, late = (steps * STEP_MS / TOKEN_MS for steps in (EARLY_PART_STEPS, PART_STEPS))
    for priority in (1, 2):
        assert forecast.step_tokens(priority, LONG_WAIT_NS - 1) == pytest.approx(early / priority, abs=1)
        assert forecast.step_tokens(priority, LONG_WAIT_NS) == pytest.approx(late / priority, abs=1)
    steps.step()
    for waited_ns, count in ((0, math.ceil(500 / early)), (LONG_WAIT_NS, 2)):
        raw_ns = forecast.raw_ns(500, steps.now_ns, 1, waited_ns)
        expected_ms = STEP_MS + count * STEP_MS + TOKEN_MS * 500
        assert raw_ns == pytest.approx(expected_ms * MS, rel=0.02), "after the running step"


def test_answers_with_a_pace_to_keep_let_a_step_compute_what_they_do_not_need() -> None:
    pace = Pace(100 * MS)
    steps = Steps(EngineForecast(pace=pace))
    assert steps.forecast.step_tokens(1, 0, 5_000) > 5_000, "nobody is made to wait"
    steps = warm(pace=pace)
    steps.give(100)  # its answer has nothing saved
    steps.step()
    steps.step()
    part = (100 * PACE_SHARE - STEP_MS) / TOKEN_MS
    for tokens in (10, 5_000):
        assert steps.forecast.step_tokens(1, 0, tokens) == pytest.approx(part, abs=1)
        assert steps.forecast.step_tokens(3, 0, tokens) == pytest.approx(
            EARLY_PART_STEPS * STEP_MS / TOKEN_MS / 2, abs=1
        )
    steps.step()
    saved = part  # a step without a prompt
    fits, too_many = int(part + 0.9 * saved), int(part + 1.1 * saved)
    assert steps.forecast.step_tokens(1, 0, fits) == fits
    assert steps.forecast.step_tokens(1, 0, too_many) == pytest.approx(part, abs=1)
    steps.give(10)
    assert steps.forecast.step_tokens(1, 0, fits) == pytest.approx(part, abs=1), "another one may use it up"


def test_where_steps_are_short_parts_do_not_take_less_than_a_time() -> None:
    forecast = warm(step_ms=1, token_ms=0.01).forecast
    assert forecast.step_tokens(1, 0) == pytest.approx(PART_NS / MS / 0.01, rel=0.03)


def test_prompts_that_make_no_way_are_computed_whole() -> None:
    steps = warm(makes_way=False)
    forecast = steps.forecast
    assert forecast.step_tokens(1) == 0
    steps.give(500)
    for priority in (1, 2):
        assert forecast.raw_ns(1_000, steps.now_ns, priority) == forecast.raw_ns(1_000, steps.now_ns)
        assert forecast.after_step_ns(1_000, priority) == forecast.after_step_ns(1_000, 0)
        assert forecast.prompt_steps(1_000, priority) == forecast.prompt_steps(1_000, 0)
    steps.give(int(ENOUGH_STEPS * STEP_MS / TOKEN_MS))
    assert forecast.is_next_full(1)


def test_before_anything_is_known_a_step_is_given_what_it_can_compute() -> None:
    steps = Steps(EngineForecast(2_048))
    steps.give(1)
    steps.give(2_047)
    assert not steps.forecast.is_next_full(0)
    steps.give(1)
    assert steps.forecast.is_next_full(0)


def test_an_idle_worker_begins_its_step_with_the_prompt() -> None:
    steps = warm()
    steps.forecast.stepped(steps.now_ns, is_idle=True)
    an_hour_later_ns = steps.now_ns + 3_600_000 * MS
    expected_ns = (STEP_MS + TOKEN_MS * 200) * MS
    assert steps.forecast.raw_ns(200, an_hour_later_ns) == pytest.approx(expected_ns, rel=0.02)
    steps.forecast.placed(9_999, 200, an_hour_later_ns)
    steps.forecast.started(9_999)
    later_ns = int(an_hour_later_ns + expected_ns)
    steps.forecast.stepped(later_ns, is_idle=True)
    assert steps.forecast.raw_ns(200, later_ns) == pytest.approx(expected_ns, rel=0.02), "the hour is no step"


def busy_queue() -> tuple[QueueForecast, int]:
    """Each request is followed by the next after 150 ms."""
    queue, now_ns = QueueForecast(), 0
    for _ in range(100):
        queue.placed(now_ns, others_wait=True)
        now_ns += 150 * MS
    queue.placed(now_ns, others_wait=True)
    return queue, now_ns


def test_a_pause_in_which_nobody_waits_says_nothing_of_the_rate() -> None:
    queue, now_ns = busy_queue()
    queue.placed(now_ns + 150 * MS, others_wait=False)
    assert queue.interval_ns() == pytest.approx(150 * MS)
    queue.placed(now_ns + 10**15, others_wait=False)
    assert queue.interval_ns() == pytest.approx(150 * MS)


def test_what_nobody_could_disprove_for_long_is_forgotten() -> None:
    queue = QueueForecast()
    forecast = queue.correct(100 * MS, 0, is_queued=True)
    for _ in range(WARM):
        queue.learn(forecast, 10**12, 0)
    assert queue.correct(100 * MS, STALE_NS, is_queued=True).safe_ns == 10**12
    assert queue.correct(100 * MS, STALE_NS + 1, is_queued=True).safe_ns == 100 * MS


def test_forecasts_that_were_too_low_are_stretched_apart_by_kind() -> None:
    queue = QueueForecast()
    forecast = queue.correct(100 * MS, 0, is_queued=True)
    assert (forecast.expected_ns, forecast.safe_ns) == (100 * MS, 100 * MS)
    for number in range(100):
        queue.learn(forecast, 110 * MS if number % 5 else 200 * MS, number)
    corrected = queue.correct(100 * MS, 0, is_queued=True)
    assert corrected.expected_ns == pytest.approx(110 * MS)
    assert corrected.safe_ns == pytest.approx(200 * MS)
    assert queue.correct(100 * MS, 0, is_queued=False).safe_ns == 100 * MS
    assert queue.correct(0, 0, is_queued=True).raw_ns == LEAST_NS


@pytest.mark.parametrize("growth", [1.0, 1.002], ids=["as before", "slower and slower"])
def test_nine_of_ten_stay_under_what_is_safe(growth: float) -> None:
    queue, draw = QueueForecast(), random.Random(1)
    covered = []
    for number in range(2_000):
        forecast = queue.correct(100 * MS, 0, is_queued=True)
        actual_ns = int(100 * MS * growth**number * draw.lognormvariate(0, 0.3))
        covered.append(actual_ns <= forecast.safe_ns)
        queue.learn(forecast, actual_ns, 0)
    assert 0.88 <= sum(covered[200:]) / len(covered[200:]) <= 0.92


def test_the_margin_grows_with_the_requests_that_are_given_up() -> None:
    """Of which nobody knows how late they would have been: the deadline cuts what there is to learn from."""
    queue, draw, deadline_ns = QueueForecast(), random.Random(1), 1_000 * MS
    raw_ns, given_up = 950 * MS, []
    for _ in range(2_000):
        forecast = queue.correct(raw_ns, 0, is_queued=True)
        raw_ns = raw_ns - MS if forecast.sure_ns > deadline_ns else raw_ns + MS  # as long a queue as is admitted
        actual_ns = int(forecast.raw_ns * draw.lognormvariate(0, 0.3))
        given_up.append(actual_ns > deadline_ns)
        if given_up[-1]:
            queue.gave_up(forecast, deadline_ns, deadline_ns, 0)
        else:
            queue.learn(forecast, actual_ns, 0)
    assert 0.03 <= sum(given_up[500:]) / len(given_up[500:]) <= 0.06


def test_requests_that_are_given_up_again_and_again_do_not_stretch_it_without_end() -> None:
    """Those that nobody waits before are never refused, whatever is forecast."""
    queue, patience_ns = QueueForecast(), 1_000 * MS
    for _ in range(200):
        forecast = queue.correct(600 * MS, 0, is_queued=False)
        queue.gave_up(forecast, 0, patience_ns, 0)
    assert forecast.sure_ns <= 2 * patience_ns


@given(st.lists(st.floats(0, 100), min_size=WINDOW + 44, max_size=600))
def test_ratios_are_those_of_their_window(samples: list[float]) -> None:
    ratios = RollingRatios()
    for sample in samples:
        ratios.add(sample)
    window = sorted(samples[-WINDOW:])
    assert ratios.quantile(0.5) == window[128]
    assert ratios.quantile(0.9) == window[231], "the rank that one more sample stays under nine times in ten"
    assert ratios.quantile(0.95) == window[244]
    assert ratios.quantile(0.9999) == window[255]
