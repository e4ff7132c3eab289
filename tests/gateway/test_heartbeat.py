"""Silence, with time passed in."""

from __future__ import annotations

from gateway.heartbeat import Silence

TICK_NS = 500


def ticked(silence: Silence, start_ns: int, ticks: int, heard_ns: int) -> int:
    """Silence after so many ticks in a row."""
    return [silence.tick(start_ns + (tick + 1) * TICK_NS, heard_ns) for tick in range(ticks)][-1]


def test_silence_grows_while_nothing_is_heard() -> None:
    assert ticked(Silence(TICK_NS, 1000), 1000, 8, heard_ns=1000) == 8 * TICK_NS


def test_silence_counts_from_the_last_word() -> None:
    silence = Silence(TICK_NS, 0)
    ticked(silence, 0, 8, heard_ns=0)
    assert silence.tick(9 * TICK_NS, heard_ns=9 * TICK_NS - 100) == 100
    assert silence.tick(10 * TICK_NS, heard_ns=9 * TICK_NS - 100) == 100 + TICK_NS


def test_time_in_which_nobody_listened_does_not_count() -> None:
    """A gateway suspended for an hour: it has to listen first, before it calls anybody silent."""
    silence = Silence(TICK_NS, 0)
    hour_ns = 3_600_000_000_000
    assert silence.tick(hour_ns, heard_ns=0) == 2 * TICK_NS
    assert silence.tick(hour_ns + TICK_NS, heard_ns=hour_ns + 10) == TICK_NS - 10


def test_word_from_before_a_suspension_is_not_long_silence() -> None:
    silence = Silence(TICK_NS, 0)
    assert silence.tick(1_000_000, heard_ns=10) == 2 * TICK_NS
