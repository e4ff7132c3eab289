"""The workload that `tidegate engine calibrate --run` drives an engine with: one to fit to, and one to check with.

To fit: closed loops of 1, 2, 4, ... users up to what the engine runs at once, with prompts and answers of very
different lengths, so that each coefficient has steps that depend on it. To check: requests that arrive on their own
(Poisson) at a part of the rate that the engine showed, of another distribution of lengths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import msgspec

SHORTEST_PROMPT = 8
LONGEST_PROMPT = 1024
SHORTEST_ANSWER = 4
LONGEST_ANSWER = 128
TYPICAL_PROMPT = 120
TYPICAL_ANSWER = 40
HELD_OUT_LOAD = 0.6
"""Rate of the held-out arrivals over the highest that the engine served."""


class Lengths(msgspec.Struct, frozen=True):
    prompt_tokens: int
    output_tokens: int


class Arrival(msgspec.Struct, frozen=True):
    at_s: float
    lengths: Lengths


def levels(max_sequences: int) -> list[int]:
    """Numbers of users, one after another."""
    powers = [1 << power for power in range(max_sequences.bit_length())]
    return powers if powers[-1] == max_sequences else [*powers, max_sequences]


def wide_lengths(draw: random.Random, context_tokens: int) -> Lengths:
    """Each order of magnitude alike."""
    return Lengths(
        round(_log_uniform(draw, SHORTEST_PROMPT, min(LONGEST_PROMPT, context_tokens // 2))),
        round(_log_uniform(draw, SHORTEST_ANSWER, min(LONGEST_ANSWER, context_tokens // 4))),
    )


def arrivals(draw: random.Random, context_tokens: int, tokens_per_s: float, seconds: float) -> Iterator[Arrival]:
    """Poisson arrivals with log-normal lengths that ask for a part of `tokens_per_s`, prompts and answers together."""
    rate = HELD_OUT_LOAD * tokens_per_s / (TYPICAL_PROMPT + TYPICAL_ANSWER)
    at_s = draw.expovariate(rate)
    while at_s < seconds:
        prompt = min(context_tokens // 2, round(draw.lognormvariate(math.log(TYPICAL_PROMPT) - 0.32, 0.8)) + 1)
        answer = min(context_tokens // 4, round(draw.lognormvariate(math.log(TYPICAL_ANSWER) - 0.245, 0.7)) + 1)
        yield Arrival(at_s, Lengths(prompt, answer))
        at_s += draw.expovariate(rate)


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(high)))
