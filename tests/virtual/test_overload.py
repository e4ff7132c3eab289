"""Goodput under overload: the gateway's deciders in front of a simulated Qwen3-14B on an A100, in virtual time."""

import random

import pytest

from engine.sim.parameters import SimParameters
from tests.virtual.harness import SECOND_NS, Arrival, Gateway, Result

ENGINE = SimParameters(
    step_us=19_000, prefill_token_us=172, prefill_pair_ns=4.8, decode_us=30, kv_token_ns=102, kv_blocks=15_000
)
TTFT_NS = SECOND_NS
TPOT_NS = SECOND_NS // 10
SECONDS = 90
NEARLY_FULL = 3.0
"""Requests per second that this engine can just serve in time."""


def offered(rate: float, *, is_sheddable: bool) -> list[Arrival]:
    """Poisson arrivals, log-normal lengths; no prompt that could not be prefilled within the SLO by itself."""
    draw = random.Random(1)
    at_s, result = 0.0, []
    while (at_s := at_s + draw.expovariate(rate)) < SECONDS:
        result.append(
            Arrival(
                at_ns=int(at_s * SECOND_NS),
                prompt_tokens=min(3_000, int(draw.lognormvariate(6.6, 0.9)) + 2),
                output_tokens=min(1_000, int(draw.lognormvariate(5.0, 0.8)) + 2),
                is_sheddable=is_sheddable,
                patience_ns=TTFT_NS if is_sheddable else 10**15,
            )
        )
    return result


def run(rate: float, *, is_sheddable: bool) -> list[Result]:
    return Gateway(ENGINE, workers=1, max_sequences=64, max_batch_tokens=2_048).run(
        offered(rate, is_sheddable=is_sheddable)
    )


def goodput(results: list[Result]) -> float:
    """Requests per second that met both SLOs."""
    return sum(is_good(result) for result in results) / SECONDS


def is_good(result: Result) -> bool:
    if not result.finished_ns or result.ttft_ns > TTFT_NS:
        return False
    return (result.finished_ns - result.first_token_ns) / max(1, result.arrival.output_tokens - 1) <= TPOT_NS


@pytest.mark.parametrize("factor", [2, 3])
def test_goodput_under_overload_stays_at_its_peak(factor: int) -> None:
    peak = goodput(run(NEARLY_FULL, is_sheddable=True))
    results = run(factor * NEARLY_FULL, is_sheddable=True)
    assert goodput(results) >= 0.9 * peak
    admitted = [result for result in results if result.first_token_ns]
    assert sum(result.ttft_ns > TTFT_NS for result in admitted) <= 0.05 * len(admitted)


def test_without_shedding_the_same_overload_serves_nearly_nobody_in_time() -> None:
    assert goodput(run(3 * NEARLY_FULL, is_sheddable=False)) < 0.1 * goodput(run(NEARLY_FULL, is_sheddable=True))


def test_a_system_that_is_far_from_full_refuses_hardly_anybody() -> None:
    results = run(1.0, is_sheddable=True)
    assert sum(result.is_refused for result in results) <= 0.02 * len(results)


def test_a_cold_or_idle_system_admits_what_it_cannot_serve_in_time() -> None:
    hopeless = [
        Arrival(at_ns=second * 60 * SECOND_NS, prompt_tokens=8_000, output_tokens=5, is_sheddable=True, patience_ns=1)
        for second in range(20)
    ]
    results = Gateway(ENGINE, workers=1, max_sequences=64).run(hopeless)
    assert not any(result.is_refused for result in results)


def test_critical_requests_are_never_refused_on_a_forecast() -> None:
    critical = [
        Arrival(at_ns=one.at_ns + 1, prompt_tokens=200, output_tokens=50, band=0, patience_ns=TTFT_NS)
        for one in offered(0.5, is_sheddable=False)
    ]
    everything = sorted([*offered(9.0, is_sheddable=True), *critical], key=lambda arrival: arrival.at_ns)
    results = Gateway(ENGINE, workers=1, max_sequences=64, max_batch_tokens=2_048).run(everything)
    mine = [result for result in results if result.arrival.band == 0]
    assert not any(result.is_refused for result in mine)
    assert sum(is_good(result) for result in mine) >= 0.9 * len(mine)
