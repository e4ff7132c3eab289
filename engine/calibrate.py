"""`tidegate engine calibrate`: a simulated engine that takes as long as a real one."""

from __future__ import annotations

import statistics

import msgspec

from engine.calibrate_check import Comparison, compare, percentile
from engine.calibrate_fit import COEFFICIENTS, fit, step_error
from engine.sim.parameters import SimParameters
from engine.sim.simulator import Limits
from engine.step_log import EngineFacts, LoggedRequest, LoggedStep, StepLog
from protos.core.errors import ConfigError

FEWEST_STEPS = 50


class Sample(msgspec.Struct, frozen=True):
    """What is fitted to, and what was held out."""

    engine: EngineFacts
    steps: list[LoggedStep]
    held_out_steps: list[LoggedStep]
    requests: list[LoggedRequest]
    """Of the held-out log, also those that came before the part that was held out."""
    held_out_ns: int


class Calibration(msgspec.Struct, frozen=True):
    engine: EngineFacts
    parameters: SimParameters
    steps: int
    held_out_steps: int
    step_error: float
    ttft: Comparison
    end_to_end: Comparison


def split(log: StepLog, share: float) -> Sample:
    """Hold out the last part of a log's time."""
    if not log.steps:
        raise ConfigError("the step log has no steps: nothing was asked of the engine while it was written")
    first_ns, last_ns = log.steps[0].start_ns, log.steps[-1].start_ns
    return split_at(log, last_ns - int(share * (last_ns - first_ns)))


def split_at(log: StepLog, held_out_ns: int) -> Sample:
    return Sample(
        log.engine,
        [step for step in log.steps if step.start_ns < held_out_ns],
        [step for step in log.steps if step.start_ns >= held_out_ns],
        log.requests,
        held_out_ns,
    )


def join(log: StepLog, held_out: StepLog) -> Sample:
    """Fit to all of one log, check with another one of the same engine."""
    if log.engine != held_out.engine:
        raise ConfigError("the two step logs are of different engines, or of one with different settings")
    return Sample(log.engine, log.steps, held_out.steps, held_out.requests, 0)


def calibrate(sample: Sample) -> Calibration:
    """Fit and check. Raises ConfigError where there is too little of either."""
    _require_steps(sample.steps, "to fit to")
    _require_steps(sample.held_out_steps, "held out")
    answered = [
        request.output_tokens
        for request in sample.requests
        if request.arrived_ns >= sample.held_out_ns and request.first_token_ns and not request.is_cancelled
    ]
    if not answered:
        raise ConfigError("no request of the held-out part was answered: log for longer")
    engine = sample.engine
    base = SimParameters(
        kv_blocks=engine.kv_blocks,
        kv_block_tokens=engine.kv_block_tokens,
        mean_output_tokens=max(1, round(statistics.fmean(answered))),
    )
    parameters = fit(sample.steps, base)
    limits = Limits(engine.max_sequences, engine.max_batch_tokens)
    ttft, end_to_end = compare(sample.requests, parameters, limits, sample.held_out_ns)
    return Calibration(
        engine,
        parameters,
        len(sample.steps),
        len(sample.held_out_steps),
        step_error(sample.held_out_steps, parameters),
        ttft,
        end_to_end,
    )


def _require_steps(steps: list[LoggedStep], use: str) -> None:
    if len(steps) < FEWEST_STEPS:
        raise ConfigError(f"{len(steps)} steps {use} are too few, at least {FEWEST_STEPS} are needed: log for longer")


def report(calibration: Calibration) -> list[str]:
    """For people."""
    parameters = calibration.parameters
    lines = [f"fitted to {calibration.steps} steps of {calibration.engine.model}:"]
    lines += [f"  {name:<17} {getattr(parameters, name):>12,.3f}" for name in COEFFICIENTS]
    lines += [
        f"held out: {calibration.held_out_steps} steps and {len(calibration.ttft.measured_ms)} requests",
        f"  step time          off by {calibration.step_error:.1%} (mean, of each step)",
    ]
    return lines + _latency("TTFT", calibration.ttft) + _latency("end to end", calibration.end_to_end)


def _latency(name: str, latency: Comparison) -> list[str]:
    measured, simulated = latency.measured_ms, latency.simulated_ms
    return [
        f"  {name:<18} off by {latency.mape:.1%} (mean, of each request)",
        f"    mean   {statistics.fmean(measured):>8,.0f} ms measured, {statistics.fmean(simulated):>8,.0f} simulated "
        f"({latency.mean_error():+.1%})",
        f"    p95    {percentile(measured, 0.95):>8,.0f} ms measured, {percentile(simulated, 0.95):>8,.0f} simulated "
        f"({latency.p95_error():+.1%})",
    ]


def profile(calibration: Calibration) -> str:
    """A file for engine/profiles, or for `--config`."""
    engine, parameters = calibration.engine, calibration.parameters
    lines = [
        f"# {engine.model} by {engine.backend}, simulated: fitted by `tidegate engine calibrate` to "
        f"{calibration.steps} steps.",
        f"# On a held-out workload ({len(calibration.ttft.measured_ms)} requests) it is off by "
        f"{calibration.step_error:.1%} per step; TTFT by {calibration.ttft.mape:.1%} per request",
        f"# ({calibration.ttft.mean_error():+.1%} in the mean), end to end by {calibration.end_to_end.mape:.1%} "
        f"({calibration.end_to_end.mean_error():+.1%}).",
        "[engine]",
        'backend = "sim"',
        f"model = {msgspec.json.encode(engine.model).decode()}",
        f"max_model_len = {engine.context_tokens}",
        f"max_num_seqs = {engine.max_sequences}",
        f"max_num_batched_tokens = {engine.max_batch_tokens}",
        "",
        "[engine.sim]",
        *(f"{name} = {getattr(parameters, name):g}" for name in COEFFICIENTS),
        f"kv_blocks = {parameters.kv_blocks}",
        f"kv_block_tokens = {parameters.kv_block_tokens}",
        f"mean_output_tokens = {parameters.mean_output_tokens}",
    ]
    return "\n".join(lines) + "\n"
