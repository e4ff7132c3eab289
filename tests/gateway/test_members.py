"""Workers that join and leave: who names them, names in DNS, and sessions that open and close."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from gateway import dns
from gateway.fleet import Fleet
from gateway.members import CONFIGURATION, Members, Sightings, read_workers
from gateway.order import Ticket
from gateway.scheduler import Scheduler
from protos.core.clock import SYSTEM_CLOCK
from protos.core.contract import Sampling, Submit, TextPrompt
from protos.core.errors import ConfigError
from tests.gateway.fakes import MODEL, FakeSink, ScriptedSession, in_virtual_time, scripted_worker

# ---------------------------------------------------------------- who names them


def test_workers_are_addresses_and_names() -> None:
    workers = read_workers(["gpu-1:9101", "dns://tidegate-worker:9101", "[::1]:9101", "gpu-1:9101"])
    assert workers.addresses == ("gpu-1:9101", "[::1]:9101")
    assert workers.names == ("tidegate-worker:9101",)


@pytest.mark.parametrize("entry", ["gpu", "gpu:", ":9101", "gpu:0", "gpu:70000", "http://gpu:9101", "a b:1", ""])
def test_what_is_no_worker_is_named(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.workers: "):
        read_workers([entry])


def test_worker_stays_while_anybody_names_it() -> None:
    members = Members()
    members.name(CONFIGURATION, ["a:1", "b:1"])
    members.name("dns://x:1", ["b:1", "c:1"])
    assert members.wanted == ["a:1", "b:1", "c:1"]
    assert members.sources("b:1") == [CONFIGURATION, "dns://x:1"]
    assert not members.name(CONFIGURATION, ["a:1", "b:1"]), "no news"
    assert members.name(CONFIGURATION, ["a:1"])
    assert members.wanted == ["a:1", "b:1", "c:1"]
    members.silence("dns://x:1")
    assert members.wanted == ["a:1"]


def test_operators_word_stands_until_it_is_taken_back() -> None:
    members = Members()
    members.name(CONFIGURATION, ["a:1"])
    members.add("b:1")
    members.remove("a:1")
    members.name(CONFIGURATION, ["a:1", "c:1"])
    assert members.wanted == ["c:1", "b:1"]
    members.add("a:1")
    members.remove("b:1")
    assert members.wanted == ["a:1", "c:1"]


def test_address_that_is_absent_from_one_answer_stays() -> None:
    sightings = Sightings()
    assert sightings.answered(["a:1", "b:1"]) == ["a:1", "b:1"]
    assert sightings.answered(["a:1"]) == ["a:1", "b:1"]
    assert sightings.answered(["a:1", "b:1"]) == ["a:1", "b:1"]
    assert sightings.answered(["a:1"]) == ["a:1", "b:1"]
    assert sightings.answered(["a:1"]) == ["a:1"]


@in_virtual_time
async def test_failing_resolver_changes_nothing() -> None:
    answers = iter([["a:1"], OSError("no such host"), None, ["a:1", "b:1"], ["b:1"], ["b:1"]])
    told: list[list[str]] = []

    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == ("workers.svc", 9101)
        answer = next(answers)
        if answer is None:
            await asyncio.sleep(3_600)
        if not isinstance(answer, list):
            raise answer or AssertionError
        return answer

    with contextlib.suppress(RuntimeError):  # no more answers
        await dns.watch("workers.svc:9101", told.append, resolve)
    assert told == [["a:1"], ["a:1", "b:1"], ["a:1", "b:1"], ["b:1"]]


async def test_names_of_this_machine_are_resolved() -> None:
    assert "127.0.0.1:9101" in await dns.resolve("localhost", 9101)


# ---------------------------------------------------------------- sessions


@contextlib.asynccontextmanager
async def fleet_of(*workers: str, resolve: dns.Resolve = dns.resolve) -> AsyncIterator[tuple[Fleet, Scheduler]]:
    scheduler = Scheduler()
    fleet = Fleet(workers, gateway="g", version="0", clock=SYSTEM_CLOCK, scheduler=scheduler, resolve=resolve)
    running = asyncio.ensure_future(fleet.run())
    try:
        yield fleet, scheduler
    finally:
        running.cancel()
        await asyncio.wait([running])


async def eventually(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_true():  # noqa: ASYNC110 a real worker, which has no event for it
            await asyncio.sleep(0.01)


async def until(fleet: Fleet, ready: set[str]) -> None:
    """Until these workers, and no others, are there and ready."""
    await eventually(
        lambda: {address for address in fleet.sessions if fleet.upstream(address)} == ready == fleet.sessions.keys()
    )


def place(scheduler: Scheduler, request: int) -> str | None:
    scheduler.enqueue(Ticket(request=request, model=MODEL, deadline_ns=10**18))
    placed = scheduler.place(SYSTEM_CLOCK.mono_ns()).placed
    return placed[0].worker if placed else None


async def test_worker_joins_a_running_gateway() -> None:
    async with scripted_worker() as first, scripted_worker() as second, fleet_of(first.address) as (fleet, scheduler):
        await until(fleet, {first.address})
        fleet.add(second.address)
        await until(fleet, {first.address, second.address})
        assert {place(scheduler, 1), place(scheduler, 2)} == {first.address, second.address}
        for request in (1, 2):
            scheduler.release(request)


async def test_leaving_worker_gets_no_more_and_ends_what_it_has() -> None:
    async def script(session: ScriptedSession, submit: Submit) -> None:
        await session.start(submit.slot, "a ")

    async with scripted_worker(script) as worker, fleet_of(worker.address) as (fleet, scheduler):
        await until(fleet, {worker.address})
        assert place(scheduler, 1) == worker.address
        sink = FakeSink()
        slot = fleet.sessions[worker.address].submit(
            sink, request_id="1", prompt=TextPrompt("hi"), sampling=Sampling(), model=MODEL, traceparent=""
        )
        await worker.sessions[0].until(lambda: bool(worker.sessions[0].submits))
        fleet.remove(worker.address)
        assert fleet.is_leaving(worker.address)
        assert place(scheduler, 2) is None
        assert not scheduler.is_served(MODEL)
        await worker.sessions[0].finish(slot)
        await sink.ended.wait()
        assert sink.ends == ["finished"]
        assert worker.address in fleet.sessions, "its lease is still held"
        scheduler.release(1)
        await until(fleet, set())
        assert scheduler.workers == []
        assert scheduler.was_served(MODEL)


async def test_leaving_worker_that_is_wanted_again_stays() -> None:
    async with scripted_worker() as worker, fleet_of(worker.address) as (fleet, scheduler):
        await until(fleet, {worker.address})
        place(scheduler, 1)
        fleet.remove(worker.address)
        fleet.add(worker.address)
        assert not fleet.is_leaving(worker.address)
        assert place(scheduler, 2) == worker.address
        assert len(worker.sessions) == 1
        for request in (1, 2):
            scheduler.release(request)


async def test_removed_worker_can_come_back_at_once() -> None:
    async with scripted_worker() as worker, fleet_of(worker.address) as (fleet, scheduler):
        await until(fleet, {worker.address})
        fleet.remove(worker.address)
        await asyncio.sleep(0)
        fleet.add(worker.address)
        await eventually(lambda: len(worker.sessions) == 2)
        await until(fleet, {worker.address})
        assert place(scheduler, 1) == worker.address
        scheduler.release(1)


async def test_drained_worker_stays_connected_without_requests() -> None:
    async with scripted_worker() as worker, fleet_of(worker.address) as (fleet, scheduler):
        await until(fleet, {worker.address})
        fleet.drain(worker.address)
        assert place(scheduler, 1) is None
        assert scheduler.unserved() == [1]
        worker.sessions[0].close()
        await eventually(lambda: len(worker.sessions) == 2)
        await until(fleet, {worker.address})
        assert scheduler.place(SYSTEM_CLOCK.mono_ns()).placed == [], "also when it has reconnected"
        fleet.add(worker.address)
        assert scheduler.place(SYSTEM_CLOCK.mono_ns()).placed[0].worker == worker.address
        scheduler.release(1)


async def test_configuration_and_names_bring_workers_and_take_them_away() -> None:
    async with scripted_worker() as static, scripted_worker() as named:

        async def resolve(host: str, port: int) -> list[str]:
            return [named.address]

        async with fleet_of(static.address, resolve=resolve) as (fleet, _):
            await until(fleet, {static.address})
            fleet.configure(read_workers([static.address, "dns://workers:1"]))
            await until(fleet, {static.address, named.address})
            assert fleet.members.sources(named.address) == ["dns://workers:1"]
            fleet.configure(read_workers([static.address]))
            await until(fleet, {static.address})
