"""When a request would see its first token: pure estimates, corrected by what came of earlier ones.

TTFT = waited + the rest of the running step + the steps until its turn + those of its own prefill. The duration of a
step is linear in the prompt tokens that it computes and the answers that it writes, fitted per worker to the times
between its frames; whose turn comes when is in `gateway.turn`. The sum is multiplied by a rolling quantile of actual
over predicted: the middle for what to expect, `SAFE_SHARE` for what most requests stay under.
"""

from __future__ import annotations

import bisect
import collections
import math

import msgspec

from gateway.departures import Departures
from gateway.fit import StepFit

WINDOW = 256
WARM = 8
"""Samples after which an estimate means something."""
INTERVAL_FORGETTING = 0.97
SAFE_SHARE = 0.9
SURE_SHARE = 0.95
"""Under overload nearly everybody who is admitted comes close to the limit, so that this is how many are in time."""
SHARE_RATE = 0.01
SHARE_REACH = 0.1
MOST_SHARE = 0.995
"""How fast, and how far, a share is corrected by how many really stayed under it."""
LATER = 1.25
"""So much later than it waited is the first token taken to be of one that was given up: so that the margin grows."""
STALE_NS = 30_000_000_000
REACH = 4
"""The line of a step is followed up to so many times the most tokens seen in one."""
ENOUGH_STEPS = 8
ENOUGH_NS = 50_000_000
"""A step has enough prompts when they take so many times what a step takes that computes nothing, and at least so long:
the next ones are on their way by then. Fewer would cost throughput; with more, the first waits for the last."""
OVERDUE_NS = 1_000_000_000
"""A step that takes so much longer than any before may never end."""
LEAST_NS = 1_000_000
"""No first token comes sooner; a ratio to less would say nothing."""


class Forecast(msgspec.Struct, frozen=True, gc=False):
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


class AnswerLength(msgspec.Struct, frozen=True, gc=False):
    """What is known of an answer before it comes."""

    tokens: float
    """Of each sequence."""
    sequences: int = 1
    is_exact: bool = False
    """It makes so many, and does not end before; else that is what such answers have in the mean."""


class _Prefill(msgspec.Struct, gc=False):
    tokens: int
    """That are left to compute."""
    is_running: bool
    """It was there when the running step began."""
    is_yielding: bool = False
    """The engine computes as much of it in a step as others leave."""
    is_unknown: bool = False
    """Steps have computed a part of it, and nobody knows how much."""
    answer: AnswerLength | None = None


class Step(msgspec.Struct, frozen=True, gc=False):
    duration_ns: int
    has_prefill: bool


class EngineForecast:
    """One worker's time from hand-over to first token, and what is known of its steps.

    The worker reports each step when it ends; the next one begins at once with what it was given by then.
    """

    def __init__(self, batch_tokens: int = 8192) -> None:
        self._batch_tokens = batch_tokens
        self._enough_tokens = float(batch_tokens)
        """Of prompts, for a step."""
        self._fit = StepFit()
        self._ratios = RollingRatios()
        self._prefills: dict[int, _Prefill] = {}
        self._began_ns: int | None = None
        """When the step that runs has begun; None while the worker is idle."""
        self._prefill_steps = 0
        self._started_tokens = 0
        """That the running step has computed of the prompts whose first tokens came with its end."""
        self._has_unknown = False
        """Not all of it is known."""
        self._running = 0
        """Answers that the running step goes on with."""
        self._steps = 0
        """That have ended."""
        self._departures = Departures()
        self._step_ns: float | None = None
        """A step without a prompt, once somebody has asked since the last one."""
        self._joined_tokens = 0
        """Of `unstarted_tokens`, those that were there when the running step began."""
        self.unstarted_tokens = 0
        """Prompt tokens that it was given and that are not known to be computed."""

    # -- what happens

    def placed(
        self,
        request: int,
        tokens: int,
        now_ns: int,
        answer: AnswerLength | None = None,
        *,
        is_yielding: bool = False,
    ) -> None:
        """The worker was given a prompt."""
        is_running = self._began_ns is None
        self._prefills[request] = _Prefill(tokens, is_running, is_yielding, answer=answer)
        self.unstarted_tokens += tokens
        if is_running:
            self._began_ns = now_ns
            self._joined_tokens += tokens
        if answer is not None:
            self._expect_end(request, answer, self._steps + (1 if is_running else 2))

    def started(self, request: int) -> None:
        """The prompt's first token has come, in the frame of the step that is now ending."""
        prefill = self._forget(request)
        if prefill is not None:
            self._started_tokens += prefill.tokens
            self._has_unknown = self._has_unknown or prefill.is_unknown
            if prefill.answer is not None:
                self._expect_end(request, prefill.answer, self._steps + 1)

    def dropped(self, request: int) -> None:
        """The request has left the worker, before its prompt was computed or after."""
        self._forget(request)
        self._departures.leave(request)

    def rest(self) -> None:
        """Nothing of ours is left on the worker, though no step may have told: its last requests were cancelled."""
        self._began_ns = None

    def stepped(self, now_ns: int, *, is_idle: bool, running: int = 0) -> Step | None:
        """A step has ended, and the next one goes on with `running` answers; None where nobody knows when it began."""
        began_ns, tokens, has_unknown = self._began_ns, self._started_tokens, self._has_unknown
        ran, self._running = self._running, running
        self._steps += 1
        self._step_ns = None
        self._began_ns = None if is_idle and not self._prefills else now_ns
        self._started_tokens, self._has_unknown = 0, False
        if began_ns is None:
            return None
        unfinished = [prefill for prefill in self._prefills.values() if prefill.is_running]
        if unfinished:
            part = self._compute_part(unfinished, self._batch_tokens - ran - tokens)
            tokens += part
            has_unknown = has_unknown or not part
        for prefill in self._prefills.values():
            prefill.is_running = True
        self._joined_tokens = self.unstarted_tokens
        if not has_unknown:
            self._fit.add(tokens, ran, now_ns - began_ns)
            self._prefill_steps += tokens > 0
            self._enough_tokens = self._find_enough()
        return Step(now_ns - began_ns, tokens > 0 or has_unknown)

    def _compute_part(self, unfinished: list[_Prefill], budget: int) -> int:
        """A step has ended that left prompts unfinished: what it computed of them, in order; 0 where nobody knows.

        It had no tokens left where they are more than it could compute. Else something else held them up.
        """
        is_yielding = any(one.is_yielding for one in unfinished)
        if is_yielding or not 0 < budget < sum([one.tokens for one in unfinished]):
            for prefill in unfinished:
                prefill.is_unknown = True
            return 0
        left = budget
        for prefill in unfinished:
            part = min(left, prefill.tokens)
            prefill.tokens -= part
            left -= part
        self.unstarted_tokens -= budget
        return budget

    def _find_enough(self) -> float:
        slope = self._fit.slope
        if not (self.is_known and slope):
            return self._batch_tokens
        return min(self._batch_tokens, max(ENOUGH_NS, ENOUGH_STEPS * self._fit.predict(0, 0)) / slope)

    def _forget(self, request: int) -> _Prefill | None:
        prefill = self._prefills.pop(request, None)
        if prefill is not None:
            self.unstarted_tokens -= prefill.tokens
            self._joined_tokens -= prefill.tokens if prefill.is_running else 0
        return prefill

    def _expect_end(self, request: int, answer: AnswerLength, first_step: int) -> None:
        if answer.is_exact:
            self._departures.ends_at(request, first_step + int(answer.tokens) - 1, answer.sequences)
        else:
            self._departures.ends_after(request, answer.tokens, answer.sequences)

    # -- what is expected

    @property
    def in_step_tokens(self) -> int:
        """Of the prompts that it was given, what the running step computes."""
        joined = self._joined_tokens
        return joined if joined < self._batch_tokens else self._batch_tokens

    @property
    def ahead_tokens(self) -> int:
        """The others."""
        return self.unstarted_tokens - self.in_step_tokens

    @property
    def is_next_full(self) -> bool:
        """Has it enough prompts for the next step?"""
        return self.ahead_tokens >= self._enough_tokens

    def pending_ns(self) -> float:
        """What computing the prompts that wait in the worker adds to its steps; 0 before that is known."""
        return self.prompt_ns(self.unstarted_tokens)

    @property
    def is_known(self) -> bool:
        """Enough prompts have been seen to say anything."""
        return self._prefill_steps >= WARM

    def is_overdue(self, now_ns: int) -> bool:
        """Should the running step have ended long ago?"""
        return self._began_ns is not None and now_ns - self._began_ns > self._fit.most_y + OVERDUE_NS

    def step_ns(self) -> float:
        """A step without a prompt."""
        if self._step_ns is None:
            self._step_ns = self._fit.predict(0, self._running)
        return self._step_ns

    def prompt_ns(self, tokens: float) -> float:
        """What a prompt adds to its steps."""
        return self._fit.slope * tokens

    def turn_ns(self, steps: float, tokens: float, now_ns: int) -> float:
        """Time until so many more steps have ended after the running one.

        They compute the prompts that the worker was given, and others of so many tokens.
        """
        return self._left_ns(now_ns) + steps * self.step_ns() + self.prompt_ns(self.ahead_tokens + tokens)

    def steps_until(self, places: float, mean_tokens: float) -> float:
        """Steps after the running one until so many places have been given back; new answers have `mean_tokens`."""
        return self._departures.steps_until(places, self._steps + 1, mean_tokens)

    def prompt_steps(self, tokens: float) -> float:
        """Steps after the running one, given enough prompts each, until so many more tokens are computed."""
        return (self.ahead_tokens + tokens) / self._enough_tokens

    def after_step_ns(self, tokens: int) -> int | None:
        """Time to the first token of a prompt that the worker is given when a step ends: the next one is without it.

        None for one far larger than any that was seen.
        """
        steps = max(1, math.ceil(tokens / self._batch_tokens))
        if tokens > REACH * steps * self._fit.most_x:
            return None
        return int((steps + 1) * self.step_ns() + self.prompt_ns(tokens))

    def _left_ns(self, now_ns: int) -> float:
        """What is left of the running step."""
        if self._began_ns is None:
            return 0.0
        left_ns = self._began_ns + self._fit.predict(self.in_step_tokens, self._running) - now_ns
        return left_ns if left_ns > 0 else 0.0

    def raw_ns(self, tokens: int, now_ns: int) -> int | None:
        """Time to the first token of a prompt that the worker would be given now.

        None before there are samples, and for far more tokens in a step than were ever seen in one.
        """
        ahead = self.ahead_tokens + tokens
        steps = max(1, math.ceil(ahead / self._batch_tokens))
        if not self.is_known or ahead > REACH * steps * self._fit.most_x:
            return None
        beyond_ns = self.prompt_ns(max(0.0, ahead - self._fit.most_x))
        own_ns = (steps - 1) * self.step_ns() + self._fit.predict(ahead, self._running) + beyond_ns
        return max(LEAST_NS, int(self._left_ns(now_ns) + own_ns))

    def corrected_ns(self, raw_ns: int) -> int:
        """The same, corrected by what came of earlier ones."""
        return int(raw_ns * self._ratios.quantile(0.5))

    def learn(self, raw_ns: int, actual_ns: int) -> None:
        """A first token came `actual_ns` after a hand-over for which `raw_ns` was predicted."""
        self._ratios.add(actual_ns / raw_ns)


class QueueForecast:
    """One model's queue: how fast it drains, and how forecasts of its requests came true."""

    def __init__(self) -> None:
        self._interval_ns = FadingMean(INTERVAL_FORGETTING)
        self._placed_ns = 0
        self._has_followers = False
        self._corrections = {False: Correction(), True: Correction()}
        """Of requests that were placed at once, and of those that waited."""
        self._learned_ns = 0
        """When something was last learned of requests that wait."""

    def placed(self, now_ns: int, *, others_wait: bool) -> None:
        """A request left the queue for a worker. The time until the next one counts if others waited meanwhile."""
        if self._has_followers:
            self._interval_ns.add(now_ns - self._placed_ns)
        self._placed_ns, self._has_followers = now_ns, others_wait

    def interval_ns(self) -> float | None:
        """Time from one placement to the next while requests wait; None while it is not known."""
        return self._interval_ns.value if self._interval_ns.samples >= WARM else None

    def correct(self, raw_ns: int, now_ns: int, *, is_queued: bool) -> Forecast:
        """Stretch a sum by what came of earlier ones.

        For those that wait it is forgotten when nothing was learned for long: a wrong correction may have refused all
        who could have disproved it.
        """
        if now_ns - self._learned_ns > STALE_NS:
            self._corrections[True] = Correction()
        return self._corrections[is_queued].apply(max(raw_ns, LEAST_NS), is_queued=is_queued)

    def learn(self, forecast: Forecast, actual_ns: int, now_ns: int) -> None:
        """A first token came `actual_ns` after its request."""
        self._correction(forecast, now_ns).learn(forecast, actual_ns)

    def gave_up(self, forecast: Forecast, waited_ns: int, patience_ns: int, now_ns: int) -> None:
        """No first token will come of it in time, and nobody knows how late it would have come."""
        at_least_ns = max(waited_ns, min(forecast.sure_ns, patience_ns))
        self._correction(forecast, now_ns).learn(forecast, int(LATER * at_least_ns))

    def _correction(self, forecast: Forecast, now_ns: int) -> Correction:
        if forecast.is_queued:
            self._learned_ns = now_ns
        return self._corrections[forecast.is_queued]


class Correction:
    """Of one kind of forecast, by how long earlier ones really took.

    The quantiles of a window say what most requests stayed under, not what most will: traffic changes, and of those
    that were given up nobody knows how late they would have been. So which quantile is told is corrected too, by how
    many really stayed under it (Gibbs and Candes, Adaptive Conformal Inference under Distribution Shift, 2021).
    """

    def __init__(self) -> None:
        self._ratios = RollingRatios()
        self._safe = _Share(SAFE_SHARE)
        self._sure = _Share(SURE_SHARE)
        self._factors = (1.0, 1.0, 1.0)
        """Of what to expect, what is safe and what is sure."""

    def apply(self, raw_ns: int, *, is_queued: bool) -> Forecast:
        expected, safe, sure = self._factors
        return Forecast(raw_ns, int(raw_ns * expected), int(raw_ns * safe), int(raw_ns * max(safe, sure)), is_queued)

    def learn(self, forecast: Forecast, actual_ns: int) -> None:
        self._ratios.add(actual_ns / forecast.raw_ns)
        self._safe.learn(is_under=actual_ns <= forecast.safe_ns)
        self._sure.learn(is_under=actual_ns <= forecast.sure_ns)
        quantile = self._ratios.quantile
        self._factors = quantile(0.5), quantile(self._safe.value), quantile(self._sure.value)


class _Share:
    """The quantile to take so that `target` of all samples stay under it."""

    def __init__(self, target: float) -> None:
        self._target = target
        self.value = target

    def learn(self, *, is_under: bool) -> None:
        value = self.value + SHARE_RATE * (self._target - is_under)
        self.value = min(MOST_SHARE, max(self._target - SHARE_REACH, value))


class RollingRatios:
    """Actual over predicted of the last WINDOW samples; 1 until there are enough."""

    def __init__(self) -> None:
        self._samples: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._sorted: list[float] = []

    def add(self, sample: float) -> None:
        if len(self._samples) == WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._samples[0])]
        self._samples.append(sample)
        bisect.insort(self._sorted, sample)

    def quantile(self, share: float) -> float:
        """The next sample has n + 1 equally likely places: the rank that it stays under in so many of them."""
        count = len(self._sorted)
        if count < WARM:
            return 1.0
        return self._sorted[min(count, math.ceil((count + 1) * share)) - 1]


class FadingMean:
    """A mean in which old samples fade."""

    def __init__(self, forgetting: float) -> None:
        self._forgetting = forgetting
        self._weight = self._total = 0.0
        self.samples = 0

    def add(self, sample: float) -> None:
        self._weight = self._forgetting * self._weight + 1
        self._total = self._forgetting * self._total + sample
        self.samples += 1

    @property
    def value(self) -> float:
        return self._total / self._weight if self._weight else 0.0
