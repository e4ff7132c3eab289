"""What the adaptive limit is worth in front of an engine whose KV cache is too small for its slots, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from gateway.limiter import SequenceLimit
from tests.virtual.harness import SECOND_NS, Arrival, Gateway
from tests.virtual.workload import engine

RATE_PER_S = 6.0
SECONDS = 60.0


class Run(msgspec.Struct):
    preemptions: int
    tokens_per_s: float
    engine_wait_ns: int
    """Median time from dispatch to the first token."""


def arrivals(prompt: float, answer: float) -> list[Arrival]:
    """More than the engine can serve; log-normal lengths about these medians."""
    draw = random.Random(3)
    at_s, result = 0.0, []
    while (at_s := at_s + draw.expovariate(RATE_PER_S)) < SECONDS:
        result.append(
            Arrival(
                at_ns=int(at_s * SECOND_NS),
                prompt_tokens=min(4_000, int(prompt * draw.lognormvariate(0, 0.8)) + 2),
                output_tokens=min(2_000, int(answer * draw.lognormvariate(0, 0.7)) + 2),
            )
        )
    return result


def run(kv_blocks: int, slots: int, requests: list[Arrival]) -> Run:
    parameters = msgspec.structs.replace(engine().parameters, kv_blocks=kv_blocks)
    gateway = Gateway(parameters, workers=1, max_sequences=slots, max_batch_tokens=2_048)
    results = gateway.run(requests)
    waits_ns = sorted(result.first_token_ns - result.dispatched_ns for result in results)
    return Run(
        gateway.preemptions,
        sum(request.output_tokens for request in requests) * SECOND_NS / max(r.finished_ns for r in results),
        waits_ns[len(waits_ns) // 2],
    )


@pytest.fixture
def without_limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Run]], Run]:
    """Runs with every worker given as many sequences as it takes."""

    def measure(measured: Callable[[], Run]) -> Run:
        with monkeypatch.context() as patch:
            patch.setattr(SequenceLimit, "stepped", lambda self, load: None)
            return measured()

    return measure


@pytest.mark.parametrize(
    ("kv_blocks", "slots", "prompt", "answer"),
    [(1_500, 64, 400, 250), (3_000, 256, 250, 400), (1_500, 64, 55, 400), (600, 64, 150, 150)],
    ids=["long-prompts", "many-slots", "long-answers", "tiny-cache"],
)
def test_limit_saves_most_preemptions_and_costs_no_throughput(
    without_limit: Callable[[Callable[[], Run]], Run], kv_blocks: int, slots: int, prompt: float, answer: float
) -> None:
    requests = arrivals(prompt, answer)
    free = without_limit(lambda: run(kv_blocks, slots, requests))
    limited = run(kv_blocks, slots, requests)
    assert free.preemptions > 100, "the load must be too much for the cache"
    assert limited.preemptions < 0.3 * free.preemptions
    assert limited.tokens_per_s > 0.97 * free.tokens_per_s
    assert limited.engine_wait_ns < 0.5 * free.engine_wait_ns


def test_limit_leaves_a_cache_that_suffices_alone() -> None:
    requests = arrivals(400, 250)
    assert run(15_000, 32, requests).preemptions == 0
    gateway = Gateway(engine().parameters, workers=1, max_sequences=32, max_batch_tokens=2_048)
    (worker,) = gateway.scheduler.workers
    values = set()
    gateway.after_event = lambda: values.add(worker.limit.value)
    gateway.run(requests)
    assert values == {32}
