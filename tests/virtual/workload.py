"""Workloads and objectives of the virtual benchmarks: what arrives, and what counts as served in time."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Iterator

import msgspec

from engine import profile
from engine.settings import EngineSettings
from engine.sim.parameters import SimParameters
from replay.synth import SynthSettings, synthesize
from replay.workload import SyntheticBody
from tests.virtual.harness import SECOND_NS, Arrival, Gateway, Result

NEVER_NS = 10**15
PROMPT_TOKENS = 3_000
"""Longest prompt: half a second of prefill on the simulated A100, so that each could meet a TTFT of a second."""
OUTPUT_TOKENS = 1_000


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


def gateway(model: Engine, slo: Slo, *, workers: int = 1, jitter: Callable[[], float] = lambda: 1.0) -> Gateway:
    """In front of such engines; answers keep the pace of `slo`."""
    return Gateway(
        model.parameters,
        workers=workers,
        max_sequences=model.max_sequences,
        max_batch_tokens=model.max_batch_tokens,
        token_target_ns=slo.tpot_ns,
        jitter=jitter,
    )


def poisson(
    rate: float, seconds: float, *, seed: int = 1, slo: Slo | None = None, preset: str | None = None
) -> list[Arrival]:
    """Poisson arrivals: log-normal lengths (median prompt 735, answer 148 tokens), or those of a published trace.

    With `slo` they may be refused, and wait no longer than it for their first token.
    """
    draw = random.Random(seed)
    requests = _log_normal(draw, rate, seconds) if preset is None else _of_trace(preset, rate, seconds, seed)
    return [
        Arrival(
            at_ns=at_ns,
            prompt_tokens=min(PROMPT_TOKENS, prompt_tokens),
            output_tokens=min(OUTPUT_TOKENS, output_tokens),
            is_sheddable=slo is not None,
            is_hurried=slo is not None,
            patience_ns=NEVER_NS if slo is None else slo.ttft_ns,
        )
        for at_ns, prompt_tokens, output_tokens in requests
    ]


def _log_normal(draw: random.Random, rate: float, seconds: float) -> Iterator[tuple[int, int, int]]:
    at_s = 0.0
    while (at_s := at_s + draw.expovariate(rate)) < seconds:
        yield int(at_s * SECOND_NS), int(draw.lognormvariate(6.6, 0.9)) + 2, int(draw.lognormvariate(5.0, 0.8)) + 2


def _of_trace(preset: str, rate: float, seconds: float, seed: int) -> Iterator[tuple[int, int, int]]:
    for request in synthesize(SynthSettings(rate=rate, duration_s=seconds, seed=seed, preset=preset)).requests:
        assert isinstance(request.body, SyntheticBody)
        assert request.output_tokens is not None
        yield request.at_ns, request.body.prompt_tokens, request.output_tokens
