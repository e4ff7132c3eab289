"""One request, top to bottom: receive, admit, queue, route, attempt, relay, settle.

Everything that can change a request's outcome is a visible call in `_run`. An expected refusal is a value.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from gateway import admission, retries
from gateway.answers import Answer, error_event, render_error
from gateway.calls import Call, Parser
from gateway.exchange import Beaten, Cut, Event, Exchange, Gone, Lost, Overdue, Unplaceable
from gateway.fleet import Fleet
from gateway.hedge import Race
from gateway.identity import authorization, identify
from gateway.lengths import OutputLengths, PromptLengths, has_fixed_output
from gateway.order import Ticket
from gateway.outlet import Headers, Outlet, Send
from gateway.prefixes import Blocks, cut
from gateway.quota import Grant, Quotas
from gateway.recorder import Recorder
from gateway.run import Run
from gateway.scheduler import Placement, Scheduler
from gateway.settings import Limits
from gateway.tenants import TenantTable
from gateway.terms import Terms, agree, check_model
from gateway.timeline import Timeline
from gateway.wire import WIRE
from protos.core.clock import Clock
from protos.core.contract import ChatPrompt, Failed, FailureKind, Finished
from protos.core.errors import (
    BodyTimeout,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from protos.core.record import Outcome

log = logging.getLogger("tidegate.gateway")

Receive = Callable[[], Awaitable[dict[str, Any]]]
NewAnswer = Callable[..., Answer]
End = Finished | RequestError | Gone

BODY_SECONDS = 30.0
OVERRUN_TOKENS = 32
"""Charged ahead when an answer is longer than was predicted: every token would cost more than relaying it."""
END_SECONDS = 5.0
"""A client whose socket is full gets at least this long to take the end of its answer."""
LAST_SECONDS = 1.0
"""The same, when the gateway stops and has waited long enough."""
CUT_SECONDS = 3.0
"""How long requests that are cut off may take to say so."""


class Endpoint:
    """What differs between the endpoints: how a body is read and an answer is written."""

    def __init__(self, path: str, parse: Parser, new_answer: NewAnswer) -> None:
        self.path = path
        self.parse = parse
        self.new_answer = new_answer


class Pipeline:
    """Runs requests. Owned by the root; all state changes happen on its event loop."""

    def __init__(
        self,
        *,
        limits: Limits,
        tenants: TenantTable,
        scheduler: Scheduler,
        fleet: Fleet,
        recorder: Recorder,
        tasks: asyncio.TaskGroup,
        clock: Clock,
    ) -> None:
        self.is_draining = False
        self.tenants = tenants
        """Replaced as a whole when the configuration is read again."""
        self._quotas = Quotas()
        self._lengths = OutputLengths()
        self._prompts = PromptLengths()
        self._retries = retries.RetryBudget()
        self._limits = limits
        self._scheduler = scheduler
        self._fleet = fleet
        self._recorder = recorder
        self._tasks = tasks
        self._clock = clock
        self._numbers = itertools.count(1)
        self._active: dict[int, Exchange] = {}
        """By their numbers in the scheduler's books."""
        self._became_idle = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_ns = 0
        self._is_cut_off = False
        self._patience: asyncio.Timeout | None = None
        """Of the drain."""
        fleet.on_room = self._place_waiting
        fleet.on_loss = self._fail_unplaceable

    @property
    def active(self) -> int:
        """Requests that have arrived and not settled."""
        return len(self._active)

    def tenants_in_use(self) -> dict[str, dict[str, float]]:
        """For operators: requests under way and weighted tokens served, by tenant."""
        return {
            name: {"running": self._quotas.running(name), "served": self._scheduler.counters.counter(name)}
            for name in self._quotas.tenants()
        }

    async def drain(self, limit_s: float) -> bool:
        """Refuse what comes and wait for what runs; False when that was cut off, after `limit_s` or when hurried."""
        self.is_draining = True
        if await self._idle_within(limit_s):
            return True
        log.warning("%d requests are cut off", len(self._active))
        self._cut_off()
        await self._idle_within(CUT_SECONDS)
        return False

    def hurry(self) -> None:
        """Wait no longer for what drains."""
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())

    async def _idle_within(self, limit_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s) as self._patience:
                while self._active:
                    self._became_idle.clear()
                    await self._became_idle.wait()
        self._patience = None
        return not self._active

    def _cut_off(self) -> None:
        self._is_cut_off = True
        for exchange in self._active.values():
            exchange.cut()

    async def handle(self, endpoint: Endpoint, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One ASGI request of an inference endpoint."""
        clock = self._clock
        exchange = Exchange(
            next(self._numbers),
            endpoint.path,
            identify(scope["headers"]),
            Timeline(clock.mono_ns(), clock.wall_ns()),
            Outlet(send, self._tasks, clock.mono_ns, scope.get(WIRE)),
            keeps_output=self._recorder.keeps_output,
        )
        self._active[exchange.lease] = exchange
        try:
            end = await self._run(exchange, endpoint, receive, scope["headers"])
            await self._conclude(exchange, end)
        except Exception:
            exchange.outcome, exchange.status = Outcome.FAILED, 500
            raise
        finally:
            exchange.close()
            self._settle(exchange)

    async def _run(self, exchange: Exchange, endpoint: Endpoint, receive: Receive, headers: Headers) -> End:
        if self.is_draining:
            return admission.draining()
        tenants = self.tenants
        refusal = self._authenticate(exchange, headers)
        if refusal is not None:
            return refusal
        body = await self._receive(exchange, receive, headers)
        if not isinstance(body, bytes):
            return body
        if self.tenants is not tenants:  # read again while the body came
            refusal = self._authenticate(exchange, headers)
            if refusal is not None:
                return refusal
        exchange.body = body
        call = endpoint.parse(body)
        exchange.timeline.received_ns = self._clock.mono_ns()
        if isinstance(call, RequestError):
            return call
        terms = self._admit(exchange, call, endpoint)
        if isinstance(terms, RequestError):
            return terms
        grant = self._claim(exchange, call)
        if isinstance(grant, RequestError):
            return grant
        self._watch(exchange, receive)
        try:
            return await self._queue_and_attempt(exchange, call, terms)
        finally:
            self._quotas.settle(grant, exchange.tokens, self._clock.mono_ns())

    async def _queue_and_attempt(self, exchange: Exchange, call: Call, terms: Terms) -> End:
        """Wait for a worker and run there; again elsewhere when that fails, from the start or from the last token."""
        if terms.may_resume and retries.is_resumable(call.sampling):
            exchange.token_ids = []
        while True:
            placed = await self._queue(exchange, call, terms)
            if not isinstance(placed, Placement):
                return placed
            end = await self._attempt(exchange, call, terms, placed)
            if not self._may_try_again(exchange, terms, end):
                return _translate(end, call, terms)

    def _may_try_again(self, exchange: Exchange, terms: Terms, end: Event) -> bool:
        if not retries.is_workers_fault(end) or len(exchange.tried) >= self._limits.attempts:
            return False
        if exchange.has_output and not exchange.is_resumable:
            return False
        now_ns = self._clock.mono_ns()
        if _wanted_by_ns(exchange, terms, now_ns) <= now_ns:
            return False
        return self._retries.take(exchange.number, end, len(self._active))

    # -- authenticate

    def _authenticate(self, exchange: Exchange, headers: Headers) -> RequestError | None:
        tenant = self.tenants.authenticate(authorization(headers), exchange.identity.tenant)
        if isinstance(tenant, RequestError):
            return tenant
        exchange.tenant = tenant
        return None

    # -- receive

    async def _receive(self, exchange: Exchange, receive: Receive, headers: Headers) -> bytes | RequestError | Gone:
        """The whole body, within the limits of size and time."""
        limit = self._limits.body_bytes
        if _content_length(headers) > limit:
            return _too_large(limit)
        body = exchange.outlet.take_body()
        if body is not None:
            return body if len(body) <= limit else _too_large(limit)
        try:
            async with asyncio.timeout(BODY_SECONDS) as exchange.patience:
                return await _receive_parts(receive, limit)
        except TimeoutError:
            if self._is_cut_off:
                return admission.draining()
            return BodyTimeout(f"the body did not arrive within {BODY_SECONDS:.0f} s")
        finally:
            exchange.patience = None

    def _watch(self, exchange: Exchange, receive: Receive) -> None:
        """After the body, what the client can still do is leave."""
        outlet = exchange.outlet
        if not outlet.tells_of_leaving:
            exchange.watcher = self._tasks.create_task(_watch(receive, exchange))
        elif outlet.is_left:
            exchange.signal(Gone())
        else:
            outlet.on_left = functools.partial(exchange.signal, Gone())

    # -- admit

    def _admit(self, exchange: Exchange, call: Call, endpoint: Endpoint) -> Terms | RequestError:
        """On which terms the request may wait for a worker, or why it may not."""
        tenant = self.tenants.get(exchange.tenant)
        model = admission.resolve_model(call, self._scheduler)
        if isinstance(model, RequestError):
            return model
        terms = agree(exchange.identity, call, tenant, self.tenants, self._limits)
        if isinstance(terms, RequestError):
            return terms
        exchange.priority = terms.band_name
        exchange.forecast = self._scheduler.forecast(
            model,
            terms.band,
            exchange.tenant,
            self._predict_prompt(model, call),
            self._clock.mono_ns(),
            is_hurried=terms.is_first_token_own,
        )
        refusal = (
            check_model(model, tenant)
            or admission.check_lengths(call, model, self._scheduler, self._limits)
            or admission.check_queue(
                len(exchange.body), model, self._scheduler, self._limits, terms.band, self.tenants.bands[terms.band]
            )
            or admission.check_forecast(exchange.forecast, model, terms, self._scheduler)
        )
        if refusal is not None:
            return refusal
        answer = endpoint.new_answer(
            exchange.identity.request_id,
            model,
            exchange.timeline.arrived_unix_ns // 1_000_000_000,
            wants_usage=call.wants_usage,
        )
        exchange.prepare(call, model, answer)
        return terms

    def _claim(self, exchange: Exchange, call: Call) -> Grant | RequestError:
        """The request's part of its tenant's limits. Last, so that a refused request takes nothing."""
        now_ns = self._clock.mono_ns()
        tokens = self._predict_prompt(exchange.model, call) + self._predict_output(exchange, call)
        tenant = self.tenants.get(exchange.tenant)
        grant = self._quotas.admit(exchange.tenant, tenant, tokens, now_ns, self._clock.wall_ns())
        if isinstance(grant, Grant):
            exchange.timeline.admitted_ns = now_ns
        return grant

    def _predict_prompt(self, model: str, call: Call) -> int:
        known = call.prompt_tokens
        return known if known is not None else self._prompts.predict(model, len(call.prompt_bytes))

    def _predict_output(self, exchange: Exchange, call: Call) -> int:
        sampling = call.sampling
        is_fixed = has_fixed_output(sampling)
        return self._lengths.predict(exchange.tenant, sampling.max_tokens, sampling.n, is_fixed=is_fixed)

    # -- queue

    async def _queue(self, exchange: Exchange, call: Call, terms: Terms) -> Placement | RequestError | Gone:
        self._scheduler.enqueue(self._ticket(exchange, call, terms, exchange.lease))
        self._place_waiting()
        self._arm_expiry()
        if exchange.tried and not exchange.has_output and not self._scheduler.is_served(exchange.model):
            exchange.signal(Unplaceable())
        event: Event | None = None
        try:
            event = await exchange.next_event()
        finally:
            if not isinstance(event, Placement):
                self._scheduler.withdraw(exchange.lease)
                self._place_waiting()
        match event:
            case Placement():
                return event
            case Gone():
                return event
            case Overdue() if exchange.has_output:
                return _lost()
            case Overdue():
                return admission.given_up(terms, exchange.model, self._scheduler)
            case Cut():
                return admission.draining()
            case Unplaceable():
                return admission.no_worker()
            case _:
                raise AssertionError(f"{event} while queued")

    def _ticket(self, exchange: Exchange, call: Call, terms: Terms, number: int) -> Ticket:
        """An answer that has begun goes on before others begin: it is in the top band, and is not shed."""
        is_begun = exchange.has_output
        return Ticket(
            request=number,
            model=exchange.model,
            tenant=exchange.tenant,
            weight=terms.weight,
            band=0 if is_begun else terms.band,
            sequences=call.sampling.n,
            input_tokens=self._predict_prompt(exchange.model, call) + exchange.output_tokens,
            output_tokens=max(1, self._predict_output(exchange, call) - exchange.output_tokens),
            has_fixed_output=has_fixed_output(call.sampling),
            size_bytes=len(exchange.body),
            arrived_ns=exchange.timeline.arrived_ns,
            deadline_ns=_wanted_by_ns(exchange, terms, self._clock.mono_ns()),
            is_sheddable=terms.is_sheddable and not is_begun,
            is_hurried=terms.is_first_token_own,
            forecast=None if exchange.tried else exchange.forecast,
            avoid=exchange.tried,
            blocks=_blocks(call, exchange.model),
            prompt_bytes=len(call.prompt_bytes),
            session=exchange.identity.session,
        )

    def _place_waiting(self) -> None:
        """Hand room to waiting requests; called whenever there may be some of both."""
        now_ns = self._clock.mono_ns()
        decided = self._scheduler.place(now_ns)
        for number in decided.shed:
            self._active[number].signal(Overdue())
        for placement in decided.placed:
            exchange = self._active[placement.ticket.request]
            if not exchange.timeline.dequeued_ns:
                exchange.timeline.dequeued_ns = now_ns
            exchange.signal(placement)

    def _fail_unplaceable(self) -> None:
        """A worker left: requests that only it could have run need not wait for their deadline.

        Answers that have begun do: nobody else can give their clients the rest.
        """
        for number in self._scheduler.unserved():
            exchange = self._active[number]
            if not exchange.has_output:
                self._scheduler.leave(number)
                exchange.signal(Unplaceable())

    def _arm_expiry(self) -> None:
        next_ns = self._scheduler.next_deadline_ns
        if next_ns is None or (self._expiry is not None and self._expiry_ns <= next_ns):
            return
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry_ns = next_ns
        delay_s = max(0.0, (next_ns - self._clock.mono_ns()) / 1e9)
        self._expiry = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        for number in self._scheduler.expire(self._clock.mono_ns()):
            self._active[number].signal(Overdue())
        self._arm_expiry()

    def _note_start(self, exchange: Exchange) -> None:
        """The forecast learns from what has just come true."""
        prompt_tokens, cached_tokens = exchange.prompt_tokens or 0, exchange.cached_tokens or 0
        call = exchange.call
        if call is not None and call.prompt_tokens is None and prompt_tokens and not exchange.carried_tokens:
            self._prompts.learn(exchange.model, len(call.prompt_bytes), prompt_tokens)
        self._scheduler.started(exchange.lease, self._clock.mono_ns(), prompt_tokens, cached_tokens)

    def _charge_overrun(self, exchange: Exchange) -> None:
        """More tokens came than were predicted: the tenant pays for the next ones, a block at a time."""
        exchange.stream.charged_tokens = exchange.output_tokens + OVERRUN_TOKENS
        self._scheduler.overran(exchange.lease, exchange.stream.charged_tokens - exchange.carried_tokens)

    # -- attempt

    async def _attempt(self, exchange: Exchange, call: Call, terms: Terms, placed: Placement) -> Event:
        """Run on one worker until it says how it ended, or until the client or a deadline ends it."""
        now_ns = self._clock.mono_ns()
        if not exchange.timeline.routed_ns:
            exchange.timeline.routed_ns = now_ns
        run = self._submit(exchange, call, placed, now_ns)
        if run is None:
            return Lost("left before the request was sent")
        self._begin(exchange, run)
        timer = _Timeouts(exchange, self._clock, terms)
        hedge = self._hedge_later(exchange, call, terms) if terms.hedge_after_ns else None
        event: Event = Gone()
        try:
            event = await exchange.next_event()
            if isinstance(event, Gone | Overdue | Cut):
                exchange.ended_ns = self._clock.mono_ns()
                _stop(exchange, event)
                await _worker_end(exchange)
        except asyncio.CancelledError:
            if not exchange.is_deaf:
                _stop(exchange, event)
            raise
        finally:
            timer.cancel()
            if hedge is not None:
                hedge.cancel()
            run = exchange.run  # a hedge may have taken its place
            assert run is not None
            self._note_end(exchange, run, event)
            # The lease is held until the worker has let go, so that its books and ours agree.
            self._scheduler.release(run.lease, exchange.output_tokens - exchange.carried_tokens)
            if isinstance(event, Finished):
                self._lengths.learn(exchange.tenant, exchange.output_tokens, call.sampling.n)
            self._place_waiting()
        return event

    def _submit(
        self, exchange: Exchange, call: Call, placed: Placement, now_ns: int, *, is_hedge: bool = False
    ) -> Run | None:
        """Send the request to a worker; None, and no lease, when that has left since it was chosen."""
        exchange.tried += (placed.worker,)
        upstream = self._fleet.upstream(placed.worker)
        if upstream is None:
            self._scheduler.release(placed.ticket.request)
            return None
        slot = upstream.submit(
            exchange,
            request_id=exchange.identity.request_id,
            prompt=call.prompt,
            sampling=call.sampling,
            model=exchange.model,
            traceparent=exchange.identity.traceparent,
            priority=placed.priority,
            step_tokens=placed.step_tokens,
            token_ids=exchange.token_ids,
        )
        return Run(
            worker=placed.worker,
            model=self._fleet.model_of(placed.worker),
            upstream=upstream,
            slot=slot,
            lease=placed.ticket.request,
            began_ns=now_ns,
            cached_tokens=placed.cached_tokens,
            is_hedge=is_hedge,
        )

    def _begin(self, exchange: Exchange, run: Run) -> None:
        """The tokens that come are this run's."""
        if run.lease != exchange.lease:
            del self._active[exchange.lease]
            self._active[run.lease] = exchange
            exchange.lease = run.lease
        exchange.begin_attempt(run)
        exchange.on_started = functools.partial(self._note_start, exchange)
        exchange.on_overrun = functools.partial(self._charge_overrun, exchange)
        exchange.stream.charged_tokens = exchange.carried_tokens + self._scheduler.charged_tokens(run.lease)

    def _note_end(self, exchange: Exchange, run: Run, event: Event) -> None:
        now_ns = self._clock.mono_ns()
        exchange.note_attempt(run, now_ns, _attempt_error(event))
        self._scheduler.attempt_ended(run.worker, retries.verdict(event), now_ns)

    # -- hedge

    def _hedge_later(self, exchange: Exchange, call: Call, terms: Terms) -> asyncio.TimerHandle:
        assert terms.hedge_after_ns is not None
        hedge = functools.partial(self._hedge, exchange, call, terms)
        return asyncio.get_running_loop().call_later(terms.hedge_after_ns / 1e9, hedge)

    def _hedge(self, exchange: Exchange, call: Call, terms: Terms) -> None:
        """The first token is late: ask a second worker too, once, where one has room that nobody waits for."""
        if not exchange.is_silent or exchange.race is not None or len(exchange.tried) >= self._limits.attempts:
            return
        if not self._retries.has_share(exchange.number, len(self._active)):
            return
        ticket = self._ticket(exchange, call, terms, next(self._numbers))
        now_ns = self._clock.mono_ns()
        placement = self._scheduler.place_beside(ticket, now_ns)
        if placement is None:
            return
        run = self._submit(exchange, call, placement, now_ns, is_hedge=True)
        if run is not None:
            self._retries.hold(exchange.number)
            exchange.race = Race(exchange, run, begin=self._begin, end=self._note_end, release=self._release)

    def _release(self, run: Run) -> None:
        """A worker has let go of a run that its request goes on without."""
        self._scheduler.release(run.lease)
        self._place_waiting()

    # -- conclude and settle

    async def _conclude(self, exchange: Exchange, end: End) -> None:
        """Tell the client how it ended, and stamp the end."""
        match end:
            case Finished():
                exchange.outcome = await self._finish(exchange, end) or Outcome.FINISHED
            case Gone():
                exchange.outcome = Outcome.CANCELLED
            case RequestError():
                exchange.error = end
                exchange.outcome = _outcome(end, exchange)
                await self._tell_error(exchange, end)
        if not exchange.ended_ns:
            exchange.ended_ns = self._clock.mono_ns()

    async def _finish(self, exchange: Exchange, finished: Finished) -> Outcome | None:
        """Write the answer's end; returns another outcome where the client did not take it."""
        answer, outlet, call = exchange.answer, exchange.outlet, exchange.call
        assert answer is not None
        assert call is not None
        timing = exchange.timing(self._clock.mono_ns())
        if call.is_stream:
            if not outlet.is_started:
                exchange.start_stream()
            usage = exchange.usage if call.wants_usage else None
            return await self._write_last(exchange, answer.tail(finished.reasons, usage, timing))
        for choice, reason in zip(exchange.choices, finished.reasons, strict=True):
            choice.finish_reason = reason
        exchange.status = 200
        body = answer.whole(exchange.choices, exchange.usage, timing)
        outlet.start(200, [*JSON_HEADERS, *exchange.response_headers(), _length(body)])
        return await self._write_last(exchange, body)

    async def _tell_error(self, exchange: Exchange, error: RequestError) -> None:
        outlet = exchange.outlet
        if outlet.is_started:
            await self._write_last(exchange, error_event(error))
            return
        body = render_error(error)
        exchange.status = error.http_status
        outlet.start(
            error.http_status, [*JSON_HEADERS, *exchange.response_headers(), *_error_headers(error), _length(body)]
        )
        await self._write_last(exchange, body)

    async def _write_last(self, exchange: Exchange, data: bytes) -> Outcome | None:
        """Write the end of the body after what still waits for the socket; returns why the client did not take it."""
        outlet = exchange.outlet
        was_blocked = outlet.is_blocked
        try:
            if was_blocked:
                await self._unblocked(exchange)
            outlet.finish(exchange.take_withheld() + data)
            if outlet.is_blocked:
                was_blocked = True
                await self._unblocked(exchange)
        except TimeoutError:
            exchange.error = exchange.error or DeadlineExceeded("the client did not take its answer in time")
            return Outcome.TIMED_OUT
        return Outcome.CANCELLED if was_blocked and exchange.has_left else None

    async def _unblocked(self, exchange: Exchange) -> None:
        """Wait until the client's socket takes data; raises TimeoutError when the request's time is over."""
        deadline_ns = exchange.timeline.arrived_ns + int(self._limits.total_s * 1e9)
        left_s = (deadline_ns - self._clock.mono_ns()) / 1e9
        limit_s = LAST_SECONDS if self._is_cut_off else max(left_s, END_SECONDS)
        try:
            async with asyncio.timeout(limit_s) as exchange.patience:
                await exchange.outlet.unblocked()
        finally:
            exchange.patience = None

    def _settle(self, exchange: Exchange) -> None:
        if not exchange.ended_ns:  # cancelled by a server that is being stopped
            exchange.ended_ns = self._clock.mono_ns()
        del self._active[exchange.lease]
        self._retries.give_back(exchange.number)
        if not self._active:
            self._became_idle.set()
        self._recorder.settle(exchange)


class _Timeouts:
    """Two deadlines of a running request, one timer."""

    def __init__(self, exchange: Exchange, clock: Clock, terms: Terms) -> None:
        arrived_ns = exchange.timeline.arrived_ns
        self._exchange = exchange
        self._clock = clock
        self._total_ns = arrived_ns + terms.total_ns
        self._arm(arrived_ns + terms.first_token_ns)

    def cancel(self) -> None:
        self._handle.cancel()

    def _arm(self, deadline_ns: int) -> None:
        delay_s = max(0.0, (deadline_ns - self._clock.mono_ns()) / 1e9)
        self._handle = asyncio.get_running_loop().call_later(delay_s, self._fire)

    def _fire(self) -> None:
        if self._exchange.has_output and self._clock.mono_ns() < self._total_ns:
            self._arm(self._total_ns)
        else:
            self._exchange.signal(Overdue(self._exchange.has_output))


JSON_HEADERS: Headers = [(b"content-type", b"application/json")]


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """After the body, the only message that comes is the client's leaving."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.signal(Gone())


def _stop(exchange: Exchange, event: Event) -> None:
    """Cancel what runs of a request."""
    if exchange.race is not None:
        exchange.race.abandon(event)
    exchange.stop_listening()
    assert exchange.run is not None
    exchange.run.cancel()


async def _worker_end(exchange: Exchange) -> None:
    """Wait until the worker has let go of the request: it answers a cancel, or its session is lost, or we stop."""
    while not isinstance(await exchange.next_event(), Finished | Failed | Lost | Cut):
        pass


async def _receive_parts(receive: Receive, limit: int) -> bytes | RequestError | Gone:
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return Gone()
        parts += message["body"]
        if len(parts) > limit:
            return _too_large(limit)
        if not message.get("more_body", False):
            return bytes(parts)


def _blocks(call: Call, model: str) -> Blocks:
    """What the router compares with the workers' caches."""
    template = call.prompt.template_kwargs_json if isinstance(call.prompt, ChatPrompt) else None
    return cut(call.prompt_bytes, model, template)


def _content_length(headers: Headers) -> int:
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body exceeds {limit} bytes")


def _wanted_by_ns(exchange: Exchange, terms: Terms, now_ns: int) -> int:
    """When the next token is worthless; an answer that has begun gives a new worker the time of a first token."""
    arrived_ns = exchange.timeline.arrived_ns
    if not exchange.has_output:
        return arrived_ns + terms.first_token_ns
    return min(arrived_ns + terms.total_ns, now_ns + terms.first_token_ns)


def _translate(end: Event, call: Call, terms: Terms) -> End:
    """An attempt's end as what the client is told."""
    match end:
        case Finished() | Gone():
            return end
        case Overdue(has_output=has_output):
            return _overdue(terms, has_output=has_output)
        case Failed():
            return _failure(end, call)
        case Lost():
            return _lost()
        case Cut():
            return admission.draining()
        case _:
            raise AssertionError(f"{end} ends no attempt")


def _overdue(terms: Terms, *, has_output: bool) -> RequestError:
    """504 is for the gateway's own limits; a shorter deadline is the client's own limit, and hitting it a 429."""
    code = DeadlineExceeded.code
    if has_output:
        kind = Overloaded if terms.is_total_own else DeadlineExceeded
        return kind(f"not finished within {terms.total_ns / 1e9:g} s", code=code, reason="deadline")
    kind = Overloaded if terms.is_first_token_own else DeadlineExceeded
    message = f"no token within {terms.first_token_ns / 1e9:g} s; retry later"
    return kind(message, code=code, reason="deadline", retry_after_s=1.0)


def _lost() -> RequestError:
    return Unavailable("the worker that ran this request was lost; retry", reason="worker_lost", retry_after_s=1.0)


def _failure(failed: Failed, call: Call) -> RequestError:
    param = call.max_tokens_field if failed.param == "max_tokens" else failed.param or None
    match failed.kind:
        case FailureKind.INVALID:
            return InvalidRequest(failed.message, param=param)
        case FailureKind.CONTEXT_EXCEEDED:
            return InvalidRequest(failed.message, param=param, code="context_length_exceeded")
        case FailureKind.UNKNOWN_MODEL:
            return UnknownModel(failed.message, param="model")
        case _:
            log.warning("worker failed a request: %s", failed.message)
            return Unavailable("the worker failed; retry", reason="worker_failed", retry_after_s=1.0)


def _attempt_error(event: Event) -> str | None:
    match event:
        case Finished():
            return None
        case Failed(message=message):
            return message
        case Lost(reason):
            return reason
        case Beaten():
            return "hedged"
        case Overdue():
            return "deadline"
        case Cut():
            return "shutting down"
        case _:
            return "cancelled"


def _outcome(error: RequestError, exchange: Exchange) -> Outcome:
    match error:
        case DeadlineExceeded() | BodyTimeout():
            return Outcome.TIMED_OUT
        case Overloaded(code=DeadlineExceeded.code):
            return Outcome.TIMED_OUT
        case Unavailable(reason="worker_lost" | "worker_failed"):
            return Outcome.FAILED
        case _:
            return Outcome.FAILED if exchange.has_output else Outcome.REJECTED


def _length(body: bytes) -> tuple[bytes, bytes]:
    return (b"content-length", b"%d" % len(body))


def _error_headers(error: RequestError) -> Headers:
    headers: Headers = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if error.reason is not None:
        headers.append((b"x-tidegate-reject-reason", error.reason.encode()))
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    return headers
