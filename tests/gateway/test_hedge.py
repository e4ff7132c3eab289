"""A request on two workers: who gets it, and that nothing is left of the other one."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Awaitable, Callable

import pytest

from gateway import retries
from gateway.breaker import FAILURES_IN_A_ROW, Verdict
from gateway.exchange import Beaten
from gateway.order import Ticket
from gateway.retries import RetryBudget
from gateway.scheduler import KEPT_SHARE, Scheduler
from gateway.settings import Limits
from gateway.tenants import DEFAULT_BANDS, Tenant, TenantTable
from protos.core.contract import Failed, FailureKind
from protos.core.record import Attempt, Outcome
from tests.gateway.fakes import (
    FakeClient,
    FakeUpstream,
    Gateway,
    chat_body,
    gateway,
    in_virtual_time,
    model_info,
    price_of,
    settle_down,
)

AFTER_S = 0.1
AFTER_NS = 100_000_000
SECOND_NS = 1_000_000_000
HEDGING = TenantTable(DEFAULT_BANDS, {"anonymous": Tenant(hedge_after_ms=100)})
RESUMING = TenantTable(DEFAULT_BANDS, {"anonymous": Tenant(hedge_after_ms=100, resume=True)})
STREAM = chat_body(stream=True, max_tokens=8)
UNARY = chat_body(max_tokens=8)


# ---------------------------------------------------------------- the deciders


def ticket(request: int, **changes: object) -> Ticket:
    facts: dict[str, object] = {"model": "a", "input_tokens": 10, "output_tokens": 10, "deadline_ns": SECOND_NS}
    return Ticket(request=request, **{**facts, **changes})  # type: ignore[arg-type]


def running_on(*workers: str, slots: int = 2) -> Scheduler:
    """Request 1 runs on the first worker."""
    scheduler = Scheduler()
    for name in workers:
        scheduler.worker_joined(name, model_info(names=("a",), max_sequences=slots))
    scheduler.enqueue(ticket(1))
    (placement,) = scheduler.place(0).placed
    assert placement.worker == workers[0]
    return scheduler


def beside(scheduler: Scheduler, now_ns: int = 0, **changes: object) -> str | None:
    placement = scheduler.place_beside(ticket(100, avoid=("v",), **changes), now_ns)
    return placement.worker if placement is not None else None


def test_hedge_runs_on_a_worker_that_was_not_tried_and_holds_a_lease_of_its_own() -> None:
    scheduler = running_on("v", "w")
    assert beside(scheduler) == "w"
    assert [scheduler.ledger.sequences_on(name) for name in ("v", "w")] == [1, 1]
    scheduler.release(100)
    scheduler.release(1)
    assert len(scheduler.ledger) == 0
    assert all(worker.forecast.unstarted_tokens == 0 for worker in scheduler.workers)


def test_hedge_that_made_no_token_costs_its_tenant_nothing() -> None:
    scheduler = running_on("v", "w")
    before = scheduler.counters.counter("anonymous")
    beside(scheduler)
    scheduler.release(100)
    assert scheduler.counters.counter("anonymous") == before


def test_nothing_is_hedged_on_the_only_worker() -> None:
    assert beside(running_on("v")) is None


def test_nothing_is_hedged_while_somebody_waits() -> None:
    scheduler = running_on("v", "w")
    scheduler.enqueue(ticket(2))
    assert beside(scheduler) is None
    scheduler.leave(2)
    assert beside(scheduler) == "w"


def test_nothing_is_hedged_on_a_full_worker() -> None:
    scheduler = running_on("v", "w", slots=1)
    scheduler.enqueue(ticket(2))
    scheduler.place(0)
    assert beside(scheduler) is None
    scheduler.release(2)
    assert beside(scheduler, sequences=1) == "w"


def test_hedge_leaves_the_sequences_alone_that_are_kept_for_urgent_requests() -> None:
    scheduler = running_on("v", "w", slots=KEPT_SHARE)
    for number in range(2, 2 * KEPT_SHARE):  # of the top band, so that there is company
        scheduler.enqueue(ticket(number, band=0))
    scheduler.place(0)
    assert scheduler.queued == 0
    assert scheduler.ledger.sequences_on("v") + scheduler.ledger.sequences_on("w") == 2 * KEPT_SHARE - 1
    assert beside(scheduler, band=0) is None
    for number in range(2, 2 * KEPT_SHARE):
        scheduler.release(number)
    assert beside(scheduler, band=0) == "w"


@pytest.mark.parametrize("how", ["broken", "leaving", "draining", "another model"])
def test_hedge_goes_to_no_worker_in_doubt(how: str) -> None:
    scheduler = running_on("v", "w")
    worker = scheduler.worker("w")
    assert worker is not None
    match how:
        case "broken":
            for _ in range(FAILURES_IN_A_ROW):
                scheduler.attempt_ended("w", Verdict.FAILURE, 0)
        case "leaving":
            scheduler.worker_leaving("w", is_leaving=True)
        case "draining":
            scheduler.worker_reported("w", worker.load, is_draining=True)
        case _:
            scheduler.worker_left("w")
            scheduler.worker_joined("w", model_info(names=("b",)))
    assert beside(scheduler) is None
    assert beside(scheduler, 10 * SECOND_NS) is None, "nor is it a broken worker's probe"


def test_hedges_and_retries_share_one_budget() -> None:
    budget, fault = RetryBudget(), Failed(slot=1, kind=FailureKind.INTERNAL, message="it broke")
    for request in range(15):
        budget.hold(request)
    taken = [budget.take(request, fault, active=100) for request in range(100, 110)]
    assert taken == [True] * 5 + [False] * 5
    assert not budget.has_share(50, active=100)
    assert budget.has_share(0, active=100), "it has one"
    budget.give_back(0)
    assert budget.has_share(50, active=100)


def test_who_lost_a_race_is_not_blamed_for_it() -> None:
    assert retries.verdict(Beaten()) is Verdict.NEITHER


# ---------------------------------------------------------------- who wins


async def late(g: Gateway, body: bytes = STREAM, **headers: str) -> tuple[FakeClient, FakeUpstream, FakeUpstream]:
    """A client, its first worker that is late, and the one that was asked beside it."""
    client = await g.post(body, **headers)
    first, second = g.fleet.workers["worker-0"], g.fleet.workers["worker-1"]
    assert len(first.sinks) == 1
    first.accept()
    await asyncio.sleep(AFTER_S)
    await settle_down()
    assert len(second.sinks) == 1
    second.accept()
    return client, first, second


@in_virtual_time
async def test_hedge_whose_token_comes_first_answers() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, first, second = await late(g)
        assert second.submitted[0]["prompt"] == first.submitted[0]["prompt"]
        second.token(text="Once ")
        first.token(text="NEVER ")
        assert first.cancelled == [1]
        await settle_down()
        await asyncio.sleep(1)
        second.token(text="upon")
        second.finish(output_tokens=2)
        await client.task
        assert client.text == "Once upon"
        assert client.headers["x-tidegate-worker"] == "worker-1"
        assert second.cancelled == []
    record = g.record
    assert record.outcome is Outcome.FINISHED
    assert record.attempts == (
        Attempt("worker-0", 0, AFTER_NS, "hedged"),
        Attempt("worker-1", AFTER_NS, AFTER_NS + SECOND_NS, None, 2, is_hedge=True),
    )
    assert (record.worker, record.output_tokens, record.prompt_tokens) == ("worker-1", 2, 7)
    assert record.phases.retry == AFTER_NS
    assert record.phases.decode == SECOND_NS


@in_virtual_time
async def test_first_worker_whose_token_comes_first_after_all_answers() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, first, second = await late(g, UNARY)
        await asyncio.sleep(1)
        first.token(text="Once ")
        second.token(text="NEVER ")
        first.token(text="upon")
        assert (first.cancelled, second.cancelled) == ([], [1])
        await settle_down()
        assert not any(worker.forecast.unstarted_tokens for worker in g.scheduler.workers), "its start is noted"
        first.finish(output_tokens=2)
        await client.task
        assert client.json["choices"][0]["message"]["content"] == "Once upon"
        assert client.headers["x-tidegate-worker"] == "worker-0"
    assert [(it.worker, it.error, it.output_tokens, it.is_hedge) for it in g.record.attempts] == [
        ("worker-1", "hedged", 0, True),
        ("worker-0", None, 2, False),
    ]
    assert g.record.phases.retry is None


@in_virtual_time
async def test_answer_without_a_token_wins_too() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, first, second = await late(g)
        second.finish()
        await client.task
        assert client.events[-1] == "[DONE]"
        assert first.cancelled == [1]
    assert g.record.worker == "worker-1"


@in_virtual_time
async def test_token_before_its_start_wins_too() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, first, second = await late(g)
        second.sinks[1].stream.token("Once", 1, 3_600_000_000_000 + AFTER_NS)
        assert first.cancelled == [1]
        second.finish()
        await client.task
        assert client.text == "Once"


@in_virtual_time
async def test_tenant_pays_the_answer_once() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, _, second = await late(g)
        second.token()
        second.finish(output_tokens=1)
        await client.task
    assert g.served == await price_of(STREAM)


@in_virtual_time
async def test_worker_that_hangs_keeps_its_lease_and_not_the_client() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, first, second = await late(g)
        first.answers_cancels = False
        second.token()
        second.finish(output_tokens=1)
        await client.task
        assert client.is_complete
        assert (g.pipeline.active, g.leases) == (0, 1)
        await asyncio.sleep(5)
        g.fleet.lose("worker-0")
        assert g.leases == 0
    assert g.record.total_ns == AFTER_NS


@in_virtual_time
async def test_room_that_a_loser_gives_back_is_given_away() -> None:
    async with gateway(workers=2, tenants=HEDGING, max_sequences=1) as g:
        client, first, second = await late(g)
        first.answers_cancels = False
        second.token()
        waiting = await g.post(UNARY)
        assert g.scheduler.queued == 1
        first.finish(1, "cancelled")
        await settle_down()
        first.token(2)
        for worker, slot in ((first, 2), (second, 1)):
            worker.finish(slot, output_tokens=1)
        await asyncio.gather(client.task, waiting.task)
        assert waiting.headers["x-tidegate-worker"] == "worker-0"


@in_virtual_time
async def test_race_leaves_nothing_for_the_collector() -> None:
    gc.disable()
    try:
        async with gateway(workers=2, tenants=HEDGING) as g:
            client, _, second = await late(g)
            (race,) = [weakref.ref(exchange.race) for exchange in g.pipeline._active.values() if exchange.race]
            second.token()
            second.finish(output_tokens=1)
            await client.task
            await settle_down()
            assert race() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- who fails


def fail(g: Gateway, name: str) -> None:
    g.fleet.workers[name].fail(1, FailureKind.INTERNAL)


def lose(g: Gateway, name: str) -> None:
    g.fleet.lose(name)


@pytest.mark.parametrize("how", [fail, lose])
@pytest.mark.parametrize("number", [0, 1])
def test_other_one_goes_on_when_one_fails(how: Callable[[Gateway, str], None], number: int) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(workers=2, tenants=HEDGING) as g:
            client, *workers = await late(g)
            other = workers[1 - number]
            how(g, f"worker-{number}")
            await settle_down()
            assert g.leases == 1
            other.token(text="saved")
            other.finish(output_tokens=1)
            await client.task
            assert (client.status, client.text) == (200, "saved")
            assert other.cancelled == []
        failed, answered = g.record.attempts
        assert (failed.worker, answered.worker) == (f"worker-{number}", f"worker-{1 - number}")
        assert failed.error not in (None, "hedged")
        assert answered.error is None
        assert [failed.is_hedge, answered.is_hedge] == [number == 1, number == 0]

    test()


@in_virtual_time
async def test_what_the_one_that_goes_on_said_before_counts() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, *_ = await late(g)
        await asyncio.sleep(1)
        second = g.fleet.workers["worker-1"]
        second.answers_cancels = False
        second.accept()
        fail(g, "worker-0")
        await asyncio.sleep(1)
        client.leave()
        await settle_down()
        g.fleet.lose("worker-1")
        await client.task
    assert g.record.phases.retry == AFTER_NS
    assert g.record.phases.dispatch == SECOND_NS


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_request_is_tried_again_when_both_fail(order: tuple[int, int]) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(workers=3, tenants=HEDGING) as g:
            client, *_ = await late(g)
            for number in order:
                fail(g, f"worker-{number}")
            await settle_down()
            third = g.fleet.workers["worker-2"]
            await asyncio.sleep(10 * AFTER_S)
            third.token(text="saved")
            third.finish(output_tokens=1)
            await client.task
            assert (client.status, client.text) == (200, "saved")
        assert [attempt.worker for attempt in g.record.attempts] == [*(f"worker-{n}" for n in order), "worker-2"]

    test()


@in_virtual_time
async def test_hedge_is_one_of_the_attempts_that_a_request_has() -> None:
    async with gateway(workers=3, tenants=HEDGING, limits=Limits(attempts=2)) as g:
        client, *_ = await late(g)
        for name in ("worker-0", "worker-1"):
            fail(g, name)
        await client.task
        assert client.status == 503
        assert g.fleet.workers["worker-2"].submitted == []
    async with gateway(workers=2, tenants=HEDGING, limits=Limits(attempts=1)) as g:
        client = await g.post()
        await asyncio.sleep(10 * AFTER_S)
        assert g.fleet.workers["worker-1"].submitted == []
        g.fleet.workers["worker-0"].finish()
        await client.task


@in_virtual_time
async def test_what_would_fail_anywhere_ends_both() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, first, second = await late(g)
        second.fail(1, FailureKind.INVALID, "no such thing")
        await client.task
        assert client.status == 400
        assert first.cancelled == [1]


@in_virtual_time
async def test_answer_of_a_hedge_is_resumed_while_the_first_worker_still_hangs() -> None:
    async with gateway(workers=3, tenants=RESUMING) as g:
        client, first, second = await late(g)
        first.answers_cancels = False
        second.token(text="Once ")
        first.submitted[0]["token_ids"] = None  # whatever it says now
        g.fleet.lose("worker-1")
        await settle_down()
        third = g.fleet.workers["worker-2"]
        assert third.submitted[0]["resumed"] == [1]
        third.token(text="upon")
        third.finish(output_tokens=1)
        await client.task
        assert client.text == "Once upon"
        assert g.leases == 1
        first.finish(1, "cancelled")
    assert [attempt.worker for attempt in g.record.attempts] == ["worker-0", "worker-1", "worker-2"]


@in_virtual_time
async def test_tokens_of_the_loser_are_not_kept_for_a_resume() -> None:
    async with gateway(workers=2, tenants=RESUMING) as g:
        client, first, second = await late(g)
        first.answers_cancels = False
        second.token(text="Once ")
        first.token(text="NEVER ")
        second.token(text="upon")
        g.fleet.lose("worker-1")
        await settle_down()
        assert first.submitted[1]["resumed"] == [1, 2], "the worker that hangs is better than none"
        first.token(2, text=" a time")
        first.finish(2, output_tokens=1)
        first.finish(1, "cancelled")
        await client.task
        assert client.text == "Once upon a time"


# ---------------------------------------------------------------- when nothing is hedged


async def is_hedged(g: Gateway, seconds: float = 10 * AFTER_S) -> bool:
    """Does a request that worker-0 leaves waiting go to another one, too?"""
    client = await g.post(UNARY)
    await asyncio.sleep(seconds)
    submitted = sum(len(worker.submitted) for worker in g.fleet.workers.values())
    client.leave()
    await client.task
    await settle_down()
    return submitted > 1


@in_virtual_time
async def test_hedging_is_off_by_default() -> None:
    async with gateway(workers=2) as g:
        assert not await is_hedged(g, 20)
    async with gateway(workers=2, tenants=HEDGING) as g:
        assert not await is_hedged(g, 0.9 * AFTER_S)
        assert await is_hedged(g)


@in_virtual_time
async def test_tenants_that_are_read_again_hedge_from_their_next_request_on() -> None:
    async with gateway(workers=2) as g:
        assert not await is_hedged(g)
        g.pipeline.tenants = HEDGING
        assert await is_hedged(g)


@in_virtual_time
async def test_single_worker_has_no_hedge() -> None:
    async with gateway(tenants=HEDGING) as g:
        assert not await is_hedged(g)


@in_virtual_time
async def test_request_is_hedged_once() -> None:
    async with gateway(workers=4, tenants=HEDGING, limits=Limits(attempts=9)) as g:
        client, *_ = await late(g)
        await asyncio.sleep(10 * AFTER_S)
        fail(g, "worker-0")
        fail(g, "worker-1")
        await asyncio.sleep(10 * AFTER_S)
        submitted = [len(worker.submitted) for worker in g.fleet.workers.values()]
        assert sorted(submitted) == [0, 1, 1, 1]
        client.leave()
        await client.task


@in_virtual_time
async def test_answer_that_has_begun_is_not_hedged_however_slow() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client = await g.post()
        first = g.fleet.workers["worker-0"]
        first.token()
        await asyncio.sleep(10)
        first.finish(output_tokens=1)
        await client.task
        assert g.fleet.workers["worker-1"].submitted == []
    assert len(g.record.attempts) == 1


@in_virtual_time
async def test_nothing_is_hedged_while_requests_wait() -> None:
    """The second worker has room for one that is not there yet, but the queue's head wants two sequences."""
    async with gateway(workers=2, tenants=HEDGING, max_sequences=2) as g:
        clients = [await g.post(chat_body(max_tokens=8, n=n)) for n in (1, 1, 2)]
        assert g.scheduler.queued == 1
        await asyncio.sleep(10 * AFTER_S)
        assert [len(worker.submitted) for worker in g.fleet.workers.values()] == [1, 1]
        for client in clients:
            client.leave()
            await client.task


@in_virtual_time
async def test_hedges_are_bounded_by_the_retry_budget() -> None:
    async with gateway(workers=2, tenants=HEDGING, max_sequences=64) as g:
        clients = [await g.post(UNARY) for _ in range(40)]
        await asyncio.sleep(10 * AFTER_S)
        submitted = sum(len(worker.submitted) for worker in g.fleet.workers.values())
        assert submitted == 48, "20% of 40"
        for worker in g.fleet.workers.values():
            for slot in list(worker.sinks):
                worker.token(slot)
        await settle_down()
        for worker in g.fleet.workers.values():
            for slot in list(worker.sinks):
                worker.finish(slot, output_tokens=1)
        await asyncio.gather(*(client.task for client in clients))
        assert {client.status for client in clients} == {200}
        assert await is_hedged(g), "the budget is given back"


# ---------------------------------------------------------------- how it ends otherwise


async def client_leaves(g: Gateway, client: FakeClient) -> None:
    client.leave()


async def deadline_passes(g: Gateway, client: FakeClient) -> None:
    await asyncio.sleep(5)


async def gateway_is_stopped(g: Gateway, client: FakeClient) -> None:
    await g.pipeline.drain(1)


@pytest.mark.parametrize(
    ("end", "error", "outcome"),
    [
        (client_leaves, "cancelled", Outcome.CANCELLED),
        (deadline_passes, "deadline", Outcome.TIMED_OUT),
        (gateway_is_stopped, "shutting down", Outcome.REJECTED),
    ],
)
@pytest.mark.parametrize("is_decided", [False, True])
def test_both_are_cancelled(
    end: Callable[[Gateway, FakeClient], Awaitable[None]], error: str, outcome: Outcome, is_decided: bool
) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(workers=2, tenants=HEDGING, limits=Limits(first_token_s=3, total_s=4)) as g:
            client, first, second = await late(g)
            if is_decided:
                second.token()
            await end(g, client)
            await client.task
            await settle_down()
            assert (first.cancelled, second.cancelled) == ([1], [1])
            assert g.leases == 0
        errors = {attempt.worker: attempt.error for attempt in g.record.attempts}
        assert errors == {"worker-0": "hedged" if is_decided else error, "worker-1": error}
        if not is_decided:
            assert g.record.outcome is outcome

    test()


@in_virtual_time
async def test_client_that_left_is_forgotten_when_its_own_worker_has_let_go() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client, _, second = await late(g)
        second.answers_cancels = False
        client.leave()
        await client.task
        assert (g.pipeline.active, g.leases) == (0, 1)
        second.finish(1, "cancelled")


@in_virtual_time
async def test_client_that_leaves_before_the_hedge_is_due_is_not_hedged() -> None:
    async with gateway(workers=2, tenants=HEDGING) as g:
        client = await g.post()
        first = g.fleet.workers["worker-0"]
        first.answers_cancels = False
        client.leave()
        await asyncio.sleep(10 * AFTER_S)
        first.finish(1, "cancelled")
        await client.task
        assert g.fleet.workers["worker-1"].submitted == []


@in_virtual_time
async def test_failure_in_the_moment_in_which_the_hedge_is_due_is_a_retry() -> None:
    """Both timers are due in one pass of the loop, so that the failure still waits for the request's task."""
    async with gateway(workers=3, tenants=HEDGING) as g:
        client = await g.post()
        asyncio.get_running_loop().call_later(AFTER_S - 5e-10, fail, g, "worker-0")
        await asyncio.sleep(AFTER_S)
        await settle_down()
        submitted = [len(worker.submitted) for worker in g.fleet.workers.values()]
        assert sorted(submitted) == [0, 1, 1]
        client.leave()
        await client.task
    assert not any(attempt.is_hedge for attempt in g.record.attempts)


# ---------------------------------------------------------------- anything, in any order


class Chaos:
    """Workers that say numbered words, one of them slowly, let go late, fail, are lost and come back."""

    WORDS = 6

    def __init__(self, g: Gateway, seed: int) -> None:
        self._g = g
        self._chance = random.Random(seed)

    async def run(self, clients: list[FakeClient]) -> None:
        while not all(client.task.done() for client in clients):
            self._act()
            await settle_down()
            await asyncio.sleep(0.01)

    def _act(self) -> None:
        workers, chance = self._g.fleet.workers, self._chance.random
        (name,) = self._chance.choices(sorted(workers), (1, 10, 10))
        worker = workers[name]
        if not worker.is_ready:
            if chance() < 0.3:
                self._g.fleet.join(worker.name, max_sequences=16)
        elif chance() < 0.03:
            self._g.fleet.lose(worker.name)
        elif worker.sinks:
            self._serve(worker, self._chance.choice(sorted(worker.sinks)))

    def _serve(self, worker: FakeUpstream, slot: int) -> None:
        worker.answers_cancels = False
        if slot in worker.cancelled:
            if self._chance.random() < 0.2:
                worker.finish(slot, "cancelled")
            return
        said = len(worker.submitted[slot - 1]["token_ids"] or ())
        if self._chance.random() < 0.02:
            worker.fail(slot, FailureKind.INTERNAL)
        elif said == self.WORDS:
            worker.finish(slot)
        else:
            worker.token(slot, text=f"{said} ")

    def let_go(self) -> None:
        for worker in self._g.fleet.workers.values():
            for slot in list(worker.sinks):
                assert slot in worker.cancelled
                worker.finish(slot, "cancelled")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_no_word_is_said_twice_and_no_lease_is_lost(seed: int) -> None:
    @in_virtual_time
    async def test() -> None:
        limits = Limits(attempts=16, total_s=600, first_token_s=600)
        async with gateway(workers=3, tenants=RESUMING, limits=limits, max_sequences=16) as g:
            clients = [await g.post(chat_body(stream=True, max_tokens=6)) for _ in range(16)]
            chaos = Chaos(g, seed)
            await chaos.run(clients)
            chaos.let_go()
            whole = [client for client in clients if client.status == 200 and client.events[-1] == "[DONE]"]
            assert len(whole) > 8
            assert {client.text for client in whole} == {"0 1 2 3 4 5 "}
            for client in clients:
                assert client.status != 200 or "0 1 2 3 4 5 ".startswith(client.text)
            attempts = [attempt for record in g.records for attempt in record.attempts]
            assert any(attempt.is_hedge and attempt.output_tokens for attempt in attempts), "one won"
            assert any(attempt.error == "hedged" for attempt in attempts)

    test()
