"""Workloads made from a rate, an arrival process and length quantiles. The same seed gives the same workload."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import msgspec

from protos.core.errors import ConfigError
from replay.presets import preset
from replay.workload import SyntheticBody, Workload, WorkloadFacts, WorkloadRequest

MAX_REQUESTS = 2_000_000


class SynthSettings(msgspec.Struct, frozen=True, kw_only=True):
    rate: float
    """Mean requests per second."""
    duration_s: float
    arrivals: str = "poisson"
    """poisson, constant, gamma:CV or weibull:CV, where CV is the coefficient of variation of the gaps."""
    preset: str = "azure-2023-conv"
    seed: int = 1
    max_prompt_tokens: int | None = None
    """Longer prompts are cut to it."""
    max_output_tokens: int | None = None


def synthesize(settings: SynthSettings) -> Workload:
    """Raises ConfigError for settings that make no workload."""
    if not (settings.rate > 0 and settings.duration_s > 0 and math.isfinite(settings.rate * settings.duration_s)):
        raise ConfigError("--rate and --duration must be positive numbers")
    if settings.rate * settings.duration_s > MAX_REQUESTS:
        raise ConfigError(f"--rate times --duration must be at most {MAX_REQUESTS:,} requests")
    lengths = preset(settings.preset)
    randomness = random.Random(settings.seed)
    draw_gap_s = gap_source(settings.arrivals, settings.rate, randomness)
    requests = []
    for index, at_s in enumerate(_arrivals(draw_gap_s, settings.duration_s)):
        prompt_tokens = _draw_length(lengths.prompt_tokens, randomness, settings.max_prompt_tokens)
        output_tokens = _draw_length(lengths.output_tokens, randomness, settings.max_output_tokens)
        name = f"s{settings.seed}-{index}"
        body = SyntheticBody(prompt_tokens, (name,), prompt_tokens)
        requests.append(WorkloadRequest(at_ns=round(at_s * 1e9), session=name, body=body, output_tokens=output_tokens))
    facts = WorkloadFacts(
        kind="synth",
        source=f"{settings.preset}: {lengths.source}, {lengths.license}, {lengths.attribution}",
        settings=msgspec.to_builtins(settings),
    )
    return Workload(facts, requests)


def gap_source(arrivals: str, rate: float, randomness: random.Random) -> Callable[[], float]:
    """A function that draws gaps between arrivals in seconds, with mean 1 / rate."""
    mean_s = 1 / rate
    name, _, parameter = arrivals.partition(":")
    match name:
        case "constant" if not parameter:
            return lambda: mean_s
        case "poisson" if not parameter:
            return lambda: randomness.expovariate(rate)
        case "gamma":
            shape = _variation(arrivals, parameter) ** -2
            return lambda: randomness.gammavariate(shape, mean_s / shape)
        case "weibull":
            shape = weibull_shape(_variation(arrivals, parameter))
            scale = mean_s / math.gamma(1 + 1 / shape)
            return lambda: randomness.weibullvariate(scale, shape)
        case _:
            raise ConfigError(f"--arrivals {arrivals!r}: expected poisson, constant, gamma:CV or weibull:CV")


def _variation(arrivals: str, parameter: str) -> float:
    try:
        variation = float(parameter)
    except ValueError:
        variation = math.nan
    if not 0.1 <= variation <= 10:
        raise ConfigError(f"--arrivals {arrivals!r}: CV must be a number from 0.1 to 10, as in gamma:2")
    return variation


def weibull_shape(variation: float) -> float:
    """The shape k for which a Weibull distribution has this coefficient of variation, by bisection."""
    low, high = 0.1, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        if _weibull_variation(middle) > variation:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _weibull_variation(shape: float) -> float:
    ratio = math.exp(math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape))
    return math.sqrt(max(0.0, ratio - 1))


def _arrivals(draw_gap_s: Callable[[], float], duration_s: float) -> Iterator[float]:
    at_s = draw_gap_s()
    while at_s < duration_s:
        yield at_s
        at_s += draw_gap_s()


def _draw_length(quantiles: tuple[float, ...], randomness: random.Random, limit: int | None) -> int:
    """Between two quantiles by linear interpolation."""
    position = randomness.random() * (len(quantiles) - 1)
    index = int(position)
    low, high = quantiles[index], quantiles[index + 1]
    length = max(1, round(low + (high - low) * (position - index)))
    return length if limit is None else min(length, limit)
