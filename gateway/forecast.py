"""When a request would see its first token: pure estimates, corrected by what came of earlier ones.

Two parts, because they are wrong for different reasons. Inside the engine the time to the first token is a + b *
prefill, where prefill counts the request's own prompt and those that the worker has not started yet. In the queue it is
the requests ahead over the rate at which the queue drains. Each part is stretched by the rolling share of actual over
predicted that `SAFE_SHARE` of requests stay under.
"""

from __future__ import annotations

import bisect
import collections
import math

WINDOW = 256
WARM = 8
"""Samples after which an estimate means something."""
FORGETTING = 0.99
SAFE_SHARE = 0.9


class EngineForecast:
    """One worker's time from hand-over to first token, in nanoseconds, by tokens of prefill to do."""

    def __init__(self) -> None:
        self._fit = LinearFit()
        self._stretch = RollingShare()

    def predict_ns(self, prefill_tokens: int) -> int | None:
        """The expected time; None before there are samples."""
        if self._fit.samples < WARM:
            return None
        return max(1, int(self._fit.predict(prefill_tokens)))

    def safe_ns(self, prefill_tokens: int) -> int | None:
        """A time that SAFE_SHARE of requests stay under."""
        expected_ns = self.predict_ns(prefill_tokens)
        return None if expected_ns is None else int(expected_ns * self._stretch.value)

    def learn(self, prefill_tokens: int, actual_ns: int) -> None:
        """A first token came `actual_ns` after the hand-over."""
        expected_ns = self.predict_ns(prefill_tokens)
        if expected_ns is not None:
            self._stretch.add(actual_ns / expected_ns)
        self._fit.add(prefill_tokens, actual_ns)


class QueueForecast:
    """One model's waiting time, in nanoseconds, by requests ahead."""

    def __init__(self) -> None:
        self._placed_ns: collections.deque[int] = collections.deque(maxlen=WINDOW // 4)
        self._stretch = RollingShare()

    def placed(self, now_ns: int, *, others_wait: bool) -> None:
        """A request left the queue for a worker. With nobody behind it the queue is over, and so is its rate."""
        if others_wait:
            self._placed_ns.append(now_ns)
        else:
            self._placed_ns.clear()

    def interval_ns(self) -> float | None:
        """Time from one placement to the next while requests wait; None while it is not known."""
        placed_ns = self._placed_ns
        if len(placed_ns) < WARM:
            return None
        return (placed_ns[-1] - placed_ns[0]) / (len(placed_ns) - 1)

    def predict_ns(self, ahead: int) -> int | None:
        """The expected wait behind `ahead` requests; None while the queue has no rate."""
        interval_ns = self.interval_ns()
        return None if interval_ns is None else int((ahead + 1) * interval_ns)

    def safe_ns(self, ahead: int) -> int | None:
        """A wait that SAFE_SHARE of requests stay under."""
        expected_ns = self.predict_ns(ahead)
        return None if expected_ns is None else int(expected_ns * self._stretch.value)

    def learn(self, expected_ns: int, actual_ns: int) -> None:
        """A request for which `expected_ns` was predicted has waited `actual_ns`."""
        self._stretch.add(actual_ns / max(1, expected_ns))


class LinearFit:
    """y = a + b * x by least squares in which old samples fade; b is never negative.

    Nothing is extrapolated: beyond the largest x seen, and beyond the smallest and largest y, the line ends. A guess
    that is too low is corrected by what it lets happen; one that is too high would prevent its own correction.
    """

    def __init__(self, forgetting: float = FORGETTING) -> None:
        self._forgetting = forgetting
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._most_x = 0.0
        self._least_y, self._most_y = math.inf, 0.0
        self.samples = 0

    def add(self, x: float, y: float) -> None:
        keep = self._forgetting
        self._n = keep * self._n + 1
        self._x = keep * self._x + x
        self._y = keep * self._y + y
        self._xx = keep * self._xx + x * x
        self._xy = keep * self._xy + x * y
        self._most_x = max(self._most_x, x)
        self._least_y, self._most_y = min(self._least_y, y), max(self._most_y, y)
        self.samples += 1

    def predict(self, x: float) -> float:
        """0 before the first sample; the mean while all x were the same."""
        if not self._n:
            return 0.0
        spread = self._n * self._xx - self._x**2
        is_flat = spread <= 1e-9 * self._n * self._xx
        slope = 0.0 if is_flat else max(0.0, (self._n * self._xy - self._x * self._y) / spread)
        line = (self._y - slope * self._x) / self._n + slope * min(x, self._most_x)
        return min(self._most_y, max(self._least_y, line))


class RollingShare:
    """The value that SAFE_SHARE of the last WINDOW samples stay under; 1 until there are enough."""

    def __init__(self) -> None:
        self._samples: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._sorted: list[float] = []
        self.value = 1.0

    def add(self, sample: float) -> None:
        if len(self._samples) == WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._samples[0])]
        self._samples.append(sample)
        bisect.insort(self._sorted, sample)
        if len(self._sorted) >= WARM:
            self.value = self._sorted[min(len(self._sorted) - 1, int(len(self._sorted) * SAFE_SHARE))]
