"""How long a step of an engine takes, learned from those that it has made."""

from __future__ import annotations

import math

FORGETTING = 0.99
OUTLIER = 3.0
"""A step takes part in the fit with at most so many times what was expected: one of seconds, in which the machine did
something else, would bend it for long. An engine that has become slow is followed all the same, step by step."""
WARM = 8
"""Steps after which something is expected."""
BASE_REACH = 2
"""A step of nothing is taken to be no shorter than such a part of the shortest that was seen."""
LEAST_SPREAD = 1e-9
"""Relative to the square of what is seen: less is rounding."""


class StepFit:
    """y = a + b * x + c * n by least squares in which old steps fade: y for x prompt tokens and n answers.

    b and c are never negative. `predict` does not extrapolate: beyond the largest x and n seen, and beyond the smallest
    and largest y, the plane ends, and b is no more than the longest step explains. A guess that is too low is corrected
    by what it lets happen; one that is too high would prevent its own correction.
    """

    def __init__(self, forgetting: float = FORGETTING) -> None:
        self._forgetting = forgetting
        self._sums: tuple[float, ...] = (0.0,) * 9
        self._base = self._each = 0.0
        self.slope = 0.0
        """What one more prompt token adds; 0 while all x were the same."""
        self._steps = 0
        self.most_x = 0.0
        self._most_n = 0.0
        self._least_y, self.most_y = math.inf, 0.0

    def add(self, x: float, n: float, y: float) -> None:
        if self.is_warm and x <= self.most_x and n <= self._most_n:
            y = min(y, OUTLIER * self.predict(x, n))
        self._steps += 1
        keep = self._forgetting
        terms = (1.0, x, n, y, x * x, n * n, x * n, x * y, n * y)
        self._sums = tuple([keep * total + term for total, term in zip(self._sums, terms, strict=True)])
        self.most_x, self._most_n = max(self.most_x, x), max(self._most_n, n)
        self._least_y, self.most_y = min(self._least_y, y), max(self.most_y, y)
        self._base, self.slope, self._each = self._solve()

    @property
    def is_warm(self) -> bool:
        return self._steps >= WARM

    def predict(self, x: float, n: float) -> float:
        """0 before the first step."""
        if not self._steps:
            return 0.0
        x = x if x < self.most_x else self.most_x
        n = n if n < self._most_n else self._most_n
        y = self._base + self.slope * x + self._each * n
        if y < self._least_y:
            return self._least_y
        return y if y < self.most_y else self.most_y

    def extrapolate(self, x: float, n: float) -> float:
        """The same, and more for x beyond the largest seen."""
        y, beyond = self.predict(x, n), x - self.most_x
        return y + self.slope * beyond if beyond > 0 else y

    @property
    def base(self) -> float:
        """y for no tokens and no answers: about, where no step was without them. 0 before the first step."""
        if not self._steps:
            return 0.0
        least = self._least_y / BASE_REACH
        return least if self._base < least else min(self._base, self._least_y)

    def _solve(self) -> tuple[float, float, float]:
        weight, x, n, y, xx, nn, xn, xy, ny = self._sums
        spreads = _spread(xx, x, weight), _spread(nn, n, weight)
        slope, each = _slopes(*spreads, xn - x * n / weight, xy - x * y / weight, ny - n * y / weight)
        if self.most_x:
            slope = min(slope, self.most_y / self.most_x)
        return (y - slope * x - each * n) / weight, slope, each


def _spread(squares: float, total: float, weight: float) -> float:
    """Sum of the squared distances from the mean; 0 where they are all the same."""
    spread = squares - total * total / weight
    return spread if spread > LEAST_SPREAD * squares else 0.0


def _slopes(xx: float, nn: float, xn: float, xy: float, ny: float) -> tuple[float, float]:
    """Of x and n, neither negative: where one would be, the other explains what it can alone."""
    slope = max(0.0, xy / xx) if xx else 0.0
    each = max(0.0, ny / nn) if nn else 0.0
    if not (xx and nn):
        return slope, each
    determinant = xx * nn - xn * xn
    if determinant <= LEAST_SPREAD * xx * nn:
        return slope, 0.0
    both = (xy * nn - ny * xn) / determinant, (ny * xx - xy * xn) / determinant
    if min(both) >= 0:
        return both
    return (slope, 0.0) if both[1] < 0 else (0.0, each)
