"""Workloads and objectives of the virtual benchmarks: what arrives, and what counts as served in time."""

from __future__ import annotations

import random
import tomllib

import msgspec

from engine import profile
from engine.settings import EngineSettings
from engine.sim.parameters import SimParameters
from tests.virtual.harness import SECOND_NS, Arrival, Result

NEVER_NS = 10**15


class Engine(msgspec.Struct, frozen=True):
    """A simulated engine as a profile describes it."""

    parameters: SimParameters
    max_sequences: int
    max_batch_tokens: int


class Slo(msgspec.Struct, frozen=True):
    ttft_ns: int = SECOND_NS
    tpot_ns: int = SECOND_NS // 10

    def is_met(self, result: Result) -> bool:
        return bool(result.finished_ns) and result.ttft_ns <= self.ttft_ns and result.tpot_ns <= self.tpot_ns


def engine(name: str = "qwen3-14b-a100") -> Engine:
    """Of a profile in engine/profiles."""
    table = tomllib.loads(profile.find(name).read_text())["engine"]
    settings = msgspec.convert(table, EngineSettings)
    assert settings.max_num_seqs is not None
    assert settings.max_num_batched_tokens is not None
    return Engine(settings.sim, settings.max_num_seqs, settings.max_num_batched_tokens)


def poisson(rate: float, seconds: float, *, seed: int = 1, slo: Slo | None = None) -> list[Arrival]:
    """Poisson arrivals with log-normal lengths: median prompt 735 tokens, at most 3,000, so that each could be computed
    within the SLO by itself; median answer 148, at most 1,000. With `slo` they are sheddable and wait no longer."""
    draw = random.Random(seed)
    at_s, arrivals = 0.0, []
    while (at_s := at_s + draw.expovariate(rate)) < seconds:
        arrivals.append(
            Arrival(
                at_ns=int(at_s * SECOND_NS),
                prompt_tokens=min(3_000, int(draw.lognormvariate(6.6, 0.9)) + 2),
                output_tokens=min(1_000, int(draw.lognormvariate(5.0, 0.8)) + 2),
                is_sheddable=slo is not None,
                patience_ns=NEVER_NS if slo is None else slo.ttft_ns,
            )
        )
    return arrivals
