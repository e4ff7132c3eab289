"""Fairness among tenants and protection of the top band, in virtual time, with the gateway's own scheduler.

Service is what a tenant was really given: prompt tokens when they are placed, twice its output tokens as they are made.
While two tenants both have requests waiting, the service of one may not move away from the other's by more than the
bound of the Virtual Token Counter (Sheng et al., OSDI 2024, theorem 4.4): 2 * max(input weight * longest prompt, output
weight * output tokens of a full batch). It is checked for each pair, at every event.

    python -m tests.bench.fairness [--trace arena_tenants.csv]

The trace has the columns arrival_s, tenant, prompt_tokens and output_tokens.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from gateway.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT
from tests.bench import report
from tests.virtual.harness import SECOND_NS, Arrival, Gateway, Result
from tests.virtual.workload import Slo, engine, poisson

SLOTS = 32
SPEED = 4.0
"""The trace is replayed faster, so that this engine is overloaded and tenants compete."""
AGGRESSION = 10
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


def read_trace(path: Path, speed: float) -> list[Arrival]:
    with path.open(newline="") as file:
        return [
            Arrival(
                at_ns=int(float(row["arrival_s"]) / speed * SECOND_NS),
                prompt_tokens=int(row["prompt_tokens"]),
                output_tokens=int(row["output_tokens"]),
                tenant=row["tenant"],
            )
            for row in csv.DictReader(file)
        ]


def made_up_trace(seconds: float = 90.0, seed: int = 1) -> list[Arrival]:
    """27 tenants whose rates fall off as in the Chatbot Arena trace, with short prompts and answers of some 200."""
    draw = random.Random(seed)
    arrivals = []
    for number in range(27):
        at_s = 0.0
        while (at_s := at_s + draw.expovariate(2.0 / (number + 1))) < seconds:
            prompt, answer = min(1_000, int(draw.lognormvariate(3.7, 1.3)) + 2), draw.randint(2, 512)
            arrivals.append(_arrival(at_s, f"tenant-{number:02}", prompt, answer))
    return sorted(arrivals, key=lambda arrival: arrival.at_ns)


def _arrival(at_s: float, tenant: str, prompt_tokens: int, output_tokens: int) -> Arrival:
    return Arrival(at_ns=int(at_s * SECOND_NS), prompt_tokens=prompt_tokens, output_tokens=output_tokens, tenant=tenant)


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


def run(arrivals: Sequence[Arrival], slots: int, slo: Slo, until_s: float | None = None) -> tuple[list[Result], Spread]:
    model = engine()
    gateway = Gateway(
        model.parameters,
        workers=1,
        max_sequences=slots,
        max_batch_tokens=model.max_batch_tokens,
        token_target_ns=slo.tpot_ns,
        yielding_tokens=model.yielding_tokens,
    )
    spread = Spread(gateway)
    gateway.after_event = spread.check
    return gateway.run(arrivals, None if until_s is None else int(until_s * SECOND_NS)), spread


def p95_s(results: Iterable[Result], tenant: str) -> float:
    """Of its time to first token."""
    ttfts = [one.ttft_ns / 1e9 for one in results if one.arrival.tenant == tenant and one.first_token_ns]
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
        trace = read_trace(arguments.trace, SPEED)
    show_tenants(trace)
    show_bands()
    return 0


def show_tenants(trace: Sequence[Arrival]) -> None:
    counts: dict[str, int] = {}
    for arrival in trace:
        counts[arrival.tenant] = counts.get(arrival.tenant, 0) + 1
    loudest = max(counts, key=lambda tenant: counts[tenant])
    quiet = sorted((tenant for tenant in counts if counts[tenant] >= 10), key=lambda tenant: counts[tenant])[0]
    for name, arrivals in (
        (f"{len(counts)} tenants", trace),
        (f"{loudest} at 10x", multiply(trace, loudest, AGGRESSION)),
    ):
        _, spread = run(arrivals, SLOTS, Slo())
        limit = bound(arrivals, SLOTS)
        what = f"{name}: widest move of service between two that wait, over the bound of {limit:,.0f}"
        report.print_verdict(f"{what} ({spread.contested:,} events)", spread.widest / limit, 1.0, at_most=True)
    mine = [arrival for arrival in trace if arrival.tenant == quiet]
    alone, _ = run(mine, SLOTS, Slo())
    crowded, _ = run(multiply(trace, loudest, AGGRESSION), SLOTS, Slo())
    ratio = p95_s(crowded, quiet) / p95_s(alone, quiet)
    what = f"{quiet} ({len(mine)} requests) beside {loudest} at 10x: p95 TTFT over what it has alone"
    report.print_verdict(f"{what}, {p95_s(alone, quiet) * 1e3:.0f} ms", ratio, QUIET_CEILING, at_most=True)


def show_bands(seconds: float = 600.0) -> None:
    """Critical requests, one in two seconds, beside a batch of twice what the engine can carry."""
    model = engine()
    critical = [_in_band(arrival, "critical", 0) for arrival in poisson(0.5, seconds, seed=2)]
    batch = [_in_band(arrival, "batch", 2) for arrival in poisson(9.0, seconds, seed=3)]
    both = sorted([*critical, *batch], key=lambda arrival: arrival.at_ns)
    alone, _ = run(critical, model.max_sequences, Slo())
    crowded, _ = run(both, model.max_sequences, Slo(), until_s=seconds)
    done = sum(result.finished_ns > 0 for result in crowded if result.arrival.band == 2)
    ratio = p95_s(crowded, "critical") / p95_s(alone, "critical")
    what = f"critical p95 TTFT over what it has alone, {p95_s(alone, 'critical') * 1e3:.0f} ms"
    report.print_verdict(what, ratio, CRITICAL_CEILING, at_most=True)
    report.console.print(f"batch beside it: {done / seconds:.2f} requests/s finished")


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
