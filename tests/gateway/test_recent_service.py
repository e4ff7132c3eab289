"""Who has had much more than the others lately."""

import random

from gateway.fairness import FADES, LATELY_NS, RecentService


def test_one_alone_is_not_loud_whatever_it_has_had() -> None:
    recent = RecentService()
    recent.charge("a", 1e9, 0)
    assert not recent.is_loud("a")
    assert not recent.is_loud("never seen")


def test_of_two_one_is_loud_that_has_more_than_three_quarters() -> None:
    recent = RecentService()
    recent.charge("a", 750, 0)
    recent.charge("b", 250, 0)
    assert not recent.is_loud("a")
    recent.charge("a", 1, 0)
    assert recent.is_loud("a")
    assert not recent.is_loud("b")


def test_equal_tenants_are_not_loud_by_chance() -> None:
    recent, draw = RecentService(), random.Random(1)
    names = [f"t{number}" for number in range(6)]
    loud = 0
    for number in range(20_000):
        recent.charge(draw.choice(names), draw.lognormvariate(6.6, 0.9), number * 100_000_000)
        loud += number > 1_000 and any(map(recent.is_loud, names))
    assert loud < 200


def test_what_was_long_ago_counts_no_more() -> None:
    recent = RecentService()
    recent.charge("a", 100_000, 0)
    recent.charge("b", 1_000, 0)
    assert recent.is_loud("a")
    for minute in range(1, 3 * FADES):
        recent.charge("b", 1_000, minute * LATELY_NS)
    assert not recent.is_loud("a")


def test_who_is_forgotten_has_no_equal_share_any_more() -> None:
    recent = RecentService()
    for name in "abcdef":
        recent.charge(name, 100, 0)
    for minute in range(1, 4 * FADES):
        recent.charge("a", 1_000, minute * LATELY_NS)
        recent.charge("b", 600, minute * LATELY_NS)
    assert not recent.is_loud("a"), "of two it has five eighths"
