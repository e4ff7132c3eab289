"""When places come free."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.departures import Departures


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 4)), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(0, 50),
    st.randoms(use_true_random=False),
)
def test_known_ends_free_their_places_in_order(
    ends: list[tuple[int, int]], places: int, now: int, draw: random.Random
) -> None:
    departures = Departures()
    for request, (step, count) in enumerate(ends):
        departures.ends_at(request, step, count)
    left = [request for request in range(len(ends)) if draw.random() < 0.7]
    for request in set(range(len(ends))) - set(left):
        departures.leave(request)
        departures.leave(request)
    steps = sorted(step for request in left for step in [ends[request][0]] * ends[request][1])
    expected = max(0, steps[places - 1] - now) if places <= len(steps) else math.inf
    assert departures.steps_until(places, now) == expected


def test_answers_of_unknown_length_leave_at_a_rate() -> None:
    departures = Departures()
    assert departures.steps_until(1, 0) == math.inf
    for request in range(10):
        departures.ends_after(request, 40.0, 1)
    assert departures.steps_until(1, 0) == pytest.approx(4)
    assert departures.steps_until(3, 1_000) == pytest.approx(12), "however long they have been there"
    for request in range(5):
        departures.leave(request)
    assert departures.steps_until(1, 0) == pytest.approx(8)


def test_both_kinds_leave_together() -> None:
    departures = Departures()
    for request in range(10):
        departures.ends_after(request, 40.0, 1)
    departures.ends_at(99, 6, 2)
    assert departures.steps_until(1, 0) == pytest.approx(4)
    assert departures.steps_until(2, 0) == 6, "one by then of the ten, and the two"
    assert departures.steps_until(4, 0) == pytest.approx(8)


def test_what_is_learned_later_replaces_what_was_expected() -> None:
    departures = Departures()
    departures.ends_after(1, 40.0, 1)
    departures.ends_at(1, 7, 1)
    departures.ends_at(1, 9, 1)
    assert departures.steps_until(1, 5) == 4
    assert departures.steps_until(2, 5) == math.inf
    assert departures.steps_until(0, 5) == 0.0
