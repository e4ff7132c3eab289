"""Goodput from half of what an engine can carry to three times as much: through the gateway, and straight to it.

Capacity is found first: the requests per second that the engine alone finishes when it always has enough to do. Each
load then sends the same arrivals both ways. In virtual time, with the gateway's own deciders and a simulated engine;
with --real, over HTTP to vLLM on this machine: see `tests.bench.overload_real`.

In virtual time there are two workloads: lengths as they come, of which short prompts can be in time where long ones
cannot, so that more requests are served in time the more there are to choose from; and one length for all.

    python -m tests.bench.overload [--loads 0.5,1,1.5,2,2.5,3] [--seconds 600]
    python -m tests.bench.overload --real [...]
    python -m tests.bench.overload --plot tests/bench/overload.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from tests.bench import report
from tests.virtual.harness import Arrival, Result, direct
from tests.virtual.workload import Engine, Slo, engine, gateway, poisson

PROFILE = "qwen3-14b-a100"
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
FLOOD_RATE = 50.0
FLOOD_SECONDS = 40.0
RESULTS = report.FOLDER / "overload.json"
OVERLOADS = 2.0
"""From this load on the targets must hold."""
GOODPUT_FLOOR = 0.9
MISSED_CEILING = 0.05
MAPE_CEILING = 0.2
COVERAGE = (0.88, 0.92)
REFUSAL_CEILING_MS = 50.0

ONE_LENGTH = (512, 128)
"""Tokens in and out, as in the usual benchmarks of engines."""

Kind = Literal["virtual", "one length", "real"]
Path_ = Literal["gateway", "direct"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request, as far as the figures need it. Times in seconds; None where it did not happen."""

    is_refused: bool
    """When it arrived. One that is given up later was admitted, and missed."""
    is_good: bool
    prompt_tokens: int | None = None
    ttft_s: float | None = None
    expected_s: float | None = None
    """Of its first token, forecast when it was admitted."""
    safe_s: float | None = None
    refused_after_s: float | None = None


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One load through one path."""

    kind: Kind
    path: Path_
    load: float
    rate: float
    seconds: float
    requests: int
    goodput: float
    good_prompt_tokens: float | None = None
    """Per second, of the requests that goodput counts."""
    refused: float
    """Share of all requests."""
    missed: float
    """Share of the requests that were not refused."""
    mape: float | None
    coverage: float | None
    """Share of forecasts whose safe value was not exceeded."""
    forecasts: int
    ttft_p50_s: float
    ttft_p95_s: float
    refusal_p99_ms: float | None


class Sweep(msgspec.Struct):
    """All points of one kind of engine. Kept in RESULTS, so that a sweep can be made in pieces."""

    kind: Kind
    about: str
    slo: str
    capacity: float
    points: list[Point] = []


def measure(outcomes: Sequence[Outcome], *, kind: Kind, path: Path_, load: float, rate: float, seconds: float) -> Point:
    """Figures of one run. Forecasts are judged over the admitted requests that had one and got a first token.

    Those that were admitted and then given up at the last moment have no TTFT: they count as misses, not as errors.
    """
    admitted = [one for one in outcomes if not one.is_refused]
    ttfts = [one.ttft_s for one in admitted if one.ttft_s is not None]
    errors, covered = [], 0
    for one in admitted:
        if one.ttft_s is not None and one.expected_s is not None and one.safe_s is not None:
            errors.append(abs(one.ttft_s - one.expected_s) / one.ttft_s)
            covered += one.ttft_s <= one.safe_s
    refusals_ms = [1e3 * one.refused_after_s for one in outcomes if one.refused_after_s is not None]
    return Point(
        kind=kind,
        path=path,
        load=load,
        rate=rate,
        seconds=seconds,
        requests=len(outcomes),
        goodput=sum(one.is_good for one in outcomes) / seconds,
        good_prompt_tokens=_good_prompt_tokens(outcomes, seconds),
        refused=1 - len(admitted) / len(outcomes),
        missed=sum(not one.is_good for one in admitted) / max(1, len(admitted)),
        mape=sum(errors) / len(errors) if errors else None,
        coverage=covered / len(errors) if errors else None,
        forecasts=len(errors),
        ttft_p50_s=report.quantile(ttfts, 0.5),
        ttft_p95_s=report.quantile(ttfts, 0.95),
        refusal_p99_ms=report.quantile(refusals_ms, 0.99) if refusals_ms else None,
    )


def _good_prompt_tokens(outcomes: Sequence[Outcome], seconds: float) -> float | None:
    tokens = [one.prompt_tokens for one in outcomes if one.is_good]
    known = [count for count in tokens if count is not None]
    return sum(known) / seconds if len(known) == len(tokens) else None


# ---------------------------------------------------------------- virtual


class Shape(msgspec.Struct, frozen=True):
    """What arrives, but for its rate."""

    seconds: float
    seed: int
    preset: str | None
    lengths: tuple[int, int] | None = None
    """Tokens in and out of every request, in place of what they would be."""

    @property
    def about(self) -> str:
        return "{} in and {} out".format(*self.lengths) if self.lengths else f"{self.preset or 'log-normal'} lengths"

    def arrivals(self, rate: float, slo: Slo | None = None) -> list[Arrival]:
        arrivals = poisson(rate, self.seconds, seed=self.seed, slo=slo, preset=self.preset)
        if self.lengths is None:
            return arrivals
        prompt, output = self.lengths
        return [msgspec.structs.replace(one, prompt_tokens=prompt, output_tokens=output) for one in arrivals]


def outcome(result: Result, slo: Slo) -> Outcome:
    has_started = result.first_token_ns > 0
    forecast = result.forecast
    return Outcome(
        is_refused=result.is_refused,
        is_good=slo.is_met(result),
        prompt_tokens=result.arrival.prompt_tokens,
        ttft_s=result.ttft_ns / 1e9 if has_started else None,
        expected_s=forecast.expected_ns / 1e9 if forecast else None,
        safe_s=forecast.safe_ns / 1e9 if forecast else None,
    )


def through_gateway(model: Engine, slo: Slo, rate: float, shape: Shape) -> list[Outcome]:
    return [outcome(result, slo) for result in gateway(model, slo).run(shape.arrivals(rate, slo))]


def straight(model: Engine, slo: Slo, rate: float, shape: Shape) -> list[Outcome]:
    results = direct(
        model.parameters,
        shape.arrivals(rate),
        max_sequences=model.max_sequences,
        max_batch_tokens=model.max_batch_tokens,
    )
    return [outcome(result, slo) for result in results]


def find_capacity(model: Engine, shape: Shape) -> float:
    """Requests per second that the engine finishes while far more wait."""
    results = direct(
        model.parameters,
        msgspec.structs.replace(shape, seconds=FLOOD_SECONDS).arrivals(FLOOD_RATE),
        max_sequences=model.max_sequences,
        max_batch_tokens=model.max_batch_tokens,
    )
    finished_ns = sorted(result.finished_ns for result in results)
    # Neither the filling of the batch nor its emptying.
    start, end = len(results) // 4, 3 * len(results) // 4
    return (end - start) / (finished_ns[end] - finished_ns[start]) * 1e9


def virtual_sweep(kind: Kind, loads: Sequence[float], shape: Shape) -> Sweep:
    model, slo = engine(PROFILE), Slo()
    capacity = find_capacity(model, shape)
    about = f"{PROFILE}, simulated, in virtual time, {shape.about}"
    sweep = Sweep(kind, about, "TTFT 1 s, TPOT 100 ms", capacity)
    for load in loads:
        rate = load * capacity
        for path, run in (("gateway", through_gateway), ("direct", straight)):
            outcomes = run(model, slo, rate, shape)
            sweep.points.append(
                measure(outcomes, kind=kind, path=path, load=load, rate=rate, seconds=shape.seconds)  # type: ignore[arg-type]
            )
    return sweep


# ---------------------------------------------------------------- results


def load_sweeps() -> dict[Kind, Sweep]:
    if not RESULTS.exists():
        return {}
    return {sweep.kind: sweep for sweep in msgspec.json.decode(RESULTS.read_bytes(), type=list[Sweep])}


def keep(sweep: Sweep) -> None:
    """Put a sweep into RESULTS, in place of the one of its kind."""
    sweeps = load_sweeps() | {sweep.kind: sweep}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(list(sweeps.values())), indent=1))


def print_sweep(sweep: Sweep) -> None:
    ours = [point for point in sweep.points if point.path == "gateway"]
    alone = {point.load: point for point in sweep.points if point.path == "direct"}
    peak = max((point.goodput for point in ours), default=0.0)
    rows = []
    for point in sorted(ours, key=lambda point: point.load):
        other = alone.get(point.load)
        rows.append(
            (
                f"{point.load:g}x, {point.rate:.2f}/s",
                f"{other.goodput:.2f}" if other else "-",
                f"{point.goodput:.2f}",
                f"{point.goodput / peak:.0%}" if peak else "-",
                "-" if point.good_prompt_tokens is None else f"{point.good_prompt_tokens:.0f}",
                f"{point.missed:.1%}",
                f"{point.refused:.1%}",
                f"{point.ttft_p50_s:.2f}/{point.ttft_p95_s:.2f}",
                "-" if point.mape is None else f"{point.mape:.1%}",
                "-" if point.coverage is None else f"{point.coverage:.1%}",
                "-" if point.refusal_p99_ms is None else f"{point.refusal_p99_ms:.1f}",
            )
        )
    report.print_table(
        f"Overload, {sweep.about}: goodput in requests/s, objectives {sweep.slo}, capacity {sweep.capacity:.2f}/s",
        (
            "offered",
            "engine alone",
            "gateway",
            "of peak",
            "its prompt tokens/s",
            "admitted, missed",
            "refused",
            "TTFT p50/p95 s",
            "forecast MAPE",
            "p90 covers",
            "refusal p99 ms",
        ),
        rows,
    )
    _print_verdicts(ours, peak)


def _print_verdicts(ours: Sequence[Point], peak: float) -> None:
    for point in ours:
        if point.load >= OVERLOADS and peak:
            what = f"{point.kind}, {point.load:g}x"
            kept = point.goodput / max(other.goodput for other in ours if other.load <= point.load)
            report.print_verdict(f"{what}: goodput over its peak up to there", kept, GOODPUT_FLOOR, at_most=False)
            share = point.goodput / peak
            report.print_verdict(f"{what}: goodput over its peak at any load", share, GOODPUT_FLOOR, at_most=False)
            report.print_verdict(f"{what}: admitted but missed", point.missed, MISSED_CEILING, at_most=True)
    if not ours:
        return
    kind, forecasts = ours[0].kind, sum(point.forecasts for point in ours) or 1
    mape = sum((point.mape or 0) * point.forecasts for point in ours) / forecasts
    coverage = sum((point.coverage or 0) * point.forecasts for point in ours) / forecasts
    report.print_verdict(f"{kind}: TTFT forecast at admission, MAPE over all loads", mape, MAPE_CEILING, at_most=True)
    report.print_verdict(f"{kind}: its p90 covers, at least", coverage, COVERAGE[0], at_most=False)
    report.print_verdict(f"{kind}: its p90 covers, at most", coverage, COVERAGE[1], at_most=True)
    refusals = [point.refusal_p99_ms for point in ours if point.refusal_p99_ms is not None]
    if refusals:
        report.print_verdict(f"{kind}: refusal p99 ms, worst load", max(refusals), REFUSAL_CEILING_MS, at_most=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=lambda text: tuple(map(float, text.split(","))), default=LOADS)
    parser.add_argument("--seconds", type=float, default=600.0, help="of arrivals per load, virtual")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--preset", help="lengths of a published trace, virtual: a name from replay/presets.json")
    parser.add_argument("--real", action="store_true", help="vLLM on this machine; see tests.bench.overload_real")
    parser.add_argument("--plot", type=Path, help="draw what RESULTS holds into this file, and measure nothing")
    arguments, rest = parser.parse_known_args()
    if arguments.plot:
        from tests.bench.overload_plot import draw

        draw(load_sweeps(), arguments.plot)
        return 0
    if arguments.real:
        from tests.bench.overload_real import main as real_main

        return real_main(rest, arguments.loads, arguments.seed)
    parser.parse_args()  # nothing unknown may be left
    shape = Shape(arguments.seconds, arguments.seed, arguments.preset)
    shapes: dict[Kind, Shape] = {"virtual": shape, "one length": msgspec.structs.replace(shape, lengths=ONE_LENGTH)}
    for kind, shape in shapes.items():
        sweep = virtual_sweep(kind, arguments.loads, shape)
        keep(sweep)
        print_sweep(sweep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
