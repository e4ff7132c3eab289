"""What follows a failed attempt: retries, resumed answers, and the end of a drain."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from gateway import retries
from gateway.breaker import Verdict
from gateway.exchange import Gone, Lost, Overdue
from gateway.settings import Limits
from gateway.tenants import DEFAULT_BANDS, Tenant, TenantTable
from protos.core.contract import Failed, FailureKind, Finished, Sampling
from protos.core.record import Outcome
from tests.gateway.fakes import (
    FakeClient,
    FakeUpstream,
    Gateway,
    chat_body,
    gateway,
    in_virtual_time,
    price_of,
    settle_down,
)

RESUMING = TenantTable(DEFAULT_BANDS, {"anonymous": Tenant(resume=True)})
STREAM = chat_body(stream=True, max_tokens=8, stream_options={"include_usage": True})
UNARY = chat_body(max_tokens=8)


def failed(kind: FailureKind) -> Failed:
    return Failed(slot=1, kind=kind, message="it broke")


FINISHED = Finished(slot=1, reasons=("stop",), prompt_tokens=1, cached_tokens=0, output_tokens=1)


# ---------------------------------------------------------------- deciders


@pytest.mark.parametrize(
    ("end", "is_fault", "verdict"),
    [
        (FINISHED, False, Verdict.SUCCESS),
        (Lost("reset"), True, Verdict.NEITHER),
        (failed(FailureKind.INTERNAL), True, Verdict.FAILURE),
        (failed(FailureKind.UNAVAILABLE), True, Verdict.NEITHER),
        (failed(FailureKind.INVALID), False, Verdict.NEITHER),
        (failed(FailureKind.CONTEXT_EXCEEDED), False, Verdict.NEITHER),
        (failed(FailureKind.UNKNOWN_MODEL), False, Verdict.NEITHER),
        (Gone(), False, Verdict.NEITHER),
        (Overdue(), False, Verdict.NEITHER),
    ],
    ids=lambda value: str(value)[:40],
)
def test_only_a_workers_fault_is_tried_again_or_told_to_the_breaker(end: Any, is_fault: bool, verdict: Verdict) -> None:
    assert retries.is_workers_fault(end) is is_fault
    assert retries.verdict(end) is verdict


def test_budget_is_a_share_of_what_is_active_and_never_less_than_a_few() -> None:
    budget, fault = retries.RetryBudget(), failed(FailureKind.INTERNAL)
    taken = [budget.take(request, fault, active=100) for request in range(30)]
    assert taken == [True] * 20 + [False] * 10
    assert budget.take(0, fault, active=100), "a request holds one share, however often it is tried"
    budget.give_back(0)
    assert budget.take(99, fault, active=100)
    few = retries.RetryBudget()
    assert [few.take(request, fault, active=1) for request in range(4)] == [True] * 3 + [False]


def test_lost_worker_costs_no_budget() -> None:
    budget = retries.RetryBudget()
    assert all(budget.take(request, Lost("killed"), active=3) for request in range(100))


@pytest.mark.parametrize(
    ("fields", "is_resumable"),
    [
        ({}, True),
        ({"temperature": 0.0, "seed": 1}, True),
        ({"repetition_penalty": 1.2, "min_tokens": 3, "stop": ("x",), "logit_bias": {1: 2.0}}, True),
        ({"seed": 1}, False),
        ({"seed": 1, "temperature": 0.7}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"n": 2}, False),
        ({"logprobs": 0}, False),
    ],
    ids=str,
)
def test_only_what_can_be_exact_is_resumed(fields: dict[str, Any], is_resumable: bool) -> None:
    assert retries.is_resumable(Sampling(**fields)) is is_resumable


# ---------------------------------------------------------------- retries


@in_virtual_time
async def test_retry_is_paid_once() -> None:
    async with gateway(workers=2) as g:
        client = await g.post(UNARY)
        g.fleet.lose("worker-0")
        await settle_down()
        g.fleet.workers["worker-1"].token()
        g.fleet.workers["worker-1"].finish(output_tokens=1)
        await client.task
        assert client.status == 200
    assert g.served == await price_of(UNARY)
    assert [attempt.output_tokens for attempt in g.record.attempts] == [0, 1]


@in_virtual_time
async def test_failing_workers_get_no_more_retries_than_the_budget() -> None:
    async with gateway(workers=2, max_sequences=64) as g:
        clients = [await g.post(UNARY) for _ in range(20)]
        for worker in g.fleet.workers.values():
            for slot in list(worker.sinks)[:10]:
                worker.fail(slot, FailureKind.INTERNAL)
        await settle_down()
        again = [worker for worker in g.fleet.workers.values() for _ in worker.sinks]
        assert len(again) == 4, "20% of 20"
        for worker in g.fleet.workers.values():
            for slot in list(worker.sinks):
                worker.token(slot)
                worker.finish(slot)
        await asyncio.gather(*(client.task for client in clients))
        assert sorted(client.status for client in clients) == [200] * 4 + [503] * 16


@in_virtual_time
async def test_retry_stops_at_the_deadline() -> None:
    async with gateway(workers=2, limits=Limits(first_token_s=5)) as g:
        client = await g.post(UNARY)
        g.fleet.workers["worker-0"].answers_cancels = False
        await asyncio.sleep(5)
        g.fleet.lose("worker-0")
        await client.task
        assert g.fleet.workers["worker-1"].submitted == []
        assert client.status == 504


# ---------------------------------------------------------------- resumed answers


async def begun(g: Gateway, body: bytes = STREAM, *texts: str) -> FakeClient:
    """A client whose answer has begun on worker-0."""
    client = await g.post(body)
    for text in texts or ("Once ", "upon "):
        g.fleet.workers["worker-0"].token(text=text)
    return client


@in_virtual_time
async def test_resumed_answer_goes_on_from_its_last_token() -> None:
    async with gateway(workers=2, tenants=RESUMING) as g:
        client = await begun(g)
        await asyncio.sleep(1)
        g.fleet.lose("worker-0")
        await settle_down()
        other = g.fleet.workers["worker-1"]
        first, second = g.fleet.workers["worker-0"].submitted[0], other.submitted[0]
        assert (first["resumed"], second["resumed"]) == ([], [1, 2])
        assert second["prompt"] == first["prompt"]
        await asyncio.sleep(1)
        for text in ("a ", "time"):
            other.token(text=text)
        other.finish(output_tokens=2)
        await client.task
        assert client.text == "Once upon a time"
        assert client.events[-1] == "[DONE]"
        assert client.events[-2]["usage"]["completion_tokens"] == 4
        assert client.events[-2]["usage"]["prompt_tokens"] == 7
        assert sum(event == "[DONE]" for event in client.events) == 1
        roles = [event["choices"][0]["delta"].get("role") for event in client.events[:-2]]
        assert roles.count("assistant") == 1, "it begins once"
    record = g.record
    assert record.outcome is Outcome.FINISHED
    assert [(attempt.worker, attempt.output_tokens) for attempt in record.attempts] == [
        ("worker-0", 2),
        ("worker-1", 2),
    ]
    assert record.attempts[0].error == "connection reset"
    assert (record.output_tokens, record.prompt_tokens, record.cached_tokens) == (4, 7, 2)
    assert record.max_gap_ns == 2_000_000_000
    assert record.phases.retry is None, "its first token did not wait"
    assert record.phases.decode == 2_000_000_000


@in_virtual_time
async def test_resumed_answer_is_paid_once() -> None:
    async with gateway(workers=2) as undisturbed:
        client = await begun(undisturbed, STREAM, "a ", "b ", "c ")
        undisturbed.fleet.workers["worker-0"].finish(output_tokens=3)
        await client.task
    async with gateway(workers=2, tenants=RESUMING) as g:
        client = await begun(g)
        g.fleet.lose("worker-0")
        await settle_down()
        g.fleet.workers["worker-1"].token()
        g.fleet.workers["worker-1"].finish(output_tokens=1)
        await client.task
    assert g.served == undisturbed.served


@in_virtual_time
async def test_resumed_unary_answer_is_whole() -> None:
    async with gateway(workers=2, tenants=RESUMING) as g:
        client = await begun(g, UNARY)
        g.fleet.workers["worker-0"].fail(1, FailureKind.INTERNAL)
        await settle_down()
        g.fleet.workers["worker-1"].token(text="a time")
        g.fleet.workers["worker-1"].finish()
        await client.task
        assert client.json["choices"][0]["message"]["content"] == "Once upon a time"
        assert client.json["usage"]["completion_tokens"] == 3


@in_virtual_time
async def test_text_that_waits_for_the_socket_stays_in_order() -> None:
    async with gateway(workers=2, tenants=RESUMING) as g:
        client = await begun(g)
        client.stall()
        g.fleet.workers["worker-0"].token(text="a ")
        await settle_down()
        g.fleet.workers["worker-0"].token(text="long ")
        g.fleet.lose("worker-0")
        await settle_down()
        g.fleet.workers["worker-1"].token(text="long ")
        g.fleet.workers["worker-1"].token(text="time")
        g.fleet.workers["worker-1"].finish()
        await settle_down()
        client.take_again()
        await client.task
        assert client.text == "Once upon a long long time"


@pytest.mark.parametrize(
    "fields",
    [{"n": 2}, {"logprobs": True}, {"seed": 1}, {"presence_penalty": 1.0}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_cannot_be_exact_ends_with_an_error_event(fields: dict[str, Any]) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(workers=2, tenants=RESUMING) as g:
            client = await begun(g, chat_body(stream=True, max_tokens=8, **fields))
            g.fleet.lose("worker-0")
            await client.task
            assert g.fleet.workers["worker-1"].submitted == []
            assert client.events[-1]["error"]["code"] == "service_unavailable"
            assert client.is_complete

    test()


@in_virtual_time
async def test_token_of_which_nobody_knows_the_id_ends_the_answer() -> None:
    """A backend that gives none, or a frame that broke in the middle."""
    async with gateway(workers=2, tenants=RESUMING) as g:
        client = await begun(g)
        g.fleet.workers["worker-0"].submitted[0]["token_ids"].pop()
        g.fleet.lose("worker-0")
        await client.task
        assert g.fleet.workers["worker-1"].submitted == []
        assert "error" in client.events[-1]


@in_virtual_time
async def test_begun_answer_waits_for_a_worker_to_come_back() -> None:
    async with gateway(tenants=RESUMING) as g:
        client = await begun(g)
        g.fleet.lose("worker-0")
        await asyncio.sleep(20)
        assert not client.task.done()
        worker = g.fleet.join("worker-0")
        await settle_down()
        worker.token(text="a time")
        worker.finish()
        await client.task
        assert client.text == "Once upon a time"
    assert len(g.record.attempts) == 2


@in_virtual_time
async def test_begun_answer_does_not_wait_for_ever() -> None:
    async with gateway(tenants=RESUMING, limits=Limits(first_token_s=10)) as g:
        client = await begun(g)
        await asyncio.sleep(15)
        g.fleet.lose("worker-0")
        await asyncio.sleep(9)
        assert not client.task.done()
        await client.task
        assert client.events[-1]["error"]["code"] == "service_unavailable"
    assert g.record.outcome is Outcome.FAILED
    assert g.record.total_ns == 25_000_000_000


@in_virtual_time
async def test_client_that_leaves_between_two_workers_is_cancelled_once() -> None:
    async with gateway(tenants=RESUMING) as g:
        client = await begun(g)
        g.fleet.lose("worker-0")
        await settle_down()
        client.leave()
        await client.task
        worker = g.fleet.join("worker-0")
        await settle_down()
        assert worker.submitted == []
    assert g.record.outcome is Outcome.CANCELLED


@in_virtual_time
async def test_begun_answer_goes_before_those_that_have_not_begun() -> None:
    async with gateway(workers=2, tenants=RESUMING, max_sequences=1) as g:
        begun_client = await begun(g)
        running, waiting = await g.post(UNARY), await g.post(UNARY)
        g.fleet.lose("worker-0")
        await settle_down()
        other = g.fleet.workers["worker-1"]
        other.token(1)
        other.finish(1)
        await settle_down()
        assert other.submitted[1]["resumed"] == [1, 2]
        for slot in (2, 3):
            other.token(slot)
            other.finish(slot)
            await settle_down()
        await asyncio.gather(begun_client.task, running.task, waiting.task)
        assert waiting.status == 200


@in_virtual_time
async def test_third_worker_may_finish_what_two_have_begun() -> None:
    async with gateway(workers=3, tenants=RESUMING) as g:
        client = await begun(g, STREAM, "1 ")
        g.fleet.lose("worker-0")
        await settle_down()
        g.fleet.workers["worker-1"].token(text="2 ")
        g.fleet.lose("worker-1")
        await settle_down()
        assert g.fleet.workers["worker-2"].submitted[0]["resumed"] == [1, 2]
        g.fleet.workers["worker-2"].token(text="3")
        g.fleet.workers["worker-2"].finish()
        await client.task
        assert client.text == "1 2 3"
    assert [attempt.output_tokens for attempt in g.record.attempts] == [1, 1, 1]


class Chaos:
    """Workers that say numbered words, and are lost, fail and come back at random."""

    WORDS = 6

    def __init__(self, g: Gateway, seed: int) -> None:
        self._g = g
        self._chance = random.Random(seed)

    def act(self) -> None:
        """One random thing."""
        workers = self._g.fleet.workers
        worker = workers[self._chance.choice(sorted(workers))]
        if not worker.is_ready:
            if self._chance.random() < 0.3:
                self._g.fleet.join(worker.name, max_sequences=4)
        elif self._chance.random() < 0.05:
            self._g.fleet.lose(worker.name)
        elif worker.sinks:
            self._serve(worker, self._chance.choice(sorted(worker.sinks)))

    def _serve(self, worker: FakeUpstream, slot: int) -> None:
        said = len(worker.submitted[slot - 1]["token_ids"])
        if self._chance.random() < 0.02:
            worker.fail(slot, FailureKind.INTERNAL)
        elif said == self.WORDS:
            worker.finish(slot)
        else:
            worker.token(slot, text=f"{said} ")

    async def run(self, clients: list[FakeClient]) -> None:
        while not all(client.task.done() for client in clients):
            self.act()
            await settle_down()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_to_workers_no_word_is_lost_or_said_twice(seed: int) -> None:
    """An answer is whole, or says that it is not: that it found no worker to begin on, or no budget."""

    @in_virtual_time
    async def test() -> None:
        limits = Limits(attempts=16, total_s=600, first_token_s=600)
        async with gateway(workers=3, tenants=RESUMING, limits=limits, max_sequences=4) as g:
            clients = [await g.post(chat_body(stream=number % 2 == 0, max_tokens=6)) for number in range(16)]
            await Chaos(g, seed).run(clients)
            for number, client in enumerate(clients):
                text, is_whole = answer_of(client, is_stream=number % 2 == 0)
                assert "0 1 2 3 4 5 ".startswith(text)
                assert is_whole == (text == "0 1 2 3 4 5 ")
            finished = [record for record in g.records if record.outcome is Outcome.FINISHED]
            assert len(finished) > 8
            assert all(record.output_tokens == 6 for record in finished)

    test()


def answer_of(client: FakeClient, *, is_stream: bool) -> tuple[str, bool]:
    """(text, it says that it is whole)."""
    if client.status != 200:
        return "", False
    if is_stream:
        return client.text, client.events[-1] == "[DONE]"
    return client.json["choices"][0]["message"]["content"], True


# ---------------------------------------------------------------- the end of a drain


@in_virtual_time
async def test_what_is_cut_off_is_told_so() -> None:
    """A stream, an answer that is not one, a request that waits, one whose body is not here, and a full socket."""
    async with gateway(max_sequences=3) as g:
        worker = g.fleet.workers["worker-0"]
        stream, unary, stalled, queued = [await g.post(body) for body in (STREAM, UNARY, STREAM, UNARY)]
        sending = g.open()
        for slot in (1, 2, 3):
            worker.token(slot)
        stalled.stall()
        worker.token(3)
        await settle_down()
        started_s = asyncio.get_running_loop().time()
        assert await g.pipeline.drain(5) is False
        assert asyncio.get_running_loop().time() - started_s <= 9
        await asyncio.gather(*(client.task for client in (stream, unary, queued, sending, stalled)))
        assert "shutting down" in stream.events[-1]["error"]["message"]
        assert stream.is_complete
        for client in (unary, queued, sending):
            assert client.status == 503
            assert client.headers["x-tidegate-reject-reason"] == "draining"
    outcomes = [record.outcome for record in g.records]
    assert outcomes.count(Outcome.FAILED) == 3, "the answers that had begun"
    assert len(outcomes) == 5


@in_virtual_time
async def test_hurry_shortens_the_drain() -> None:
    async with gateway() as g:
        client = await begun(g)
        drained = asyncio.ensure_future(g.pipeline.drain(60))
        await asyncio.sleep(1)
        g.pipeline.hurry()
        assert await drained is False
        assert asyncio.get_running_loop().time() < 5
        assert "error" in client.events[-1]
        g.pipeline.hurry()  # and once more is nothing
