"""Forecasts: what they know, and what they do not pretend to know."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.forecast import WARM, EngineForecast, LinearFit, QueueForecast, RollingShare

MS = 1_000_000


def test_a_forecast_knows_nothing_until_it_has_samples() -> None:
    engine, queue = EngineForecast(), QueueForecast()
    for number in range(WARM - 1):
        engine.learn(100, 50 * MS)
        queue.placed(number * MS, others_wait=True)
    assert engine.predict_ns(100) is None
    assert engine.safe_ns(100) is None
    assert queue.predict_ns(0) is None


def test_the_engines_time_follows_the_prefill() -> None:
    draw = random.Random(1)
    engine = EngineForecast()
    for _ in range(300):
        tokens = draw.randint(10, 4_000)
        engine.learn(tokens, int((20 + 0.17 * tokens) * MS * draw.uniform(0.9, 1.1)))
    for tokens in (100, 1_000, 3_000):
        assert engine.predict_ns(tokens) == pytest.approx((20 + 0.17 * tokens) * MS, rel=0.1)
        assert engine.predict_ns(tokens) < engine.safe_ns(tokens) < 1.25 * engine.predict_ns(tokens)  # type: ignore[operator]


def test_a_burst_of_small_prompts_is_not_extrapolated_into_a_refusal() -> None:
    engine = EngineForecast()
    for tokens, seconds in zip((10, 12, 11, 13, 12, 14, 11, 15), (0.1, 0.2, 0.1, 1.9, 0.3, 2.5, 0.1, 3.0), strict=True):
        engine.learn(tokens, int(seconds * 1e9))
    assert engine.predict_ns(1_000) <= 3_000 * MS  # type: ignore[operator]


def test_the_queue_drains_at_the_rate_of_its_placements_and_forgets_when_it_is_empty() -> None:
    queue = QueueForecast()
    for number in range(20):
        queue.placed(number * 100 * MS, others_wait=True)
    assert queue.predict_ns(0) == 100 * MS
    assert queue.predict_ns(9) == 1_000 * MS
    queue.placed(20 * 100 * MS, others_wait=False)
    assert queue.predict_ns(0) is None


def test_forecasts_that_were_too_low_are_stretched() -> None:
    queue = QueueForecast()
    for number in range(20):
        queue.placed(number * 100 * MS, others_wait=True)
    for _ in range(50):
        queue.learn(100 * MS, 150 * MS)
    assert queue.safe_ns(0) == 150 * MS


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**12)), min_size=1, max_size=50), st.integers(0, 10**7)
)
def test_a_fit_never_leaves_what_was_seen(samples: list[tuple[int, int]], x: int) -> None:
    fit = LinearFit()
    for at, value in samples:
        fit.add(at, value)
    values = [value for _, value in samples]
    assert min(values) <= fit.predict(x) <= max(values)


@given(st.lists(st.floats(0, 100), min_size=300, max_size=600))
def test_a_rolling_share_is_that_of_its_window(samples: list[float]) -> None:
    share = RollingShare()
    for sample in samples:
        share.add(sample)
    window = sorted(samples[-256:])
    assert share.value == window[int(256 * 0.9)]
