"""Order among tenants and bands, with the gateway's own scheduler over simulated engines in virtual time."""

import itertools
import random

from engine.sim.parameters import SimParameters
from gateway.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT
from gateway.forecast import LONG_WAIT_NS
from gateway.scheduler import Placements
from tests.bench import fairness
from tests.virtual.harness import SECOND_NS, Arrival, Gateway, Result
from tests.virtual.workload import Slo

ENGINE = SimParameters(step_us=19_000, prefill_token_us=172, prefill_pair_ns=4.8, decode_us=30, kv_token_ns=102)
SLOTS = 32
LONGEST_PROMPT = 800
LONGEST_ANSWER = 400


def arrivals(
    tenant: str, rate: float, seconds: float, *, seed: int, weight: float = 1.0, band: int = 1
) -> list[Arrival]:
    """Poisson arrivals with uniform lengths."""
    draw = random.Random(f"{tenant}-{seed}")
    at_s, result = 0.0, []
    while (at_s := at_s + draw.expovariate(rate)) < seconds:
        result.append(
            Arrival(
                at_ns=int(at_s * SECOND_NS),
                prompt_tokens=draw.randint(10, LONGEST_PROMPT),
                output_tokens=draw.randint(10, LONGEST_ANSWER),
                tenant=tenant,
                weight=weight,
                band=band,
            )
        )
    return result


def run(*loads: list[Arrival], until_s: float | None = None) -> tuple[Gateway, list[Result]]:
    gateway = Gateway(ENGINE, workers=1, max_sequences=SLOTS)
    everything = sorted(itertools.chain(*loads), key=lambda arrival: arrival.at_ns)
    return gateway, gateway.run(everything, None if until_s is None else int(until_s * SECOND_NS))


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[int(len(values) * share)]


def ttfts(results: list[Result], tenant: str) -> list[int]:
    return [result.ttft_ns for result in results if result.arrival.tenant == tenant and result.first_token_ns]


def served(results: list[Result], tenant: str) -> int:
    return sum(
        result.arrival.prompt_tokens + result.arrival.output_tokens
        for result in results
        if result.arrival.tenant == tenant and result.finished_ns
    )


def test_counters_of_backlogged_tenants_stay_within_the_vtc_bound_at_every_instant() -> None:
    gateway = Gateway(ENGINE, workers=1, max_sequences=SLOTS)
    # The paper's U: a prompt, or the output tokens that one full batch can hold.
    bound = max(INPUT_WEIGHT * LONGEST_PROMPT, OUTPUT_WEIGHT * SLOTS * LONGEST_ANSWER)
    widest = 0.0
    contested = 0

    def check() -> None:
        nonlocal widest, contested
        waiting = {depth.tenant for depth in gateway.scheduler.depths()}
        if len(waiting) > 1:
            counters = [gateway.scheduler.counters.counter(tenant) for tenant in waiting]
            widest = max(widest, max(counters) - min(counters))
            contested += 1

    gateway.after_event = check
    loads = [arrivals(f"t{number}", 0.5 * (number + 1), 60, seed=1) for number in range(5)]
    gateway.run(sorted(itertools.chain(*loads), key=lambda arrival: arrival.at_ns))
    assert contested > 1_000, "the load must make tenants compete"
    assert widest <= bound


def test_service_of_waiting_tenants_stays_within_the_bound_beside_an_aggressive_one() -> None:
    trace = fairness.speed_up(fairness.made_up_trace(seconds=60), fairness.SPEED)
    crowd = fairness.multiply(trace, "tenant-00", fairness.AGGRESSION)
    _, spread = fairness.run(crowd, SLOTS, Slo(), until_s=30, is_watched=True)
    assert spread.contested > 500, "the load must make tenants compete"
    assert 0 < spread.widest <= fairness.bound(crowd, SLOTS)


def test_backlogged_tenants_are_served_alike_whatever_they_ask_for() -> None:
    _, results = run(arrivals("loud", 20, 120, seed=1), arrivals("modest", 4, 120, seed=1), until_s=120)
    assert 0.85 < served(results, "loud") / served(results, "modest") < 1.15


def test_backlogged_tenants_are_served_by_weight() -> None:
    _, results = run(arrivals("gold", 15, 120, seed=1, weight=3.0), arrivals("plain", 15, 120, seed=1), until_s=120)
    assert 2.5 < served(results, "gold") / served(results, "plain") < 3.5


def test_a_tenant_cannot_save_up_service_while_it_is_idle() -> None:
    late = [Arrival(at_ns=60 * SECOND_NS, prompt_tokens=100, output_tokens=200, tenant="late") for _ in range(200)]
    _, results = run(arrivals("busy", 20, 120, seed=1), late, until_s=90)
    after = [r for r in results if r.dispatched_ns > 60 * SECOND_NS]
    busy = sum(r.arrival.tenant == "busy" for r in after)
    assert 0.3 < busy / len(after) < 0.7, "it gets its share from now on, not the minute that it did not ask for"


def test_a_quiet_tenant_does_not_wait_behind_an_aggressive_one() -> None:
    quiet = arrivals("quiet", 0.3, 120, seed=2)
    _, alone = run(quiet)
    _, crowded = run(quiet, arrivals("aggressive", 20, 120, seed=3))
    _, unfair = run([*quiet], [_as(arrival, "quiet") for arrival in arrivals("aggressive", 20, 120, seed=3)])
    mine = {arrival.at_ns for arrival in quiet}
    first_come = [r.ttft_ns for r in unfair if r.arrival.at_ns in mine]
    assert percentile(ttfts(crowded, "quiet"), 0.95) < percentile(first_come, 0.95) / 20
    assert percentile(ttfts(crowded, "quiet"), 0.95) < percentile(ttfts(alone, "quiet"), 0.95) + 2 * SECOND_NS


def test_critical_requests_pass_a_saturating_batch_that_still_progresses() -> None:
    critical = arrivals("c", 0.5, 120, seed=4, band=0)
    batch = arrivals("b", 20, 120, seed=5, band=2)
    _, results = run(critical, batch, until_s=120)
    waits = [r.dispatched_ns - r.arrival.at_ns for r in results if r.arrival.tenant == "c" and r.dispatched_ns]
    assert percentile(waits, 0.95) < 1 * SECOND_NS
    assert sum(r.finished_ns > 0 for r in results if r.arrival.tenant == "b") > 50


def test_critical_first_tokens_come_nearly_as_if_nothing_else_ran() -> None:
    alone, crowded = fairness.beside_batch(120, draw=1)
    assert sum(result.finished_ns > 0 for result in crowded if result.arrival.band == 2) > 200, "batch progresses"
    assert fairness.p95_s(crowded, "critical") < fairness.p95_s(alone, "critical") + 0.09, "a step of an engine at work"


def test_a_quiet_tenant_has_sequences_and_short_steps_though_an_aggressive_one_has_filled_the_engine() -> None:
    quiet = [
        Arrival(at_ns=second * SECOND_NS, prompt_tokens=800, output_tokens=100, tenant="quiet")
        for second in range(20, 60, 2)
    ]
    loud = arrivals("loud", 40, 60, seed=1)
    alone, _ = fairness.run(quiet, 256, Slo())
    crowded, _ = fairness.run(sorted([*quiet, *loud], key=lambda arrival: arrival.at_ns), 256, Slo(), until_s=70)
    mine = [result for result in crowded if result.arrival.tenant == "quiet"]
    assert all(result.dispatched_ns == result.arrival.at_ns for result in mine), "nobody is waited for"
    full = sum(result.dispatched_ns > result.arrival.at_ns for result in crowded if result.arrival.tenant == "loud")
    assert full > 500, "the aggressive one waits"
    assert fairness.p95_s(crowded, "quiet") < fairness.p95_s(alone, "quiet") + 0.12


def test_who_has_waited_is_computed_in_larger_parts() -> None:
    gateway = Gateway(ENGINE, workers=1, max_sequences=256)
    parts: dict[bool, set[int]] = {False: set(), True: set()}
    place = gateway.scheduler.place

    def note(now_ns: int) -> Placements:
        decided = place(now_ns)
        for one in decided.placed:
            if one.step_tokens and now_ns > 10 * SECOND_NS:
                parts[now_ns - one.ticket.arrived_ns >= LONG_WAIT_NS].add(one.step_tokens)
        return decided

    gateway.scheduler.place = note  # type: ignore[method-assign]
    loud = arrivals("loud", 6, 60, seed=1)
    quiet = arrivals("quiet", 1, 60, seed=2)
    gateway.run(sorted([*quiet, *loud], key=lambda arrival: arrival.at_ns))
    assert min(parts[True]) > 1.8 * max(parts[False])


def _as(arrival: Arrival, tenant: str) -> Arrival:
    return Arrival(
        at_ns=arrival.at_ns + 1,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=arrival.output_tokens,
        tenant=tenant,
    )
