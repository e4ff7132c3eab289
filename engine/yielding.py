"""How urgent prompts get past long ones: what a step may compute, and who sits it out.

A step takes as long as the prompts in it, and whoever arrives meanwhile waits for its end. So the prompts of requests
that make way are computed a few tokens in a step, beside the answers that are being written, and they sit out the steps
in which another prompt is computed, which is computed whole. (vLLM's `long_prefill_token_threshold` would cut that one
too, so that a long one is in more steps than it waits for without.) How many tokens those are is the gateway's to say
(`Submit.step_tokens`): it knows what they cost.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import msgspec

from protos.core.contract import SIT_OUT_STEPS

STEP_TOKENS = "tidegate_step_tokens"
"""Under which the `extra_args` of vLLM's sampling parameters hold `Submit.step_tokens`."""


class Plan(msgspec.Struct, frozen=True):
    budget_tokens: int
    is_urgent: bool = False
    """Unfinished prompts that make way sit this step out."""


class Prompt(NamedTuple):
    """One that is not computed to its end."""

    key: Hashable
    """Of its request."""
    tokens: int
    """That are left to compute."""
    step_tokens: int
    """`Submit.step_tokens`."""


class Yielding:
    """One engine's; asked before each step."""

    def __init__(self, batch_tokens: int) -> None:
        """`batch_tokens` is the most of any step."""
        self._batch_tokens = batch_tokens
        self._urgent: dict[Hashable, int] = {}
        """The tokens that urgent prompts had left before the last step, where it was theirs."""
        self._sat_out = 0
        """Steps in a row."""

    def plan(self, decode_tokens: int, prompts: Iterable[Prompt]) -> Plan:
        """For a step before which so many tokens of answers and these prompts are there to be computed.

        Where none of the urgent ones got further in the step before, the others may hold the KV blocks that one of
        them needs: they go on, so that they come to their end. So they do after `SIT_OUT_STEPS`, or they would starve.
        """
        urgent, most = {}, 0
        for key, tokens, step_tokens in prompts:
            if step_tokens:
                most = max(most, step_tokens)
            elif tokens:
                urgent[key] = tokens
        is_held_up = bool(self._urgent) and self._urgent.items() <= urgent.items()
        may_sit_out = not most or self._sat_out < SIT_OUT_STEPS
        is_urgent = bool(urgent) and not is_held_up and may_sit_out
        self._urgent = urgent if is_urgent else {}
        if most:
            self._sat_out = self._sat_out + 1 if is_urgent else 0
        budget = decode_tokens + (sum(urgent.values()) if is_urgent else most)
        return Plan(min(self._batch_tokens, budget), is_urgent)
