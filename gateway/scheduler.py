"""Who runs when and where: a pure decider over the queues, the ledger and the router.

It holds no sockets and no clock. Every method changes state at once and returns what the caller must do; requests are
known by number. Each model has its own queue, so that a request that cannot be placed does not hold up other models;
models that share workers take turns. What it keeps of a request can hold nothing that holds it, so that the garbage
collector need not look at it (`gc=False`).
"""

from __future__ import annotations

import collections
import heapq

import msgspec

from gateway import router, turn
from gateway.breaker import Breaker, Verdict
from gateway.fairness import RecentService, ServiceCounters
from gateway.forecast import EngineForecast, Forecast, QueueForecast
from gateway.ledger import Lease, Ledger
from gateway.limiter import SequenceLimit
from gateway.order import FairQueue, Ticket, Work
from gateway.pace import Pace
from gateway.prefixes import PrefixIndex
from gateway.router import Route, Worker
from protos.core.contract import Load, ModelInfo

KEPT_SHARE = 8
"""One in so many of a worker's sequences is kept for urgent requests while there is company."""
NOTHING_KEPT = 1 << 62
"""In place of that share, where nobody else is expected: more than any worker has."""
COMPANY_NS = 300_000_000_000
"""So long after somebody came for whom others have to make way, more are expected."""
TELLING_SHARE = 0.2
"""A smaller part of a prompt, found in a cache or not, is lost in its last block and in the chat template."""


class Placement(msgspec.Struct, frozen=True, gc=False):
    ticket: Ticket
    worker: str
    cached_tokens: int = 0
    """Of the prompt, expected in the worker's prefix cache."""
    priority: int = 0
    """For the engine."""
    step_tokens: int = 0
    """`Submit.step_tokens`."""


class Placements(msgspec.Struct):
    """What `place` decided: who runs where, and who would be too late wherever it ran and has left the queue."""

    placed: list[Placement] = []
    shed: list[int] = []


class Running(msgspec.Struct, gc=False):
    """A placed request: its account with its tenant, and its prefill until the first token."""

    ticket: Ticket
    worker: Worker
    placed_ns: int
    raw_ns: int | None
    """Forecast of the time from here to its first token."""
    charged_tokens: int
    """Output tokens charged so far: what was predicted, then what came."""
    matched_share: float = 0.0
    """How much of its prompt the index said that the worker has cached."""

    def learn_cached(self, actual_share: float) -> None:
        """Compare what the worker had of the prompt with what its index said."""
        if self.matched_share > TELLING_SHARE:
            self.worker.prefixes.learn(self.matched_share, actual_share)


class Memory(msgspec.Struct):
    """What outlives a worker's session: a lost connection is not a new worker."""

    boot_id: str
    prefixes: PrefixIndex
    breaker: Breaker


class Depth(msgspec.Struct, frozen=True):
    """How much of one tenant waits in one band of one model."""

    model: str
    band: int
    tenant: str
    requests: int
    oldest_ns: int
    """Arrival of the oldest."""


class Scheduler:
    """One per gateway; all calls come from its event loop."""

    def __init__(self, token_target_ns: int | None = None) -> None:
        """`token_target_ns` is the time per token that running answers keep; see `gateway.pace`."""
        self._token_target_ns = token_target_ns
        self.ledger = Ledger()
        self.counters = ServiceCounters()
        self.recent = RecentService()
        self.choose: router.Choose = router.choose
        """The policy; benchmarks compare others with it."""
        self._workers: dict[str, Worker] = {}
        self._queues: dict[str, FairQueue] = {}
        self._queued: dict[int, Ticket] = {}
        self._queued_bytes = 0
        self._band_requests: collections.Counter[int] = collections.Counter()
        self._deadlines: list[tuple[int, int]] = []
        self._running: dict[int, Running] = {}
        self._forecasts: dict[str, QueueForecast] = {}
        self._serving: dict[str, list[Worker]] = {}
        """Who serves each model that was ever served, without those that are to leave."""
        self._memories: dict[str, Memory] = {}
        self._last_tenant: str | None = None
        self._company_ns = -COMPANY_NS
        """When a request of the top band last came, or of another tenant than the one before."""
        self._upper_ns = -COMPANY_NS
        """When a request of the first two bands last came: prompts of the lower ones yield to them."""

    # -- queue

    @property
    def queued(self) -> int:
        return len(self._queued)

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def queued_in(self, band: int) -> int:
        """Waiting requests that arrived in a band."""
        return self._band_requests[band]

    def forecast(
        self, model: str, band: int, tenant: str, input_tokens: int, now_ns: int, *, is_hurried: bool = False
    ) -> Forecast | None:
        """When a new request would see its first token; None while there is nothing to tell it from."""
        history = self._history(model)
        queue = self._queues.get(model)
        is_urgent = self._is_urgent(band, tenant, input_tokens)
        priority = 0 if is_urgent else self._priority(band, tenant, is_hurried, now_ns)
        is_next = is_urgent or not queue
        is_queued = not is_next or not self._takers(model, is_urgent, priority, input_tokens, now_ns)
        if is_queued:
            work = queue.ahead(band, tenant) if queue is not None else Work()
            raw_ns = self._queued_ns(model, input_tokens, priority, work, now_ns)
        else:
            raw_ns = self._engine_ns(model, input_tokens, priority, now_ns)
        return None if raw_ns is None else history.correct(raw_ns, now_ns, is_queued=is_queued)

    def _queued_ns(self, model: str, tokens: int, priority: int, ahead: Work, now_ns: int) -> int | None:
        """Time to first token of one that waits, where it would be soonest; each worker has a share of the others."""
        workers, slots = [], 0
        for worker in self._serving.get(model, ()):
            if worker.is_open:
                workers.append(worker)
                slots += worker.model.max_sequences
        soonest_ns = None
        for worker in workers:
            own_ns = worker.forecast.after_step_ns(tokens, priority)
            if own_ns is None:
                continue
            wait_ns = turn.wait_ns(worker, ahead, worker.model.max_sequences / slots, priority, now_ns)
            if wait_ns is not None and (soonest_ns is None or wait_ns + own_ns < soonest_ns):
                soonest_ns = int(wait_ns) + own_ns
        return soonest_ns

    def _engine_ns(self, model: str, tokens: int, priority: int, now_ns: int) -> int | None:
        """Time to first token on the worker that would be soonest."""
        soonest_ns = None
        for worker in self._serving.get(model, ()):
            raw_ns = worker.forecast.raw_ns(tokens, now_ns, priority)
            if raw_ns is not None and (soonest_ns is None or raw_ns < soonest_ns):
                soonest_ns = raw_ns
        return soonest_ns

    def _history(self, model: str) -> QueueForecast:
        history = self._forecasts.get(model)
        if history is None:
            history = self._forecasts[model] = QueueForecast()
        return history

    def drain_ns(self, model: str) -> float | None:
        """Time from one placement to the next while requests wait; None while it is not known."""
        return self._history(model).interval_ns()

    def waiting(self, model: str) -> int:
        """Requests that wait for one model."""
        queue = self._queues.get(model)
        return len(queue) if queue is not None else 0

    def depths(self) -> list[Depth]:
        return [
            Depth(model, band, tenant, requests, oldest_ns)
            for model, queue in self._queues.items()
            for (band, tenant), (requests, oldest_ns) in queue.depths().items()
        ]

    def enqueue(self, ticket: Ticket) -> None:
        """A retry comes back with its first arrival and deadline, so it stands where it stood."""
        assert ticket.request not in self._queued, f"request {ticket.request} is already queued"
        queue = self._queues.get(ticket.model)
        if queue is None:
            queue = self._queues[ticket.model] = FairQueue(self.counters)
        queue.push(ticket)
        self._queued[ticket.request] = ticket
        self._queued_bytes += ticket.size_bytes
        self._band_requests[ticket.band] += 1
        self._note_company(ticket)
        heapq.heappush(self._deadlines, (ticket.deadline_ns, ticket.request))

    def leave(self, request: int) -> bool:
        """Take a request out of the queue; False when it is not in it."""
        ticket = self._queued.pop(request, None)
        if ticket is None:
            return False
        self._queued_bytes -= ticket.size_bytes
        self._band_requests[ticket.band] -= 1
        self._queues[ticket.model].remove(request)
        return True

    def expire(self, now_ns: int) -> list[int]:
        """Requests whose deadline has passed; they have left the queue."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            deadline_ns, request = heapq.heappop(self._deadlines)
            ticket = self._queued.get(request)
            if ticket is not None and ticket.deadline_ns == deadline_ns:
                self.leave(request)
                self._learn_end(ticket, now_ns)
                expired.append(request)
        return expired

    @property
    def next_deadline_ns(self) -> int | None:
        """When `expire` has something to do; entries of requests that left are dropped on the way."""
        while self._deadlines and self._deadlines[0][1] not in self._queued:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    # -- placement

    def place(self, now_ns: int) -> Placements:
        """Bind waiting requests to workers with room, in order; each placement holds a lease."""
        decided = Placements([], [])
        turns = collections.deque(self._queues if self._queued else ())
        while turns:
            model = turns.popleft()
            ticket = self._queues[model].head(now_ns)
            if ticket is None:
                continue
            is_urgent = self._is_urgent(ticket.band, ticket.tenant, ticket.input_tokens, ticket.output_tokens)
            priority = 0 if is_urgent else self._priority(ticket.band, ticket.tenant, ticket.is_hurried, now_ns)
            takers = self._takers(model, is_urgent, priority, ticket.input_tokens, now_ns)
            route = self._route(ticket, takers, is_urgent, priority, now_ns) if takers else None
            if route is None:
                continue
            turns.append(model)
            own_tokens, waited_ns = ticket.input_tokens - route.cached_tokens, now_ns - ticket.arrived_ns
            raw_ns = route.worker.forecast.raw_ns(own_tokens, now_ns, priority, waited_ns)
            if self._is_too_late(ticket, route.worker, raw_ns, now_ns):
                self.leave(ticket.request)
                self._learn_end(ticket, now_ns)
                decided.shed.append(ticket.request)
                continue
            decided.placed.append(self._bind(ticket, route, raw_ns, priority, now_ns))
            self._queues[model] = self._queues.pop(model)  # behind the other models of its workers
        return decided

    def _route(self, ticket: Ticket, takers: list[Worker], is_urgent: bool, priority: int, now_ns: int) -> Route | None:
        """Where it goes, of who may take it; whether one is to be left alone is a question about all of them."""
        route = self.choose(takers, ticket, is_urgent, priority, now_ns)
        if route is None or not route.worker.is_in_doubt(now_ns):
            return route
        left_out = router.left_out(self._serving[ticket.model], now_ns)
        takers = [worker for worker in takers if worker.name not in left_out]
        return self.choose(takers, ticket, is_urgent, priority, now_ns)

    def place_beside(self, ticket: Ticket, now_ns: int) -> Placement | None:
        """Bind a hedge, under a number of its own, to a worker not tried and not in doubt that has room for anybody.

        None where there is no such worker, or somebody waits: what is left of the workers is not for hedges then.
        """
        if self.waiting(ticket.model):
            return None
        priority = self._priority(ticket.band, ticket.tenant, ticket.is_hurried, now_ns)
        takers = [
            worker
            for worker in self._takers(ticket.model, False, priority, ticket.input_tokens, now_ns)
            if worker.name not in ticket.avoid
            and worker.breaker.state(now_ns) == "closed"
            and not worker.is_in_doubt(now_ns)
        ]
        route = self.choose(takers, ticket, False, priority, now_ns)
        if route is None:
            return None
        raw_ns = route.worker.forecast.raw_ns(ticket.input_tokens - route.cached_tokens, now_ns, priority)
        return self._bind(ticket, route, raw_ns, priority, now_ns)

    def _note_company(self, ticket: Ticket) -> None:
        if ticket.is_paid:
            return  # a retry is nobody new
        band, tenant, last = ticket.band, ticket.tenant, self._last_tenant
        if band == 0 or (tenant != last and last is not None):
            self._company_ns = ticket.arrived_ns
        if band <= 1:
            self._upper_ns = ticket.arrived_ns
        self._last_tenant = tenant

    def _has_company(self, now_ns: int) -> bool:
        """May requests come for which others have to make way? One tenant alone has its workers for itself."""
        return now_ns - self._company_ns < COMPANY_NS

    def _is_urgent(self, band: int, tenant: str, input_tokens: int, output_tokens: int = 0) -> bool:
        """The top band is, and so is the next one where its tenant has had less than its share.

        Urgent requests get the sequences that workers keep free, do not wait for the pace of the answers, and go first
        in the engine.
        """
        return band == 0 or (band == 1 and self.counters.is_owed(tenant, input_tokens, output_tokens))

    def _priority(self, band: int, tenant: str, is_hurried: bool, now_ns: int) -> int:
        """For the engine, of a request that is not urgent: 0 is computed whole, others make way for it.

        Those of the lower bands do while requests of the first two come, and those of the second where their tenant has
        had much more than others, unless they have to be in time themselves. Where answers have a pace to keep, nobody
        but who is urgent is computed whole, and all of these numbers are one higher.
        """
        if band == 1:
            makes_way = int(not is_hurried and self.recent.is_loud(tenant))
        else:
            makes_way = band if now_ns - self._upper_ns < COMPANY_NS else 0
        return makes_way if self._token_target_ns is None else makes_way + 1

    def _takers(self, model: str, is_urgent: bool, priority: int, tokens: int, now_ns: int) -> list[Worker]:
        """Who serves it and has room. Where a request is not urgent, room is kept, and what cannot start soon waits.

        Where there is no pace to keep, one worker that may start it is enough: it goes where it adds the least delay
        though it waits there, for what it needs may be cached nowhere else.
        """
        workers = self._serving.get(model, ())
        if is_urgent:
            return [worker for worker in workers if worker.room]
        unfilled = [worker for worker in workers if not worker.forecast.is_next_full(priority)]
        if not unfilled:
            return unfilled
        share = KEPT_SHARE if self._has_company(now_ns) else NOTHING_KEPT
        ready = [
            worker
            for worker in unfilled
            if worker.room > worker.limit.value // share and worker.keeps_pace(tokens, priority)
        ]
        if not ready or self._token_target_ns is not None:
            return ready
        return [worker for worker in workers if worker.room > worker.limit.value // share]

    def _is_too_late(self, ticket: Ticket, worker: Worker, raw_ns: int | None, now_ns: int) -> bool:
        """Never on an idle worker: there a wrong forecast would refuse for ever, since nothing corrects it."""
        if raw_ns is None or not ticket.is_sheddable or not worker.held.sequences:
            return False
        return now_ns + worker.forecast.corrected_ns(raw_ns) > ticket.deadline_ns

    def _bind(self, ticket: Ticket, route: Route, raw_ns: int | None, priority: int, now_ns: int) -> Placement:
        worker = route.worker
        if not worker.held.requests:
            worker.forecast.rest()
        worker.breaker.began(now_ns)
        if ticket.blocks:
            worker.prefixes.use(ticket.blocks)
        self.leave(ticket.request)
        own_tokens = ticket.input_tokens - route.cached_tokens
        others_wait = self.waiting(ticket.model) > 0
        self._history(ticket.model).placed(now_ns, others_wait=others_wait)
        step_tokens = worker.forecast.step_tokens(priority, now_ns - ticket.arrived_ns, own_tokens)
        worker.forecast.placed(ticket.request, own_tokens, now_ns, ticket.answer_length, step_tokens, priority)
        tokens = ticket.input_tokens + ticket.output_tokens
        self.ledger.acquire(
            Lease(request=ticket.request, worker=worker.name, sequences=ticket.sequences, tokens=tokens)
        )
        self._running[ticket.request] = Running(
            ticket, worker, now_ns, raw_ns, ticket.output_tokens, route.matched_share
        )
        input_tokens = 0 if ticket.is_paid else ticket.input_tokens
        served = self.counters.charge(ticket.tenant, input_tokens=input_tokens, output_tokens=ticket.output_tokens)
        self.recent.charge(ticket.tenant, served, now_ns)
        return Placement(ticket, worker.name, route.cached_tokens, priority, step_tokens)

    def charged_tokens(self, request: int) -> int:
        """Output tokens that the placed request's tenant has been charged for."""
        return self._running[request].charged_tokens

    def overran(self, request: int, output_tokens: int) -> None:
        """The request has made more tokens than were predicted."""
        running = self._running[request]
        self.counters.charge(running.ticket.tenant, output_tokens=output_tokens - running.charged_tokens)
        running.charged_tokens = output_tokens

    def started(self, request: int, now_ns: int, prompt_tokens: int = 0, cached_tokens: int = 0) -> None:
        """The request's first token has come; the worker says what its prompt was and what it had of it."""
        running = self._running[request]
        if prompt_tokens:
            running.learn_cached(cached_tokens / prompt_tokens)
        running.worker.forecast.started(request)
        if running.raw_ns is not None:
            running.worker.forecast.learn(running.raw_ns, now_ns - running.placed_ns)
        self._learn(running.ticket, now_ns)

    def _learn(self, ticket: Ticket, now_ns: int) -> None:
        if ticket.forecast is not None:
            self._history(ticket.model).learn(ticket.forecast, now_ns - ticket.arrived_ns, now_ns)

    def _learn_end(self, ticket: Ticket, now_ns: int) -> None:
        """It is given up."""
        if ticket.forecast is not None:
            patience_ns = ticket.deadline_ns - ticket.arrived_ns
            self._history(ticket.model).gave_up(ticket.forecast, now_ns - ticket.arrived_ns, patience_ns, now_ns)

    def release(self, request: int, output_tokens: int = 0) -> None:
        """The request no longer runs on its worker; its tenant pays for the tokens that it made."""
        self.ledger.release(request)
        running = self._running.pop(request)
        running.worker.forecast.dropped(request)
        self.counters.charge(running.ticket.tenant, output_tokens=output_tokens - running.charged_tokens)

    def withdraw(self, request: int) -> None:
        """The request is not wanted any more: it leaves the queue, or gives back a lease that came too late."""
        if not self.leave(request) and request in self.ledger:
            self.release(request)

    # -- workers

    def worker_joined(self, name: str, model: ModelInfo, *, boot_id: str = "", now_ns: int = 0) -> None:
        """A worker is connected. One that only reconnects still has its prefix cache."""
        assert name not in self._workers, f"worker {name} joined twice"
        memory = self._memories.get(name)
        if memory is None or memory.boot_id != boot_id:
            prefixes = PrefixIndex(router.capacity_bytes(model))
            memory = self._memories[name] = Memory(boot_id, prefixes, memory.breaker if memory else Breaker())
        self._workers[name] = Worker(
            name=name,
            model=model,
            limit=SequenceLimit(model.max_sequences),
            joined_ns=now_ns,
            is_new=any(now_ns - worker.joined_ns > router.WARM_UP_NS for worker in self._workers.values()),
            prefixes=memory.prefixes,
            breaker=memory.breaker,
            forecast=EngineForecast(
                model.max_batch_tokens, makes_way=model.makes_way, pace=Pace(self._token_target_ns)
            ),
            held=self.ledger.account(name),
        )
        self._note_serving()

    def worker_left(self, name: str) -> Worker:
        """Its leases stay until each of its requests is released."""
        worker = self._workers.pop(name)
        self._note_serving()
        return worker

    def worker_forgotten(self, name: str) -> None:
        """The worker is no longer one of the gateway's."""
        assert name not in self._workers, f"worker {name} is still connected"
        self._memories.pop(name, None)
        self.ledger.close(name)

    def worker_leaving(self, name: str, is_leaving: bool) -> None:
        """Whether the gateway is to send it no more requests; what runs on it goes on."""
        self._workers[name].is_leaving = is_leaving
        self._note_serving()

    def _note_serving(self) -> None:
        for serving in self._serving.values():
            serving.clear()
        for worker in self._workers.values():
            for model in worker.model.names if not worker.is_leaving else ():
                self._serving.setdefault(model, []).append(worker)

    def worker_reported(self, name: str, load: Load, is_draining: bool) -> None:
        worker = self._workers[name]
        worker.load = load
        worker.is_draining = is_draining

    def attempt_ended(self, name: str, verdict: Verdict, now_ns: int) -> None:
        """What an attempt's end, or the loss of a session, says about a worker."""
        memory = self._memories.get(name)
        if memory is not None:
            memory.breaker.record(now_ns, verdict)

    def stepped(self, name: str, now_ns: int) -> None:
        """A step of the worker has ended: its tokens, its first tokens and its load are known."""
        worker = self._workers[name]
        load = worker.load
        worker.limit.stepped(load)
        is_idle = not load.running + load.waiting
        worker.forecast.stepped(now_ns, is_idle=is_idle, running=load.running, step_ns=load.step_ns)

    def worker(self, name: str) -> Worker | None:
        """None where it is not connected."""
        return self._workers.get(name)

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def is_served(self, model: str) -> bool:
        return bool(self._serving.get(model))

    def unserved(self) -> list[int]:
        """Queued requests whose model no worker serves any more."""
        return [request for model, queue in self._queues.items() if not self.is_served(model) for request in queue]

    def was_served(self, model: str) -> bool:
        """A worker that is gone now had it: the model is not unknown, only unavailable."""
        return model in self._serving

    def context_tokens(self, model: str) -> int | None:
        """The longest context of the workers that serve the model."""
        return max((w.model.context_tokens for w in self._workers.values() if model in w.model.names), default=None)

    @property
    def default_model(self) -> str | None:
        """The one model that is served, for requests that name none."""
        names = {worker.model.names[0] for worker in self._workers.values()}
        return names.pop() if len(names) == 1 else None
