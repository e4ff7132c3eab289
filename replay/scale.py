"""A workload at another scale, and the shape by which a source and its scaled copy are compared.

`compress` divides the time at which each chain starts by the speed. Think time is people's, so it stays.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from protos.core.errors import ConfigError
from replay.workload import SyntheticBody, Workload, WorkloadRequest

DISPERSION_WINDOWS_S = (0.1, 1.0, 10.0, 60.0)
LENGTH_QUANTILES = (0.0, 0.5, 0.95, 1.0)
SPEED_LIMIT = 1e9


def compress(workload: Workload, speed: float) -> Workload:
    """Chains start `speed` times as fast; within a chain requests keep their recorded distance."""
    if not 1 / SPEED_LIMIT <= speed <= SPEED_LIMIT:
        raise ConfigError(f"--speed must be from {1 / SPEED_LIMIT:g} to {SPEED_LIMIT:g}")
    scaled: list[WorkloadRequest] = []
    moved_ns: list[int] = []
    for request in workload.requests:
        shift = round(request.at_ns / speed) - request.at_ns if request.after is None else moved_ns[request.after]
        moved_ns.append(shift)
        scaled.append(msgspec.structs.replace(request, at_ns=request.at_ns + shift))
    return Workload(workload.facts, scaled)


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a workload looks like. Times are those of the source for turns whose real time the server decides."""

    requests: int
    chains: int
    duration_s: float
    rate: float
    """Requests per second."""
    peak_rate: float
    """Requests in the busiest second."""
    gap_cv: float | None
    """Coefficient of variation of the gaps between sends; 1 for Poisson arrivals."""
    dispersion: dict[str, float]
    """Variance over mean of the number of sends per window, by window; 1 for Poisson arrivals."""
    prompt_tokens: tuple[int, ...]
    """At the quantiles 0, 0.5, 0.95 and 1; of made-up prompts only."""
    output_tokens: tuple[int, ...]
    prefix_share: float | None
    """Share of the prompt tokens whose block came before: the most that a prefix cache could save."""


def measure(requests: Sequence[WorkloadRequest]) -> Shape:
    at_s = sorted(request.at_ns / 1e9 for request in requests)
    duration_s = at_s[-1] - at_s[0] if at_s else 0.0
    synthetic = [body for request in requests if isinstance(body := request.body, SyntheticBody)]
    return Shape(
        requests=len(requests),
        chains=sum(request.after is None for request in requests),
        duration_s=duration_s,
        rate=(len(at_s) - 1) / duration_s if duration_s else 0.0,
        peak_rate=float(max(_counts(at_s, 1.0).values(), default=0)),
        gap_cv=_gap_cv(at_s),
        dispersion={
            f"{window_s:g} s": round(_dispersion(at_s, window_s), 3)
            for window_s in DISPERSION_WINDOWS_S
            if duration_s >= 2 * window_s
        },
        prompt_tokens=_quantiles([body.prompt_tokens for body in synthetic]),
        output_tokens=_quantiles([request.output_tokens for request in requests if request.output_tokens]),
        prefix_share=_prefix_share(synthetic),
    )


def _gap_cv(at_s: Sequence[float]) -> float | None:
    gaps = [later - earlier for earlier, later in itertools.pairwise(at_s)]
    mean = sum(gaps) / len(gaps) if gaps else 0.0
    return math.sqrt(_variance(gaps, mean)) / mean if mean else None


def _counts(at_s: Sequence[float], window_s: float) -> Counter[int]:
    """Sends per window. Windows without any are not in it: a day has 864,000 of 0.1 s."""
    return Counter(int((moment - at_s[0]) / window_s) for moment in at_s)


def _dispersion(at_s: Sequence[float], window_s: float) -> float:
    """Of the whole windows; the last one is cut short. `at_s` spans at least two."""
    counts = _counts(at_s, window_s)
    windows = int((at_s[-1] - at_s[0]) / window_s)
    del counts[windows]
    mean = counts.total() / windows
    if not mean:
        return 0.0
    empty = windows - len(counts)
    return (sum((count - mean) ** 2 for count in counts.values()) + empty * mean**2) / windows / mean


def _variance(values: Sequence[float], mean: float) -> float:
    return sum((value - mean) ** 2 for value in values) / len(values)


def _quantiles(values: list[int]) -> tuple[int, ...]:
    values.sort()
    return tuple(values[round(q * (len(values) - 1))] for q in LENGTH_QUANTILES) if values else ()


def _prefix_share(bodies: Sequence[SyntheticBody]) -> float | None:
    tokens = sum(body.prompt_tokens for body in bodies)
    seen: set[str] = set()
    shared = 0
    for body in bodies:
        for index, block in enumerate(body.blocks):
            if block in seen:
                shared += max(0, min(body.block_tokens, body.prompt_tokens - index * body.block_tokens))
            seen.add(block)
    return shared / tokens if tokens else None
