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
from gateway.handover import Handover
from gateway.lengths import AnswerLength
from gateway.pace import Pace
from gateway.prefills import Prefill, Prefills

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
PART_STEPS = 4
"""Prompts of the second band that make way take so many times what a step takes that computes nothing."""
EARLY_PART_STEPS = 2
"""Those that have not waited long do: who comes meanwhile waits for less, and while nobody waits long there is time for
the steps more that they take."""
LONG_WAIT_NS = 250_000_000
PART_NS = 25_000_000
"""And at least so long: where steps are that short, it is not they who are waited for."""
PARTS_AHEAD = 2
"""A worker gets them while it has less than so many of their steps to compute."""
STEP_TOKENS = 128
"""A step that computes nothing counts as at most so many prompt tokens: where those seem to cost next to nothing, its
rest would count more than all else, and workers could not be compared."""
UNKNOWN_PARTS = 16
"""A part of a full step, before it is known what tokens cost."""
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


class EngineForecast:
    """One worker's time from hand-over to first token, and what is known of its steps.

    The worker reports each step when it ends; the next one begins at once with what it was given by then.
    """

    def __init__(self, batch_tokens: int = 8192, *, makes_way: bool = True, pace: Pace | None = None) -> None:
        """`makes_way` is `ModelInfo.makes_way`: without it all prompts are computed whole."""
        self.pace = pace or Pace()
        self.makes_way = makes_way
        self._batch_tokens = batch_tokens
        self._enough_tokens = float(batch_tokens)
        """Of prompts, for a step."""
        self._part_tokens = self._early_part_tokens = batch_tokens // UNKNOWN_PARTS
        """Of prompts that make way, and of those of them that have not waited long."""
        self._paced_tokens: int | None = None
        """Of prompts, that a step computes without an answer falling behind; None before that is known."""
        self._parts_ahead_tokens = PARTS_AHEAD * self._part_tokens
        self._fit = StepFit()
        self._ratios = RollingRatios()
        self._prefills = Prefills(batch_tokens)
        self._began_ns: int | None = None
        """When the step that runs has begun; None while the worker is idle."""
        self._token_ns = 0.0
        """What a prompt token takes, to compare what is left of steps with prompts."""
        self._prefill_steps = 0
        self.is_known = False
        """Enough prompts have been seen to say anything."""
        self._running = 0
        """Answers that the running step goes on with."""
        self._steps = 0
        """That have ended."""
        self._departures = Departures()
        self._handover = Handover()
        self._running_tokens = -1
        """Of prompts, for which `_running_ns` was asked."""
        self._running_ns = 0.0
        """What the running step takes."""
        self._step_ns: float | None = None
        """A step without a prompt, once somebody has asked since the last one."""

    # -- what happens

    def placed(
        self,
        request: int,
        tokens: int,
        now_ns: int,
        answer: AnswerLength | None = None,
        step_tokens: int = 0,
        priority: int = 0,
    ) -> None:
        """The worker was given a prompt; `step_tokens` and `priority` are those of `Submit`."""
        is_running = self._began_ns is None
        self._prefills.add(request, Prefill(tokens, step_tokens, is_running, now_ns, answer, priority))
        if is_running:
            self._began_ns = now_ns
        elif not step_tokens:
            self._handover.sent(request, now_ns)
        if answer is not None:
            self._expect_end(request, answer, self._steps + (1 if is_running else 2))

    def started(self, request: int) -> None:
        """The prompt's first token has come, in the frame of the step that is now ending."""
        self._handover.started(request, self._steps)
        if self.pace.has_target:
            self.pace.started()
        prefill = self._prefills.start(request)
        if prefill is not None and prefill.answer is not None and prefill.answer.is_exact:
            self._expect_end(request, prefill.answer, self._steps + 1)

    def dropped(self, request: int) -> None:
        """The request has left the worker, before its prompt was computed or after."""
        self._handover.dropped(request)
        self._prefills.forget(request)
        self._departures.leave(request)

    def rest(self) -> None:
        """Nothing of ours is left on the worker, though no step may have told: its last requests were cancelled."""
        self._began_ns = None
        self.pace.rest()

    def stepped(self, now_ns: int, *, is_idle: bool, running: int = 0, step_ns: int = 0) -> None:
        """A step has ended, and the next one goes on with `running` answers.

        `step_ns` is what the worker says that it took: frames that were held up come one right after the other.
        """
        began_ns = self._began_ns
        ran, self._running = self._running, running
        self._steps += 1
        self._handover.stepped(now_ns, self._steps)
        self._step_ns = None
        self._running_tokens = -1
        self._began_ns = None if is_idle and not self._prefills else now_ns
        tokens = self._prefills.step(ran, now_ns if is_idle else now_ns - int(self.handover_ns))
        if is_idle:
            self.pace.rest()
        if began_ns is None:
            return
        duration_ns = step_ns or now_ns - began_ns
        if not is_idle:
            self.pace.stepped(duration_ns, has_prefill=tokens != 0)
        if tokens is not None:
            self._fit.add(tokens, ran, duration_ns)
            self._token_ns = max(self._fit.slope, self._fit.base / STEP_TOKENS)
            self._prefill_steps += tokens > 0
            self.is_known = self._prefill_steps >= WARM
            self._find_most()

    def _find_most(self) -> None:
        """What is enough for a step, by what a token costs."""
        slope = self._fit.slope
        if not (self.is_known and slope):
            return
        base_ns = self._fit.base
        self._enough_tokens = min(self._batch_tokens, max(ENOUGH_NS, ENOUGH_STEPS * base_ns) / slope)
        part = self._part_tokens = self._tokens_in(max(PART_NS, PART_STEPS * base_ns))
        self._early_part_tokens = self._tokens_in(max(PART_NS, EARLY_PART_STEPS * base_ns))
        if self.pace.has_target:
            paced = self._paced_tokens = self._tokens_in(self.pace.part_ns(self.step_ns()))
            part = paced if paced < part else part
        self._parts_ahead_tokens = PARTS_AHEAD * part

    def _tokens_in(self, prompts_ns: float) -> int:
        """That a step computes in the time; at least one, so that it goes on."""
        tokens = int(prompts_ns / self._fit.slope)
        return min(tokens, self._batch_tokens) if tokens > 1 else 1

    def step_tokens(self, priority: int, waited_ns: int = LONG_WAIT_NS, tokens: int = 0) -> int:
        """`Submit.step_tokens` of a prompt that makes way, and the more so the larger its number; 0 for an urgent one.

        They take about `PART_STEPS` or `EARLY_PART_STEPS` times what a step takes that computes nothing, or a part of
        that. Where answers have a pace to keep they take no more than that leaves, and those of number 1 so much.
        """
        if not (priority and self.makes_way):
            return 0
        most = self._batch_tokens
        if self.pace.has_target:
            most = self._within_pace(tokens)
            if priority == 1:
                return most
            priority -= 1
        part = self._early_part_tokens if waited_ns < LONG_WAIT_NS else self._part_tokens
        return min(most, part // priority or 1)

    def _within_pace(self, tokens: int) -> int:
        """Of prompts, that a step computes without an answer falling behind: all of one of `tokens`, where they have
        saved the time and no other prompt is there to use it up."""
        most, is_next = self._paced_tokens, not self._prefills.unstarted_tokens
        if self._began_ns is None:
            return self._batch_tokens
        if most is None:
            return self._batch_tokens if is_next or self.is_known else self._part_tokens
        if tokens <= most or not is_next:
            return most
        left_ns = self.pace.part_ns(self.step_ns()) + self.pace.slack_ns
        return min(tokens, self._batch_tokens) if self.prompt_ns(tokens) <= left_ns else most

    def _expect_end(self, request: int, answer: AnswerLength, first_step: int) -> None:
        if answer.is_exact:
            self._departures.ends_at(request, first_step + int(answer.tokens) - 1, answer.sequences)
        else:
            self._departures.ends_after(request, answer.tokens, answer.sequences)

    # -- what is expected

    @property
    def handover_ns(self) -> float:
        """So long before a step ends a prompt has to be sent to be in the next one."""
        return self._handover.needed_ns

    @property
    def unstarted_tokens(self) -> int:
        """Prompt tokens that it was given and that are not known to be computed."""
        return self._prefills.unstarted_tokens

    def ahead_tokens(self, priority: int) -> int:
        """Prompt tokens that steps after the running one compute before another prompt of that priority."""
        return self._prefills.ahead_tokens if priority else self._prefills.ahead_urgent_tokens

    def delayed(self, priority: int) -> int:
        """Prompts whose first tokens wait for another one of that priority: those of the same step, but for one that
        makes way."""
        return 0 if priority and self.makes_way else self._prefills.joining

    def is_next_full(self, priority: int) -> bool:
        """Has it enough prompts for the next step, or as many as it computes in a few where they make way?"""
        if priority and self.makes_way:
            return self._prefills.ahead_tokens * priority >= self._parts_ahead_tokens
        return self._prefills.ahead_urgent_tokens >= self._enough_tokens

    def _steps_of(self, tokens: int, priority: int, waited_ns: int = LONG_WAIT_NS, own_tokens: int = 0) -> int:
        """That compute so many prompt tokens."""
        most = self._batch_tokens
        if priority and self.makes_way:
            most = self.step_tokens(priority, waited_ns, own_tokens)
        return 1 if tokens <= most else math.ceil(tokens / most)

    def pending_ns(self) -> float:
        """What computing the prompts that wait in the worker adds to its steps; 0 before that is known."""
        return self._fit.slope * self._prefills.unstarted_tokens

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

    def turn_ns(self, steps: float, tokens: float, priority: int, now_ns: int) -> float:
        """Time until so many more steps have ended after the running one.

        They compute the prompts that the worker was given, and others of so many tokens.
        """
        prompts_ns = self._fit.slope * (self.ahead_tokens(priority) + tokens)
        return self._left_ns(now_ns) + steps * self.step_ns() + prompts_ns

    def steps_until(self, places: float, mean_tokens: float) -> float:
        """Steps after the running one until so many places have been given back; new answers have `mean_tokens`."""
        return self._departures.steps_until(places, self._steps + 1, mean_tokens)

    def prompt_steps(self, tokens: float, priority: int) -> float:
        """Steps after the running one, given enough prompts each, until so many more tokens are computed."""
        most = self._enough_tokens
        if priority and self.makes_way:
            most = min(most, self.step_tokens(priority))
        return (self.ahead_tokens(priority) + tokens) / most

    def after_step_ns(self, tokens: int, priority: int) -> int | None:
        """Time to the first token of a prompt that the worker is given when a step ends: the next one is without it.

        None for one far larger than any that was seen.
        """
        steps = self._steps_of(tokens, priority)
        if tokens > REACH * steps * self._fit.most_x:
            return None
        return int((steps + 1) * self.step_ns() + self._fit.slope * tokens)

    def _left_ns(self, now_ns: int) -> float:
        """What is left of the running step."""
        left_ns = self._remaining_ns(now_ns)
        return left_ns if left_ns > 0 else 0.0

    def _remaining_ns(self, now_ns: int) -> float:
        """The same; negative where it should have ended."""
        if self._began_ns is None:
            return 0.0
        tokens = self._prefills.in_step_tokens
        if tokens != self._running_tokens:
            self._running_tokens = tokens
            self._running_ns = self._fit.extrapolate(tokens, self._running)
        return self._began_ns + self._running_ns - now_ns

    def before_tokens(self, priority: int, now_ns: int) -> float:
        """What passes before the step of a new prompt begins, as the prompt tokens that would take as long.

        A step that should have ended is taken to be as far from its end: the later it is, the more likely it hangs.
        """
        ahead = self.ahead_tokens(priority)
        if not self._token_ns:
            return self._prefills.in_step_tokens + ahead
        return self._wait_ns(abs(self._remaining_ns(now_ns)), priority) / self._token_ns + ahead

    def _wait_ns(self, left_ns: float, priority: int) -> float:
        """Time until the step of a new prompt begins, where so much is left of the running one."""
        if self._began_ns is None or left_ns >= self._handover.needed_ns:
            return left_ns
        return left_ns + self._missed_ns(priority)

    def _missed_ns(self, priority: int) -> float:
        """What the next step takes, for a prompt that comes too late for it.

        But for the prompts that it computes before that one anyway.
        """
        prompts_ns = 0.0
        if not (priority or self._prefills.ahead_urgent_tokens):
            prompts_ns = self.prompt_ns(min(self._part_tokens, self._prefills.ahead_tokens))
        return self.step_ns() + prompts_ns

    def raw_ns(self, tokens: int, now_ns: int, priority: int = 0, waited_ns: int = 0) -> int | None:
        """Time to the first token of a prompt that the worker would be given now, after it has waited so long.

        None before there are samples, and for far more tokens in a step than were ever seen in one.
        """
        ahead = self.ahead_tokens(priority) + tokens
        steps = self._steps_of(ahead, priority, waited_ns, tokens)
        if not self.is_known or ahead > REACH * steps * self._fit.most_x:
            return None
        own_ns = self._fit.extrapolate(ahead, self._running)
        if steps > 1:
            own_ns += (steps - 1) * self.step_ns()
        raw_ns = int(self._wait_ns(self._left_ns(now_ns), priority) + own_ns)
        return raw_ns if raw_ns > LEAST_NS else LEAST_NS

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
        """Of what to expect, what is safe and what is sure, which is no less."""

    def apply(self, raw_ns: int, *, is_queued: bool) -> Forecast:
        expected, safe, sure = self._factors
        return Forecast(raw_ns, int(raw_ns * expected), int(raw_ns * safe), int(raw_ns * sure), is_queued)

    def learn(self, forecast: Forecast, actual_ns: int) -> None:
        self._ratios.add(actual_ns / forecast.raw_ns)
        self._safe.learn(is_under=actual_ns <= forecast.safe_ns)
        self._sure.learn(is_under=actual_ns <= forecast.sure_ns)
        quantile = self._ratios.quantile
        safe = quantile(self._safe.value)
        self._factors = quantile(0.5), safe, max(safe, quantile(self._sure.value))


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
