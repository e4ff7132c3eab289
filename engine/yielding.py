"""How urgent prompts get past long ones: what a step may compute, and who sits it out.

A step takes as long as the prompts in it, and whoever arrives meanwhile waits for its end. So the prompts of requests
that make way are computed a few tokens in a step, beside the answers that are being written, and they sit out the steps
in which another prompt is computed, which is computed whole. (vLLM's `long_prefill_token_threshold` would cut that one
too, so that a long one is in more steps than it waits for without.) How many tokens those are is the gateway's to say
(`Submit.step_tokens`): it knows what they cost.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from protos.core.contract import SIT_OUT_STEPS

STEP_TOKENS = "tidegate_step_tokens"
"""Under which the `extra_args` of vLLM's sampling parameters hold `Submit.step_tokens`."""


class Plan(msgspec.Struct, frozen=True):
    budget_tokens: int
    is_urgent: bool = False
    """Unfinished prompts that make way sit this step out."""


class Yielding:
    """One engine's; asked before each step."""

    def __init__(self, batch_tokens: int) -> None:
        """`batch_tokens` is the most of any step."""
        self._batch_tokens = batch_tokens
        self._urgent_before = 0
        self._sat_out = 0
        """Steps in a row."""

    def plan(self, decode_tokens: int, prompts: Iterable[tuple[int, int]]) -> Plan:
        """For a step before which prompts have so many tokens left to compute, and `Submit.step_tokens`.

        Where none of the urgent ones were computed in the step before, the others may hold the KV blocks that one of
        them needs: they go on, so that they come to their end. So they do after `SIT_OUT_STEPS`, or they would starve.
        """
        urgent_tokens = most = 0
        for tokens, step_tokens in prompts:
            most = max(most, step_tokens)
            urgent_tokens += tokens if not step_tokens else 0
        may_sit_out = not most or self._sat_out < SIT_OUT_STEPS
        is_urgent = 0 < urgent_tokens != self._urgent_before and may_sit_out
        self._urgent_before = urgent_tokens if is_urgent else 0
        if most:
            self._sat_out = self._sat_out + 1 if is_urgent else 0
        return Plan(min(self._batch_tokens, decode_tokens + (urgent_tokens if is_urgent else most)), is_urgent)
