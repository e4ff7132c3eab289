"""When the answers that a worker writes give their places back, counted in its steps: a step is a token of each.

An answer of known length leaves at a known step. Of the others one knows the mean: together they leave at a rate.
"""

from __future__ import annotations

import bisect
import math


class Departures:
    """One worker's answers."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        """Steps, in order; one for each place."""
        self._known: dict[int, tuple[int, int]] = {}
        """Request to the step of its end and its places."""
        self._rates: dict[int, float] = {}
        self._rate = 0.0
        """Places that the others give back per step."""

    def ends_at(self, request: int, step: int, places: int) -> None:
        """The answer's last token comes in that step, whatever was said of it before."""
        self.leave(request)
        self._known[request] = (step, places)
        for _ in range(places):
            bisect.insort(self._ends, step)

    def ends_after(self, request: int, mean_steps: float, places: int) -> None:
        self.leave(request)
        self._rates[request] = places / max(1.0, mean_steps)
        self._rate += self._rates[request]

    def leave(self, request: int) -> None:
        """It has left, or will not come."""
        end = self._known.pop(request, None)
        if end is not None:
            at = bisect.bisect_left(self._ends, end[0])
            del self._ends[at : at + end[1]]
            return
        self._rate -= self._rates.pop(request, 0.0)
        if not self._rates:
            self._rate = 0.0

    def steps_until(self, places: float, step: int, mean_steps: float) -> float:
        """Steps after `step` until so many places have been given back; infinite where nobody has one to give.

        Who takes a place gives it back too, `mean_steps` later: where those that are taken do not suffice, it counts.
        """
        if places <= 0:
            return 0.0
        ends, rate = self._ends, self._rate
        at = bisect.bisect_left(ends, places, key=lambda end: bisect.bisect_right(ends, end) + rate * (end - step))
        left = places - at  # what the others have to give
        by_rate = max(0.0, left / rate) if rate else math.inf
        if at < len(ends):
            return min(max(0, ends[at] - step), by_rate)
        length = max(1.0, mean_steps)
        if not ends or by_rate <= max(0, ends[0] - step) + length:
            return by_rate
        # In the mean, who has taken a place is half-way through: that half has been made and gave no place back.
        made = left + len(ends) / 2 + sum([max(0, end - step) for end in ends]) / length
        return made / (rate + len(ends) / length)
