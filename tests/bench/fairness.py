"""Fairness among tenants and protection of the top band, in virtual time, with the gateway's own scheduler.

Service is what a tenant was really given: prompt tokens when they are placed, twice its output tokens as they are made.
While two tenants both have requests waiting, the service of one may not move away from the other's by more than the
bound of the Virtual Token Counter (Sheng et al., OSDI 2024, theorem 4.4): 2 * max(input weight * longest prompt, output
weight * output tokens of a full batch). It is checked for each pair, at every event, on an engine of few sequences:
there the bound is tight.

What quiet tenants notice of an aggressive one is measured on the engine as its profile is: with the trace as it is,
which fills it to about 15%, and to 42% with the aggressive tenant, and at SPEED times its speed, which fills it to 60%
and 170%; then on a small fleet, with the trace as many times as fast, so that it is as full. "Beside the others" is the
trace without aggression: a tenant of short prompts alone has steps to itself that a shared engine does not make.

Each of them has a dozen requests, so that its own p95 is that of its worst one, which meets the same prompts of others
in each draw: there is a verdict about all their requests together, one about the tenant that has it worst, and one
about the worst where it is drawn what meets what: each tenant is moved by a time of its own, round the end of the
trace, and keeps its rhythm. For each tenant that misses then, and where the workers are not overfull, the same is told
with prompts of one token of all others: the rest of the running step and the answers in its own are left, and no order
of prompts mends those.

    python -m tests.bench.fairness [--trace arena_tenants.csv]

The trace has the columns arrival_s, tenant, prompt_tokens and output_tokens.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from gateway.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT
from tests.bench import report
from tests.virtual.harness import SECOND_NS, Arrival, Gateway, Result
from tests.virtual.workload import Slo, engine, gateway, poisson

SLOTS = 32
SPEED = 4.0
"""The trace is replayed so many times as fast, so that tenants compete."""
WORKERS = (1, 4)
AGGRESSION = 10
DRAWS = 3
"""How often the arrivals of the bands are drawn: one draw says little of a p95."""
AGGRESSIVE_DRAWS = 12
"""How often those of the aggressive tenant are: the p95 of a quiet one is that of a dozen requests in each."""
SHIFTS = 24
"""How often the tenants are moved against each other: the p95 of a quiet one is that of some 300 requests."""
QUIET_REQUESTS = 10
"""A tenant with fewer has no p95."""
QUIET_TENANTS = 8
QUIET_CEILING = 1.3
CRITICAL_CEILING = 1.1


class Spread:
    """The widest move of one tenant's service away from another's while both had requests waiting."""

    def __init__(self, gateway: Gateway) -> None:
        self.widest = 0.0
        self.contested = 0
        self._gateway = gateway
        self._extremes: dict[tuple[str, str], tuple[float, float]] = {}

    def check(self) -> None:
        waiting = sorted({depth.tenant for depth in self._gateway.scheduler.depths()})
        served, extremes = self._gateway.served, {}
        for index, one in enumerate(waiting):
            for other in waiting[index + 1 :]:
                ahead = served[one] - served[other]
                least, most = self._extremes.get((one, other), (ahead, ahead))
                least, most = extremes[one, other] = min(least, ahead), max(most, ahead)
                self.widest = max(self.widest, most - least)
        self.contested += bool(extremes)
        self._extremes = extremes


def bound(arrivals: Iterable[Arrival], slots: int) -> float:
    longest_prompt = max(arrival.prompt_tokens for arrival in arrivals)
    longest_answer = max(arrival.output_tokens for arrival in arrivals)
    return 2 * max(INPUT_WEIGHT * longest_prompt, OUTPUT_WEIGHT * slots * longest_answer)


def read_trace(path: Path) -> list[Arrival]:
    with path.open(newline="") as file:
        return [
            Arrival(
                at_ns=int(float(row["arrival_s"]) * SECOND_NS),
                prompt_tokens=int(row["prompt_tokens"]),
                output_tokens=int(row["output_tokens"]),
                tenant=row["tenant"],
            )
            for row in csv.DictReader(file)
        ]


def made_up_trace(seconds: float = 360.0, seed: int = 1) -> list[Arrival]:
    """27 tenants whose rates fall off as in the Chatbot Arena trace, with short prompts and answers of some 200."""
    draw = random.Random(seed)
    arrivals = []
    for number in range(27):
        at_s = 0.0
        while (at_s := at_s + draw.expovariate(0.5 / (number + 1))) < seconds:
            prompt, answer = min(1_000, int(draw.lognormvariate(3.7, 1.3)) + 2), draw.randint(2, 512)
            arrivals.append(_arrival(at_s, f"tenant-{number:02}", prompt, answer))
    return sorted(arrivals, key=lambda arrival: arrival.at_ns)


def _arrival(at_s: float, tenant: str, prompt_tokens: int, output_tokens: int) -> Arrival:
    return Arrival(at_ns=int(at_s * SECOND_NS), prompt_tokens=prompt_tokens, output_tokens=output_tokens, tenant=tenant)


def speed_up(arrivals: Iterable[Arrival], factor: float) -> list[Arrival]:
    return [msgspec.structs.replace(arrival, at_ns=int(arrival.at_ns / factor)) for arrival in arrivals]


def multiply(arrivals: Sequence[Arrival], tenant: str, factor: int, seed: int = 1) -> list[Arrival]:
    """One tenant sends so many times as much: copies of its requests up to a second later."""
    draw = random.Random(seed)
    copies = [
        _arrival(one.at_ns / SECOND_NS + draw.random(), tenant, one.prompt_tokens, one.output_tokens)
        for one in arrivals
        if one.tenant == tenant
        for _ in range(factor - 1)
    ]
    return sorted([*arrivals, *copies], key=lambda arrival: arrival.at_ns)


def shift(arrivals: Sequence[Arrival], seed: int) -> list[Arrival]:
    """Each tenant's arrivals are moved by a time of its own; what passes the end comes at the start."""
    draw = random.Random(seed)
    span_ns = max(arrival.at_ns for arrival in arrivals) + 1
    by_ns = {tenant: draw.randrange(span_ns) for tenant in sorted(_counts(arrivals))}
    moved = [msgspec.structs.replace(one, at_ns=(one.at_ns + by_ns[one.tenant]) % span_ns) for one in arrivals]
    return sorted(moved, key=lambda arrival: arrival.at_ns)


def silence(arrivals: Iterable[Arrival], tenant: str) -> list[Arrival]:
    """The prompts of all others are one token; their answers are what they were."""
    return [one if one.tenant == tenant else msgspec.structs.replace(one, prompt_tokens=1) for one in arrivals]


def run(
    arrivals: Sequence[Arrival],
    slots: int,
    slo: Slo,
    until_s: float | None = None,
    *,
    workers: int = 1,
    is_watched: bool = False,
) -> tuple[list[Result], Spread]:
    """`is_watched`: look at the service of all tenants after each event."""
    model = msgspec.structs.replace(engine(), max_sequences=slots)
    through = gateway(model, slo, workers=workers)
    spread = Spread(through)
    if is_watched:
        through.after_event = spread.check
    return through.run(arrivals, None if until_s is None else int(until_s * SECOND_NS)), spread


def p95_s(results: Iterable[Result], *tenants: str) -> float:
    """Of their time to first token."""
    ttfts = [one.ttft_ns / 1e9 for one in results if one.arrival.tenant in tenants and one.first_token_ns]
    return report.quantile(ttfts, 0.95)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path)
    arguments = parser.parse_args()
    if arguments.trace is None:
        report.console.print("without --trace: made-up tenants in the shape of the Chatbot Arena trace")
        trace = made_up_trace()
    elif not arguments.trace.exists():
        sys.exit(f"bench: no file {arguments.trace}")
    else:
        trace = read_trace(arguments.trace)
    show_bound(speed_up(trace, SPEED))
    for workers in WORKERS:
        for speed in (1.0, SPEED):
            show_quiet(speed_up(trace, speed * workers), speed * workers, workers)
    show_bands()
    return 0


def show_bound(trace: Sequence[Arrival]) -> None:
    counts = _counts(trace)
    loudest = max(counts, key=lambda tenant: counts[tenant])
    for name, arrivals in (
        (f"{len(counts)} tenants", trace),
        (f"{loudest} at {AGGRESSION}x", multiply(trace, loudest, AGGRESSION)),
    ):
        _, spread = run(arrivals, SLOTS, Slo(), is_watched=True)
        limit = bound(arrivals, SLOTS)
        what = f"{name}: widest move of service between two that wait, over the bound of {limit:,.0f}"
        report.print_verdict(f"{what} ({spread.contested:,} events)", spread.widest / limit, 1.0, at_most=True)


def show_quiet(trace: Sequence[Arrival], speed: float, workers: int) -> None:
    """The tenants with the fewest requests beside the loudest one that sends many times as much."""
    counts = _counts(trace)
    by_requests = sorted((tenant for tenant in counts if counts[tenant] >= QUIET_REQUESTS), key=lambda one: counts[one])
    quiet, loudest = by_requests[:QUIET_TENANTS], by_requests[-1]
    slots = engine().max_sequences
    play = functools.partial(run, slots=slots, slo=Slo(), workers=workers)
    alone = [
        result for tenant in quiet for result in play([arrival for arrival in trace if arrival.tenant == tenant])[0]
    ]
    beside, _ = play(trace)
    crowds = [multiply(trace, loudest, AGGRESSION, seed) for seed in range(1, AGGRESSIVE_DRAWS + 1)]
    crowded = [result for crowd in crowds for result in play(crowd)[0]]
    shifts = [multiply(shift(trace, seed), loudest, AGGRESSION, seed) for seed in range(1, SHIFTS + 1)]
    shifted = [result for crowd in shifts for result in play(crowd)[0]]
    report.console.print(
        f"quiet tenants, the trace at {speed:g}x on {workers} x {slots} sequences, p95 TTFT in ms: alone, "
        f"beside the others, with {loudest} at {AGGRESSION}x (over alone), the same where the tenants are moved"
    )
    ratios, shifted_ratios, hindered = [], [], []
    for tenant in quiet:
        own_s, others_s, all_s, moved_s = (p95_s(results, tenant) for results in (alone, beside, crowded, shifted))
        ratios.append(all_s / own_s)
        shifted_ratios.append(moved_s / own_s)
        report.console.print(
            f"  {tenant} ({counts[tenant]} requests): {own_s * 1e3:.0f}, {others_s * 1e3:.0f}, "
            f"{all_s * 1e3:.0f} ({ratios[-1]:.2f}), {moved_s * 1e3:.0f} ({shifted_ratios[-1]:.2f})"
        )
        if shifted_ratios[-1] > QUIET_CEILING and speed <= workers:
            least_s = p95_s([result for crowd in shifts for result in play(silence(crowd, tenant))[0]], tenant)
            hindered.append(f"{tenant} {least_s / own_s:.2f}")
    if hindered:
        report.console.print(f"  moved, where the prompts of all others are one token: {', '.join(hindered)}")
    own_s, others_s, all_s = (p95_s(results, *quiet) for results in (alone, beside, crowded))
    where = f"with {loudest} at {AGGRESSION}x, the trace at {speed:g}x, workers: {workers}"
    besides = f"over {own_s * 1e3:.0f} ms alone (beside the others {others_s / own_s:.2f})"
    report.print_verdict(f"all {len(quiet)} together {where}, {besides}", all_s / own_s, QUIET_CEILING, at_most=True)
    report.print_verdict(f"the worst of them {where}", max(ratios), QUIET_CEILING, at_most=True)
    report.print_verdict(f"the same, tenants moved {SHIFTS} times", max(shifted_ratios), QUIET_CEILING, at_most=True)


def _counts(trace: Iterable[Arrival]) -> collections.Counter[str]:
    return collections.Counter(arrival.tenant for arrival in trace)


def beside_batch(seconds: float, draw: int) -> tuple[list[Result], list[Result]]:
    """Critical requests, one in two seconds: alone, and beside a batch of twice what the engine can carry."""
    slots = engine().max_sequences
    critical = [_in_band(arrival, "critical", 0) for arrival in poisson(0.5, seconds, seed=2 * draw)]
    batch = [_in_band(arrival, "batch", 2) for arrival in poisson(9.0, seconds, seed=2 * draw + 1)]
    both = sorted([*critical, *batch], key=lambda arrival: arrival.at_ns)
    return run(critical, slots, Slo())[0], run(both, slots, Slo(), until_s=seconds)[0]


def show_bands(seconds: float = 600.0) -> None:
    alone: list[Result] = []
    crowded: list[Result] = []
    for draw in range(1, DRAWS + 1):
        for results, more in zip((alone, crowded), beside_batch(seconds, draw), strict=True):
            results += more
    own_s = p95_s(alone, "critical")
    what = f"critical p95 TTFT beside a batch that saturates the engine, over what it has alone, {own_s * 1e3:.0f} ms"
    report.print_verdict(what, p95_s(crowded, "critical") / own_s, CRITICAL_CEILING, at_most=True)
    done = sum(result.finished_ns > 0 for result in crowded if result.arrival.band == 2)
    report.console.print(f"batch beside it: {done / seconds / DRAWS:.2f} requests/s finished")


def _in_band(arrival: Arrival, tenant: str, band: int) -> Arrival:
    return Arrival(
        at_ns=arrival.at_ns,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=arrival.output_tokens,
        tenant=tenant,
        band=band,
    )


if __name__ == "__main__":
    sys.exit(main())
