"""How often a worker may be given a new prompt: only while the answers that it is writing keep their pace.

Every step that computes a prompt makes all answers of the worker wait. A step shorter than the target earns the
difference, a longer one pays it, and a prompt is given only while there is credit. So answers get a token per target on
average, whatever the prompts, and prompts beyond that wait in the gateway, where they can be ordered and refused.

An average is little to an answer of a few tokens: one long prompt may take all of its time. Where prompts make way,
those that are not urgent are computed in parts, so that no step takes longer than the target, or than the youngest
answer has saved.
"""

from __future__ import annotations

SHARE = 0.9
"""Of the target: answers differ, and most of them have to meet it."""
SAVED_STEPS = 4
"""Targets that may be saved up. Who saves more lets bursts of prompts through, and a short answer, whose time per token
is that of a few tokens, misses its target: one of n tokens may take SHARE * (1 + SAVED_STEPS / n) of it. Where prompts
are computed whole, at half of the capacity, with prompts and answers of code completion, 12% do with 10, 8% with 6 and
6% with 4; of answers of 32 to 96 tokens by vLLM, at twice the capacity, 2% do with 6 and none with 4. Who saves less
makes prompts wait that would have been in time."""
OWED_STEPS = 10
"""Targets that may be owed."""
LEAST_EARNING = 0.1
"""Of a target, for a step without a prompt: where the engine misses the target by itself, prompts go on, slowly."""


class Pace:
    """One worker's credit, in nanoseconds. Without a target it always allows."""

    def __init__(self, target_ns: int | None = None) -> None:
        self.has_target = target_ns is not None
        """Without one there is nothing to ask."""
        self._target_ns = None if target_ns is None else int(SHARE * target_ns)
        self._most_ns = SAVED_STEPS * (self._target_ns or 0)
        self._least_ns = -OWED_STEPS * (self._target_ns or 0)
        self._credit_ns = self._most_ns
        self._saved_ns = 0
        """By the youngest answer since its first token; below 0 where it is behind."""
        self._has_started = False
        """An answer has, with the end of the running step."""

    def part_ns(self, step_ns: float) -> float:
        """What prompts may add to every step of `step_ns`."""
        target_ns = self._target_ns or 0
        return max(target_ns - step_ns, LEAST_EARNING * target_ns)

    @property
    def slack_ns(self) -> int:
        """What they may add to the next step besides: no answer falls behind by it."""
        return self._saved_ns if self._saved_ns > 0 else 0

    def started(self) -> None:
        """An answer has its first token with the end of the running step."""
        self._has_started = True

    def allows(self, pending_ns: float, joint_ns: float) -> bool:
        """May the worker get a prompt?

        `pending_ns` is what those cost that it has not computed yet; `joint_ns` what the next step would compute with
        this one, 0 where that would be this one alone: however long a prompt is, it may be computed.
        """
        target_ns = self._target_ns
        return target_ns is None or (self._credit_ns >= pending_ns and joint_ns <= target_ns)

    def steps_until(self, cost_ns: float, joint_ns: float, step_ns: float, *, is_in_parts: bool) -> float:
        """Steps of `step_ns` without a prompt until it allows one, after others that cost as much.

        `joint_ns` is the part of the cost that has not been given to the worker yet. Prompts in parts take no more than
        each step leaves, whatever was saved.
        """
        target_ns = self._target_ns
        if target_ns is None:
            return 0.0
        credit_ns = min(0, self._credit_ns) if is_in_parts else self._credit_ns
        return max(0.0, (cost_ns - credit_ns) / self.part_ns(step_ns), joint_ns / target_ns - 1)

    def stepped(self, step_ns: int, *, has_prefill: bool) -> None:
        """A step has ended, and each running answer has its next token."""
        if self._target_ns is None:
            return
        earned_ns = self._target_ns - step_ns
        self._saved_ns += earned_ns
        if self._has_started:
            self._saved_ns, self._has_started = min(0, self._saved_ns), False
        if not has_prefill:
            earned_ns = max(earned_ns, int(LEAST_EARNING * self._target_ns))
        self._credit_ns = max(self._least_ns, min(self._most_ns, self._credit_ns + earned_ns))

    def rest(self) -> None:
        """Nothing runs, so that nobody is behind."""
        self._credit_ns = self._most_ns
        self._saved_ns, self._has_started = 0, False
