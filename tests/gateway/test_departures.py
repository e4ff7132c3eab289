"""When places come free."""

import heapq
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
    if places <= len(steps):
        assert departures.steps_until(places, now, 100.0) == max(0, steps[places - 1] - now)
    elif not steps:
        assert departures.steps_until(places, now, 100.0) == math.inf
    else:
        assert departures.steps_until(places, now, 100.0) < departures.steps_until(places + 1, now, 100.0) < math.inf


@pytest.mark.parametrize("length", [10, 40, 200])
@pytest.mark.parametrize("slots", [1, 4, 32])
def test_who_takes_a_place_gives_it_back_too(slots: int, length: int) -> None:
    draw, departures = random.Random(slots), Departures()
    ends = sorted(draw.randint(1, length) for _ in range(slots))
    for request, end in enumerate(ends):
        departures.ends_at(request, end, 1)
    for place in range(1, 10 * slots + 1):
        end = heapq.heappop(ends)
        heapq.heappush(ends, end + length)
        assert departures.steps_until(place, 0, length) == pytest.approx(end, abs=length)


def test_answers_of_unknown_length_leave_at_a_rate() -> None:
    departures = Departures()
    assert departures.steps_until(1, 0, 40.0) == math.inf
    for request in range(10):
        departures.ends_after(request, 40.0, 1)
    assert departures.steps_until(1, 0, 40.0) == pytest.approx(4)
    assert departures.steps_until(3, 1_000, 40.0) == pytest.approx(12), "however long they have been there"
    for request in range(5):
        departures.leave(request)
    assert departures.steps_until(1, 0, 40.0) == pytest.approx(8)


def test_both_kinds_leave_together() -> None:
    departures = Departures()
    for request in range(10):
        departures.ends_after(request, 40.0, 1)
    departures.ends_at(99, 6, 2)
    assert departures.steps_until(1, 0, 40.0) == pytest.approx(4)
    assert departures.steps_until(2, 0, 40.0) == 6, "one by then of the ten, and the two"
    assert departures.steps_until(4, 0, 40.0) == pytest.approx(8)
    assert departures.steps_until(30, 0, 40.0) == pytest.approx(100, rel=0.1), "12 in 40 steps"


def test_what_is_learned_later_replaces_what_was_expected() -> None:
    departures = Departures()
    departures.ends_after(1, 40.0, 1)
    departures.ends_at(1, 7, 1)
    departures.ends_at(1, 9, 1)
    assert departures.steps_until(1, 5, 40.0) == 4
    assert departures.steps_until(2, 5, 20.0) == pytest.approx(4 + 20, abs=10)
    assert departures.steps_until(0, 5, 40.0) == 0.0
