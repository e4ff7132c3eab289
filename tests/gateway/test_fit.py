"""The duration of a step: what is learned of it, and what is not made of it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fit import StepFit

SAMPLES = st.tuples(st.integers(0, 10**6), st.integers(0, 256), st.integers(0, 10**12))


def learned(draw: random.Random, samples: int = 300) -> StepFit:
    """20 ms, 2 for each prompt token and 0.5 for each answer; the more answers, the more prompts."""
    fit = StepFit()
    for _ in range(samples):
        answers = draw.randint(0, 64)
        tokens = draw.randint(0, answers)
        fit.add(tokens, answers, 20 + 2 * tokens + 0.5 * answers)
    return fit


def test_prompts_and_answers_are_told_apart() -> None:
    fit = learned(random.Random(1))
    assert fit.slope == pytest.approx(2)
    assert fit.predict(0, 10) == pytest.approx(25)
    assert fit.predict(30, 40) == pytest.approx(100)


def test_what_never_changed_explains_nothing() -> None:
    fit = StepFit()
    assert fit.predict(5, 5) == 0.0
    for tokens in (10, 20, 30):
        fit.add(tokens, 7, 5 * tokens)
    assert (fit.slope, fit.predict(20, 7)) == (pytest.approx(5), pytest.approx(100))
    same = StepFit()
    same.add(10, 7, 50)
    assert (same.slope, same.predict(99, 99)) == (0.0, 50)


def test_a_step_in_which_the_machine_did_something_else_bends_little() -> None:
    fit = learned(random.Random(1))
    fit.add(30, 40, 100 * 100)
    assert fit.predict(30, 40) == pytest.approx(100, rel=0.1)
    assert fit.predict(0, 40) == pytest.approx(40, rel=0.1)


def test_an_engine_that_has_become_slow_is_followed() -> None:
    draw, fit = random.Random(1), learned(random.Random(1))
    for _ in range(500):
        answers = draw.randint(0, 64)
        tokens = draw.randint(0, answers)
        fit.add(tokens, answers, 10 * (20 + 2 * tokens + 0.5 * answers))
    assert fit.predict(30, 40) == pytest.approx(1_000, rel=0.05)


def test_few_short_prompts_do_not_promise_an_age_for_many() -> None:
    """Noise between prompts of nearly one length has any slope; no token took longer than its whole step."""
    fit = StepFit()
    for tokens, duration in ((10, 20.0), (11, 20.0), (12, 50.0)):
        fit.add(tokens, 0, duration)
    assert fit.slope <= 50 / 12


@given(st.lists(SAMPLES, min_size=1, max_size=50), st.integers(0, 10**7), st.integers(0, 500))
def test_a_fit_never_leaves_what_was_seen(samples: list[tuple[int, int, int]], x: int, n: int) -> None:
    fit = StepFit()
    for tokens, answers, duration in samples:
        fit.add(tokens, answers, duration)
    durations = [duration for _, _, duration in samples]
    assert min(durations) <= fit.predict(x, n) <= max(durations)
    assert fit.slope >= 0
