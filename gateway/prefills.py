"""The prompts that a worker was given and has not computed: which of them a step computes, and how far it gets.

A step computes urgent prompts whole, as far as its tokens go. Where there are none it computes a few tokens of those
that make way, in order; `engine.yielding` says how.
"""

from __future__ import annotations

import msgspec

from gateway.lengths import AnswerLength
from protos.core.contract import SIT_OUT_STEPS


class Prefill(msgspec.Struct, gc=False):
    tokens: int
    """That are left to compute."""
    step_tokens: int
    """`Submit.step_tokens`: above 0 it makes way."""
    is_running: bool
    """It was there when the running step began."""
    sent_ns: int
    answer: AnswerLength | None = None
    priority: int = 0
    """`Submit.priority`."""
    is_begun: bool = False
    """A part of it is computed."""
    is_unknown: bool = False
    """Steps have computed a part of it, and nobody knows how much."""


class Prefills:
    """One worker's. Owned by its forecast."""

    def __init__(self, batch_tokens: int) -> None:
        """`batch_tokens` is the most of a step."""
        self._batch_tokens = batch_tokens
        self._prefills: dict[int, Prefill] = {}
        self._started: list[Prefill] = []
        """Their first tokens came with the end of the running step."""
        self._sat_out = 0
        """Steps in a row, by those that make way."""
        self._part_tokens = 0
        """What a step computes of those that make way."""
        self.unstarted_tokens = 0
        """That are not known to be computed."""
        self._urgent_tokens = 0
        """Of those, the ones of prompts that are computed whole."""
        self._joined_tokens = self._joined_urgent = 0
        """Of both, those that were there when the running step began."""
        self.in_step_tokens = 0
        """What the running step computes."""
        self.ahead_tokens = 0
        """What steps after the running one compute before another prompt that makes way."""
        self.ahead_urgent_tokens = 0
        """And before one that is computed whole."""
        self.joining = 0
        """Prompts that are computed whole and that wait for the step after the running one."""

    def __bool__(self) -> bool:
        return bool(self._prefills)

    # -- what happens

    def add(self, request: int, prefill: Prefill) -> None:
        self._prefills[request] = prefill
        self.joining += not (prefill.is_running or prefill.step_tokens)
        self._part_tokens = max(self._part_tokens, prefill.step_tokens)
        self._count(prefill, prefill.tokens)

    def start(self, request: int) -> Prefill | None:
        """Its first token has come, in the frame of the step that is now ending."""
        prefill = self.forget(request)
        if prefill is not None:
            self._started.append(prefill)
        return prefill

    def forget(self, request: int) -> Prefill | None:
        """It is no prompt that waits here any more; None where it was none."""
        prefill = self._prefills.pop(request, None)
        if prefill is not None:
            self.joining -= not (prefill.is_running or prefill.step_tokens)
            self._count(prefill, -prefill.tokens)
        return prefill

    def step(self, decodes: int, in_time_ns: int) -> int | None:
        """A step of so many answers has ended: the tokens that it computed of prompts; None where nobody knows.

        Prompts that were sent after `in_time_ns` came too late for the one that now begins.
        """
        if not (self._started or self._prefills):
            return 0
        started, self._started = self._started, []
        unfinished, late, most = [], [], 0
        for prefill in self._prefills.values():
            if prefill.is_running:
                unfinished.append(prefill)
            elif prefill.sent_ns > in_time_ns:
                late.append(prefill)
            else:
                prefill.is_running = True
            if prefill.step_tokens > most:
                most = prefill.step_tokens
        tokens, is_known, went_on = 0, True, False
        for prefill in started:
            tokens += prefill.tokens
            is_known = is_known and not prefill.is_unknown
            went_on = went_on or prefill.step_tokens > 0
        part = self._compute_part(started, unfinished, decodes, tokens) if unfinished else 0
        if went_on:
            self._sat_out = 0
        self._part_tokens = most
        self._joined_tokens, self._joined_urgent, self.joining = self.unstarted_tokens, self._urgent_tokens, 0
        for prefill in late:
            self._leave_out(prefill)
        self._note_step()
        return tokens + part if part is not None and is_known else None

    def _leave_out(self, prefill: Prefill) -> None:
        """It waits for the step after the running one."""
        self._joined_tokens -= prefill.tokens
        if not prefill.step_tokens:
            self._joined_urgent -= prefill.tokens
            self.joining += 1

    def _count(self, prefill: Prefill, tokens: int) -> None:
        is_urgent = not prefill.step_tokens
        self.unstarted_tokens += tokens
        self.ahead_tokens += tokens
        if is_urgent:
            self._urgent_tokens += tokens
            self.ahead_urgent_tokens += tokens
        if prefill.is_running:
            self._joined_tokens += tokens
            if is_urgent:
                self._joined_urgent += tokens
            self._note_step()

    def _compute_part(
        self, started: list[Prefill], unfinished: list[Prefill], decodes: int, started_tokens: int
    ) -> int | None:
        """What the step computed of the prompts that it left unfinished, in order; None where nobody knows.

        It had no tokens left where the first is more than it could compute. Else something held that up, or less of it
        had been computed than the books say: they leave it as it is then, so that they do not get ever further ahead.
        """
        computed = [prefill for prefill in unfinished if not prefill.step_tokens]
        is_urgent = bool(computed) or any(not prefill.step_tokens for prefill in started)
        if is_urgent and self._sat_out < SIT_OUT_STEPS:
            self._sat_out += len(computed) < len(unfinished)
            part = self._batch_tokens - decodes - started_tokens
        else:
            self._sat_out = 0
            computed = sorted(unfinished, key=_turn)
            most = max([prefill.step_tokens for prefill in started + unfinished])
            part = min(most, self._batch_tokens - decodes) - started_tokens
        if not computed:
            return 0  # all of them made way
        if not 0 <= part < computed[0].tokens:
            for prefill in computed:
                prefill.is_unknown = True
            return None
        left = part
        for prefill in computed:
            if not left:
                break
            taken = min(left, prefill.tokens)
            self._count(prefill, -taken)
            prefill.tokens -= taken
            prefill.is_begun = True
            left -= taken
        return part

    def _note_step(self) -> None:
        """What the running step computes, and what is left then, from what there is."""
        urgent, is_theirs = self._joined_urgent, self._part_tokens and self._sat_out >= SIT_OUT_STEPS
        if urgent and not is_theirs:
            in_step = urgent if urgent < self._batch_tokens else self._batch_tokens
            self.ahead_urgent_tokens = self._urgent_tokens - in_step
        else:
            in_step = self._joined_tokens if self._joined_tokens < self._part_tokens else self._part_tokens
            self.ahead_urgent_tokens = self._urgent_tokens
        self.in_step_tokens = in_step
        self.ahead_tokens = self.unstarted_tokens - in_step


def _turn(prefill: Prefill) -> tuple[bool, int]:
    """The engine goes on with what it has begun, then with those of the upper bands."""
    return not prefill.is_begun, prefill.priority
