"""How urgent prompts get past long ones: what a step may compute, and who sits it out.

A step takes as long as the prompts in it, and whoever arrives meanwhile waits for its end. So the prompts of requests
that yield are computed a few tokens in a step, beside the answers that are being written, and they sit out the steps in
which an urgent prompt is computed, which is computed whole. (vLLM's `long_prefill_token_threshold` would cut urgent
prompts too, so that a long one is in more steps than it waits for without.)
"""

from __future__ import annotations

import msgspec

YIELDING_TOKENS = "TIDEGATE_YIELDING_TOKENS"
"""The setting, for vLLM's engine process; set by the worker for its children."""
URGENT_PRIORITY = 0
"""Requests with a larger number yield."""
DEFAULT_SHARE = 32
"""Of the tokens of a step: in the profiles, it is then about twice as long as one of a full batch alone.

Critical requests beside a saturating batch, in four draws of tests.bench.fairness: with 384 of 8192 tokens their p95
TTFT is 1.09 of what it is alone (up to 1.13), with 256 1.07 (up to 1.09), which costs the batch 8% of its throughput.
"""


class Plan(msgspec.Struct, frozen=True):
    budget_tokens: int
    is_urgent: bool = False
    """Unfinished prompts of requests that yield sit this step out."""


class Yielding:
    """One engine's; asked before each step."""

    def __init__(self, batch_tokens: int, yielding_tokens: int) -> None:
        """`batch_tokens` is the most of any step, `yielding_tokens` of the prompts that yield in one; 0 is no limit."""
        self._batch_tokens = batch_tokens
        self._yielding_tokens = yielding_tokens
        self._urgent_before = 0

    @property
    def is_on(self) -> bool:
        return self._yielding_tokens > 0

    def plan(self, decode_tokens: int, urgent_tokens: int) -> Plan:
        """For a step before which so many tokens of urgent prompts are left to compute.

        Where none were computed in the step before, the others may hold the KV blocks that an urgent one needs: they
        go on, so that they come to their end.
        """
        is_urgent = urgent_tokens > 0 and urgent_tokens != self._urgent_before
        self._urgent_before = urgent_tokens if is_urgent else 0
        tokens = urgent_tokens if is_urgent else self._yielding_tokens
        return Plan(min(self._batch_tokens, decode_tokens + tokens), is_urgent)


def limit_of(setting: int | None, batch_tokens: int) -> int:
    """Tokens of a step for prompts that yield: what was set, or a share of the step."""
    return batch_tokens // DEFAULT_SHARE if setting is None else setting
