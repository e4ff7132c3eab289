"""Workers by the operator's word: list, add, drain and remove them while the gateway serves."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import HttpMethod, Request, Response, Router, delete, post, route
from litestar.params import FromPath

from gateway.calls import checked
from gateway.fleet import Fleet
from gateway.members import check_address
from gateway.scheduler import Scheduler
from gateway.session import WorkerSession
from gateway.shapes import WorkerState
from protos.core.clock import Clock
from protos.core.errors import Forbidden, InvalidRequest


class NewWorker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /admin/workers."""

    address: str
    """HOST:PORT"""


_decode_worker = msgspec.json.Decoder(NewWorker).decode


class UnknownWorker(InvalidRequest):
    """The gateway has no such worker."""

    code = "unknown_worker"
    http_status = 404


def refuse_web_pages(request: Request[Any, Any, Any]) -> None:
    """A page that an operator has open may send requests from the operator's machine: browsers tell whose they are."""
    if request.method not in ("GET", "HEAD", "OPTIONS") and "origin" in request.headers:
        raise Forbidden("origin: web pages may not change the workers", param="origin")


def worker_routes(fleet: Fleet, scheduler: Scheduler, clock: Clock) -> Router:
    """Handlers of /admin/workers; refusals are raised."""

    def state_of(address: str) -> WorkerState:
        if address not in fleet.sessions:
            raise UnknownWorker(f"{address} is no worker of this gateway; see /admin/workers", param="address")
        return _state(fleet.sessions[address], fleet, scheduler, clock.mono_ns())

    @route(http_method=HttpMethod.OPTIONS, status_code=204, sync_to_thread=False)
    def options() -> Response[None]:
        """litestar's own knows the first of several handlers alone."""
        return Response(None, headers={"allow": "GET, HEAD, OPTIONS, POST"})

    @route(http_method=[HttpMethod.GET, HttpMethod.HEAD], status_code=200, sync_to_thread=False)
    def workers() -> list[WorkerState]:
        return worker_states(fleet, scheduler, clock)

    @post()
    async def add(request: Request[Any, Any, Any]) -> WorkerState:
        worker = checked(_decode_worker, await request.body())
        if isinstance(worker, InvalidRequest):
            raise worker
        if refusal := check_address(worker.address):
            raise refusal
        fleet.add(worker.address)
        return state_of(worker.address)

    @post("/{address:str}/drain", status_code=200, sync_to_thread=False)
    def drain(address: FromPath[str]) -> WorkerState:
        state_of(address)
        fleet.drain(address)
        return state_of(address)

    @delete("/{address:str}", status_code=202, sync_to_thread=False)
    def remove(address: FromPath[str]) -> WorkerState:
        state_of(address)
        fleet.remove(address)
        return state_of(address)

    handlers = [options, workers, add, drain, remove]
    return Router("/admin/workers", route_handlers=handlers, before_request=refuse_web_pages)


def worker_states(fleet: Fleet, scheduler: Scheduler, clock: Clock) -> list[WorkerState]:
    now_ns = clock.mono_ns()
    return [_state(session, fleet, scheduler, now_ns) for session in fleet.sessions.values()]


def _state(session: WorkerSession, fleet: Fleet, scheduler: Scheduler, now_ns: int) -> WorkerState:
    address, welcome = session.address, session.welcome
    worker = scheduler.worker(address)
    return WorkerState(
        address=address,
        sources=fleet.members.sources(address),
        state=session.state,
        is_leaving=fleet.is_leaving(address),
        is_drained=fleet.members.is_drained(address),
        name=welcome.worker if welcome else None,
        boot_id=welcome.boot_id if welcome else None,
        model=welcome.model if welcome else None,
        last_error=session.last_error,
        leases=scheduler.ledger.held_by(address).requests,
        sequence_limit=worker.limit.value if worker else None,
        handover_ns=int(worker.forecast.handover_ns) if worker else None,
        load=session.load,
        breaker=worker.breaker.state(now_ns) if worker else None,
        weight=worker.weight(now_ns) if worker else None,
        prefix_bytes=worker.prefixes.held_bytes if worker else None,
        prefix_trust=worker.prefixes.trust if worker else None,
    )
