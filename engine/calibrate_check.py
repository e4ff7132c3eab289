"""How far a simulated engine is from the real one: the same requests, at the same times, in virtual time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec

from engine.sim import simulator
from engine.sim.parameters import SimParameters
from engine.sim.simulator import Limits, Simulator
from engine.step_log import LoggedRequest


class Comparison(msgspec.Struct, frozen=True):
    """One latency of the measured requests and of the simulated ones."""

    measured_ms: list[float]
    simulated_ms: list[float]

    @property
    def mape(self) -> float:
        """Mean absolute error per request, relative to the measured value."""
        pairs = zip(self.measured_ms, self.simulated_ms, strict=True)
        return statistics.fmean(abs(simulated - measured) / measured for measured, simulated in pairs)

    def mean_error(self) -> float:
        return statistics.fmean(self.simulated_ms) / statistics.fmean(self.measured_ms) - 1

    def p95_error(self) -> float:
        return percentile(self.simulated_ms, 0.95) / percentile(self.measured_ms, 0.95) - 1


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def compare(
    requests: Sequence[LoggedRequest], parameters: SimParameters, limits: Limits, since_ns: int
) -> tuple[Comparison, Comparison]:
    """Time to first token and to the last one, of the requests that arrived at `since_ns` or later.

    Earlier ones are simulated too: they are what the engine is busy with.
    """
    simulated = [sequence for sequence in simulate(requests, parameters, limits) if _counts(sequence.owner, since_ns)]
    return (
        _comparison(simulated, lambda request: request.first_token_ns, lambda sequence: sequence.first_token_ns),
        _comparison(simulated, lambda request: request.ended_ns, lambda sequence: sequence.last_token_ns),
    )


def simulate(
    requests: Iterable[LoggedRequest], parameters: SimParameters, limits: Limits
) -> list[simulator.Sequence[LoggedRequest]]:
    """All requests that got a token, as the simulated engine served them; cancelled ones end after the same tokens."""
    engine: Simulator[LoggedRequest] = Simulator(parameters, limits)
    waiting = sorted((request for request in requests if request.output_tokens), key=lambda r: -r.arrived_ns)
    sequences = []
    now_ns = 0
    while True:
        while waiting and waiting[-1].arrived_ns <= now_ns:
            sequences.append(_submit(engine, waiting.pop()))
        step = engine.step(now_ns)
        if step is not None:
            now_ns = step.ended_ns
        elif waiting:
            now_ns = waiting[-1].arrived_ns
        else:
            return sequences


def _counts(request: LoggedRequest, since_ns: int) -> bool:
    is_timed = request.arrived_ns < request.first_token_ns <= request.ended_ns
    return is_timed and request.arrived_ns >= since_ns and not request.is_cancelled


def _submit(engine: Simulator[LoggedRequest], request: LoggedRequest) -> simulator.Sequence[LoggedRequest]:
    return engine.submit(
        request,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        priority=request.priority,
        step_tokens=request.step_tokens,
        block_hashes=request.blocks,
        now_ns=request.arrived_ns,
    )


def _comparison(
    sequences: Sequence[simulator.Sequence[LoggedRequest]],
    measured: Callable[[LoggedRequest], int],
    simulated: Callable[[simulator.Sequence[LoggedRequest]], int],
) -> Comparison:
    return Comparison(
        [(measured(sequence.owner) - sequence.owner.arrived_ns) / 1e6 for sequence in sequences],
        [(simulated(sequence) - sequence.owner.arrived_ns) / 1e6 for sequence in sequences],
    )
