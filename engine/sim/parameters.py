"""What a simulated engine costs and holds."""

from __future__ import annotations

from typing import Annotated

import msgspec

from protos.core.settings import Positive

Cost = Annotated[float, msgspec.Meta(ge=0)]


class Work(msgspec.Struct, frozen=True):
    """What one step computes."""

    prefill_tokens: int
    prefill_pairs: int
    """Pairs of a prompt token and one that it attends to, itself counted half."""
    decodes: int
    """Sequences that get their next token."""
    kv_tokens: int
    """Tokens of context that the decodes read."""


class SimParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Duration of a step and size of the KV cache. The defaults are an engine that takes no time.

    T_step = step_us + prefill_token_us * p + prefill_pair_ns * c + decode_us * d + kv_token_ns * k, with p prompt
    tokens computed in the step, c pairs of such a token and one that it attends to, d sequences decoded, k tokens of
    context that they read.
    """

    step_us: Cost = 0.0
    prefill_token_us: Cost = 0.0
    prefill_pair_ns: Cost = 0.0
    decode_us: Cost = 0.0
    kv_token_ns: Cost = 0.0
    step_ms: Cost | None = None
    """Fixed duration of every step, in place of the formula: for benchmarks that want an exact pace."""
    kv_blocks: Positive = 65_536
    kv_block_tokens: Positive = 16
    mean_output_tokens: Positive = 128
    """Mean number of tokens until end-of-sequence, where the request does not ignore it."""

    def duration_ns(self, work: Work) -> int:
        if self.step_ms is not None:
            return int(self.step_ms * 1e6)
        return int(
            1e3 * (self.step_us + self.prefill_token_us * work.prefill_tokens + self.decode_us * work.decodes)
            + self.prefill_pair_ns * work.prefill_pairs
            + self.kv_token_ns * work.kv_tokens
        )
