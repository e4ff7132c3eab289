"""The coefficients of a step's duration, fitted to measured steps.

Weighted least squares with coefficients of 0 and more. A step weighs 1/duration, as where errors grow with the square
root: then the durations add up to the measured time, which is what latencies are made of. Steps that are far off (a
machine that did something else) count less, by Huber's weights. There are five coefficients, so that trying each subset
of them finds the best fit within the bounds exactly.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import msgspec

from engine.sim.parameters import SimParameters, Work
from engine.step_log import LoggedStep

COEFFICIENTS = ("step_us", "prefill_token_us", "prefill_pair_ns", "decode_us", "kv_token_ns")
_UNITS_NS = (1e3, 1e3, 1.0, 1e3, 1.0)
ROUNDS = 8
HUBER = 1.345
"""Standard deviations from which on a residual counts less: 95% efficient where errors are normal (Huber 1981)."""
SIGMAS_PER_MAD = 1.4826

Vector = tuple[float, ...]


def fit(steps: Sequence[LoggedStep], base: SimParameters) -> SimParameters:
    """`base` with coefficients fitted to the steps; those that the steps say nothing about are 0."""
    rows = [_row(step.work) for step in steps]
    durations = [float(step.duration_ns) for step in steps]
    weights = [1.0 / max(duration, 1.0) for duration in durations]
    solution: Vector = (0.0,) * len(COEFFICIENTS)
    for _ in range(ROUNDS):
        solution = _solve(rows, durations, weights)
        weights = _weights(rows, durations, solution)
    rounded = (round(value / unit, 3) for value, unit in zip(solution, _UNITS_NS, strict=True))
    return msgspec.structs.replace(base, **dict(zip(COEFFICIENTS, rounded, strict=True)))


def step_error(steps: Sequence[LoggedStep], parameters: SimParameters) -> float:
    """Mean absolute error of a step's duration, relative to the measured one."""
    return statistics.fmean(
        abs(parameters.duration_ns(step.work) - step.duration_ns) / max(1, step.duration_ns) for step in steps
    )


def _row(work: Work) -> Vector:
    return (1.0, work.prefill_tokens, work.prefill_pairs, work.decodes, work.kv_tokens)


def _weights(rows: list[Vector], durations: list[float], solution: Vector) -> list[float]:
    predicted = [max(1.0, _dot(row, solution)) for row in rows]
    residuals = [(duration - value) / value**0.5 for duration, value in zip(durations, predicted, strict=True)]
    scale = SIGMAS_PER_MAD * statistics.median(map(abs, residuals)) * HUBER
    return [
        min(1.0, scale / abs(residual) if residual else 1.0) / value
        for residual, value in zip(residuals, predicted, strict=True)
    ]


def _solve(rows: list[Vector], targets: list[float], weights: list[float]) -> Vector:
    """The non-negative solution of the smallest weighted error."""
    size = len(COEFFICIENTS)
    moments = [[0.0] * (size + 1) for _ in range(size)]
    for row, target, weight in zip(rows, targets, weights, strict=True):
        extended = (*row, target)
        for i in range(size):
            if scaled := weight * row[i]:
                line = moments[i]
                for j in range(i, size + 1):
                    line[j] += scaled * extended[j]
    for i, j in itertools.combinations(range(size), 2):
        moments[j][i] = moments[i][j]
    seen = [i for i in range(size) if moments[i][i] > 0]
    subsets = itertools.chain.from_iterable(itertools.combinations(seen, count) for count in range(1, len(seen) + 1))
    solutions = [solution for subset in subsets if (solution := _solve_for(moments, subset)) is not None]
    return min(solutions, key=lambda solution: _error(moments, solution), default=(0.0,) * size)


def _solve_for(moments: list[list[float]], subset: tuple[int, ...]) -> Vector | None:
    """Gauss's elimination over some columns, each scaled to 1; None where one is negative or two say the same."""
    scales = [moments[i][i] ** 0.5 for i in subset]
    lines = [
        [moments[i][j] / a / b for j, b in zip(subset, scales, strict=True)] + [moments[i][-1] / a]
        for i, a in zip(subset, scales, strict=True)
    ]
    for pivot, line in enumerate(lines):
        if line[pivot] < 1e-9:
            return None
        for other in lines:
            if other is not line:
                factor = other[pivot] / line[pivot]
                other[:] = [value - factor * own for value, own in zip(other, line, strict=True)]
    found = [line[-1] / line[pivot] / scales[pivot] for pivot, line in enumerate(lines)]
    if min(found) < 0:
        return None
    solution = [0.0] * len(moments)
    for i, value in zip(subset, found, strict=True):
        solution[i] = value
    return tuple(solution)


def _error(moments: list[list[float]], solution: Vector) -> float:
    """The weighted squared error, less what no solution changes."""
    quadratic = sum(a * _dot(line[:-1], solution) for a, line in zip(solution, moments, strict=True))
    return quadratic - 2 * sum(a * line[-1] for a, line in zip(solution, moments, strict=True))


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
