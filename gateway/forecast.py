"""When a request would see its first token: pure estimates, corrected by what came of earlier ones.

TTFT = waited + work ahead / service rate + the rest of the running step + the steps of its own prefill. The step's
duration is a line in the prompt tokens that it computes, fitted per worker to the times between its frames; the
service rate is that of the placements while requests wait. The sum is multiplied by a rolling quantile of actual over
predicted: the middle for what to expect, `SAFE_SHARE` for what most requests stay under.
"""

from __future__ import annotations

import bisect
import collections
import math

import msgspec

WINDOW = 256
WARM = 8
"""Samples after which an estimate means something."""
FORGETTING = 0.99
INTERVAL_FORGETTING = 0.97
SAFE_SHARE = 0.9
SURE_SHARE = 0.95
"""Under overload nearly everybody who is admitted comes close to the limit, so that this is how many are in time."""
STALE_NS = 30_000_000_000
REACH = 4
"""The line of a step is followed up to so many times the most tokens seen in one."""
LEAST_NS = 1_000_000
"""No first token comes sooner; a ratio to less would say nothing."""


class Forecast(msgspec.Struct, frozen=True):
    """One request's time to first token, from its arrival."""

    raw_ns: int
    """Before correction: what the next correction is learned from."""
    expected_ns: int
    safe_ns: int
    """`SAFE_SHARE` of requests stay under it."""
    sure_ns: int
    """`SURE_SHARE` of requests stay under it."""
    is_queued: bool
    """It would wait in the gateway. What is predicted of those is corrected apart."""


class _Prefill(msgspec.Struct):
    tokens: int
    is_running: bool
    """It was there when the running step began."""
    has_chunks: bool = False
    """A step has ended that did not compute all of it."""


class Step(msgspec.Struct, frozen=True):
    duration_ns: int
    has_prefill: bool


class EngineForecast:
    """One worker's time from hand-over to first token, and what is known of its steps.

    The worker reports each step when it ends; the next one begins at once with what it was given by then.
    """

    def __init__(self, batch_tokens: int = 8192) -> None:
        self._batch_tokens = batch_tokens
        self._fit = LinearFit()
        self._ratios = RollingRatios()
        self._prefills: dict[int, _Prefill] = {}
        self._began_ns: int | None = None
        """When the step that runs has begun; None while the worker is idle."""
        self._prefill_steps = 0
        self._started_tokens = 0
        self._has_chunks = False
        self.unstarted_tokens = 0
        """Prompt tokens that it was given and that are not known to be computed."""

    # -- what happens

    def placed(self, request: int, tokens: int, now_ns: int) -> None:
        """The worker was given a prompt."""
        self._prefills[request] = _Prefill(tokens, is_running=self._began_ns is None)
        self.unstarted_tokens += tokens
        if self._began_ns is None:
            self._began_ns = now_ns

    def started(self, request: int) -> None:
        """The prompt's first token has come, in the frame of the step that is now ending."""
        prefill = self._forget(request)
        if prefill is not None:
            self._started_tokens += prefill.tokens
            self._has_chunks = self._has_chunks or prefill.has_chunks

    def dropped(self, request: int) -> None:
        """The prompt will not be computed, or has been: both are fine."""
        self._forget(request)

    def stepped(self, now_ns: int, *, is_idle: bool) -> Step | None:
        """A step has ended; None where nobody knows when it began."""
        began_ns, tokens, has_chunks = self._began_ns, self._started_tokens, self._has_chunks
        self._began_ns = None if is_idle and not self._prefills else now_ns
        self._started_tokens, self._has_chunks = 0, False
        if began_ns is None:
            return None
        for prefill in self._prefills.values():
            prefill.has_chunks = prefill.is_running
            has_chunks = has_chunks or prefill.is_running
            prefill.is_running = True
        if not has_chunks:  # how many tokens a chunk had is not known
            self._fit.add(tokens, now_ns - began_ns)
            self._prefill_steps += tokens > 0
        return Step(now_ns - began_ns, tokens > 0 or has_chunks)

    def _forget(self, request: int) -> _Prefill | None:
        prefill = self._prefills.pop(request, None)
        if prefill is not None:
            self.unstarted_tokens -= prefill.tokens
        return prefill

    # -- what is expected

    def pending_ns(self) -> float:
        """What computing the prompts that wait in the worker adds to its steps; 0 before that is known."""
        return self._fit.slope * self.unstarted_tokens

    def next_ns(self, tokens: int) -> float:
        """By how much the next step would be longer for one prompt more than those that it computes already."""
        ahead = sum(prefill.tokens for prefill in self._prefills.values() if not prefill.is_running)
        return self._fit.slope * (ahead + tokens) if ahead else 0.0

    def step_ns(self) -> float:
        """A step without a prompt."""
        return self._fit.predict(0)

    def raw_ns(self, tokens: int, now_ns: int) -> int | None:
        """Time to the first token of a prompt that the worker would be given now.

        None before there are samples, and for far more tokens in a step than were ever seen in one.
        """
        left_ns, in_step = 0.0, 0
        if self._began_ns is not None:
            running = sum(prefill.tokens for prefill in self._prefills.values() if prefill.is_running)
            in_step = min(running, self._batch_tokens)
            left_ns = max(0.0, self._began_ns + self._fit.predict(in_step) - now_ns)
        ahead = self.unstarted_tokens - in_step + tokens
        steps = max(1, math.ceil(ahead / self._batch_tokens))
        if self._prefill_steps < WARM or ahead > REACH * steps * self._fit.most_x:
            return None
        beyond_ns = self._fit.slope * max(0.0, ahead - self._fit.most_x)
        own_ns = (steps - 1) * self._fit.predict(0) + self._fit.predict(ahead) + beyond_ns
        return max(LEAST_NS, int(left_ns + own_ns))

    def expected_ns(self, tokens: int, now_ns: int) -> int | None:
        """The same, corrected by what came of earlier ones."""
        raw_ns = self.raw_ns(tokens, now_ns)
        return None if raw_ns is None else int(raw_ns * self._ratios.middle)

    def learn(self, raw_ns: int, actual_ns: int) -> None:
        """A first token came `actual_ns` after a hand-over for which `raw_ns` was predicted."""
        self._ratios.add(actual_ns / raw_ns)


class QueueForecast:
    """One model's queue: when what is ahead of a request will have been placed."""

    def __init__(self) -> None:
        self._fit = LinearFit(INTERVAL_FORGETTING)
        self._placed_ns = 0
        self._placed_tokens = 0
        self._has_followers = False
        self._ratios = {False: RollingRatios(), True: RollingRatios()}
        """Of requests that were placed at once, and of those that waited."""
        self._learned_ns = 0
        """When something was last learned of requests that wait."""

    def placed(self, tokens: int, now_ns: int, *, others_wait: bool) -> None:
        """A request left the queue for a worker. The time until the next one counts if others waited meanwhile."""
        if self._has_followers:
            self._fit.add(self._placed_tokens, now_ns - self._placed_ns)
            self._learned_ns = now_ns
        self._placed_ns, self._placed_tokens, self._has_followers = now_ns, tokens, others_wait

    def correct(self, raw_ns: int, *, is_queued: bool) -> Forecast:
        raw_ns = max(raw_ns, LEAST_NS)
        ratios = self._ratios[is_queued]
        expected_ns, safe_ns, sure_ns = (int(raw_ns * ratio) for ratio in (ratios.middle, ratios.safe, ratios.sure))
        return Forecast(raw_ns, expected_ns, safe_ns, sure_ns, is_queued)

    def learn(self, forecast: Forecast, actual_ns: int, now_ns: int) -> None:
        """What became of a forecast; of a request that gave up, what it had waited for in vain."""
        if forecast.is_queued:
            self._learned_ns = now_ns
        self._ratios[forecast.is_queued].add(actual_ns / forecast.raw_ns)

    def interval_ns(self) -> float | None:
        """Time from one placement to the next while requests wait; None while it is not known."""
        return self._fit.mean if self._fit.samples >= WARM else None

    def wait_ns(self, requests: float, tokens: float, now_ns: int) -> int | None:
        """Time until `requests` with so many prompt tokens are placed and it is the next one's turn.

        None before anything is known, and again when nothing was learned for long: a wrong forecast may have refused
        all who could have disproved it.
        """
        if now_ns - self._learned_ns > STALE_NS:
            self._fit = LinearFit(INTERVAL_FORGETTING)
            self._ratios[True] = RollingRatios()
        if self._fit.samples < WARM:
            return None
        turn_ns = self._placed_ns + self._fit.predict(self._placed_tokens) - now_ns
        return int(max(0.0, turn_ns) + max(0.0, requests * self._fit.intercept + tokens * self._fit.slope))


class LinearFit:
    """y = a + b * x by least squares in which old samples fade; b is never negative.

    `predict` does not extrapolate: beyond the largest x seen, and beyond the smallest and largest y, the line ends. A
    guess that is too low is corrected by what it lets happen; one that is too high would prevent its own correction.
    """

    def __init__(self, forgetting: float = FORGETTING) -> None:
        self._forgetting = forgetting
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self.most_x = 0.0
        self._least_y, self._most_y = math.inf, 0.0
        self.samples = 0

    def add(self, x: float, y: float) -> None:
        keep = self._forgetting
        self._n = keep * self._n + 1
        self._x = keep * self._x + x
        self._y = keep * self._y + y
        self._xx = keep * self._xx + x * x
        self._xy = keep * self._xy + x * y
        self.most_x = max(self.most_x, x)
        self._least_y, self._most_y = min(self._least_y, y), max(self._most_y, y)
        self.samples += 1

    @property
    def mean(self) -> float:
        """Of y."""
        return self._y / self._n if self._n else 0.0

    @property
    def slope(self) -> float:
        """0 while all x were the same."""
        spread = self._n * self._xx - self._x**2
        if spread <= 1e-9 * self._n * self._xx:
            return 0.0
        return max(0.0, (self._n * self._xy - self._x * self._y) / spread)

    @property
    def intercept(self) -> float:
        return (self._y - self.slope * self._x) / self._n if self._n else 0.0

    def predict(self, x: float) -> float:
        """0 before the first sample; the mean while all x were the same."""
        if not self._n:
            return 0.0
        slope = self.slope
        line = (self._y - slope * self._x) / self._n + slope * min(x, self.most_x)
        return min(self._most_y, max(self._least_y, line))


class RollingRatios:
    """Actual over predicted of the last WINDOW samples; 1 until there are enough."""

    def __init__(self) -> None:
        self._samples: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._sorted: list[float] = []
        self.middle = 1.0
        self.safe = 1.0
        """What SAFE_SHARE of samples stay under."""
        self.sure = 1.0

    def add(self, sample: float) -> None:
        if len(self._samples) == WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._samples[0])]
        self._samples.append(sample)
        bisect.insort(self._sorted, sample)
        if len(self._sorted) >= WARM:
            self.middle = self._sorted[len(self._sorted) // 2]
            self.safe = self._stayed_under(SAFE_SHARE)
            self.sure = self._stayed_under(SURE_SHARE)

    def _stayed_under(self, share: float) -> float:
        """The next sample has n + 1 equally likely places: the rank that it stays under in so many of them."""
        rank = math.ceil((len(self._sorted) + 1) * share)
        return self._sorted[min(len(self._sorted), rank) - 1]
