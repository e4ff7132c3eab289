"""What it is worth to give an engine's next step enough prompts, and not all that it has room for, in virtual time."""

from __future__ import annotations

import statistics

import msgspec
import pytest

from gateway import forecast
from tests.virtual.harness import SECOND_NS, Arrival, Gateway, Result
from tests.virtual.workload import engine

WARM_UP = 300


class Run(msgspec.Struct):
    ttft_ns: float
    """Mean, once the engine's steps are known."""
    requests_per_s: float


def closed_loop(users: int, requests: int, prompt_tokens: int, output_tokens: int) -> Run:
    """Each user sends the next request when the last one has been answered; all begin at once."""
    model = engine()
    gateway = Gateway(
        model.parameters, workers=1, max_sequences=model.max_sequences, max_batch_tokens=model.max_batch_tokens
    )
    left = requests - users

    def request() -> Arrival:
        return Arrival(at_ns=gateway.now_ns, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    def follow_up(_: Result) -> Arrival | None:
        nonlocal left
        left -= 1
        return request() if left >= 0 else None

    gateway.next_turn = follow_up
    results = gateway.run([request()] * users)
    assert len(results) == requests
    results.sort(key=lambda result: result.arrival.at_ns)
    seconds = max(result.finished_ns for result in results) / SECOND_NS
    return Run(statistics.mean(result.ttft_ns for result in results[WARM_UP:]), requests / seconds)


def test_users_who_began_together_do_not_wait_for_each_other_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    small = closed_loop(64, 1_000, 1_000, 200)
    monkeypatch.setattr(forecast, "ENOUGH_STEPS", 10**9)
    large = closed_loop(64, 1_000, 1_000, 200)
    assert small.ttft_ns < 0.4 * large.ttft_ns
    assert small.requests_per_s > 0.99 * large.requests_per_s


def test_prompts_with_hardly_an_answer_cost_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    small = closed_loop(400, 2_000, 500, 2)
    monkeypatch.setattr(forecast, "ENOUGH_STEPS", 10**9)
    large = closed_loop(400, 2_000, 500, 2)
    assert small.requests_per_s > 0.97 * large.requests_per_s
