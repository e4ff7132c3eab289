"""Random traffic for the scheduler alone: whatever can happen, in any order, with the books kept beside it."""

from __future__ import annotations

import collections
import random

from gateway.order import Ticket
from gateway.scheduler import Scheduler
from protos.core.contract import Load
from tests.gateway.fakes import model_info

MODELS = ("a", "b", "both")
WORKERS = ("v", "w", "x", "y")
TENANTS = tuple(f"tenant-{number}" for number in range(20))
MOST_QUEUED = 40
PATIENCE_NS = 2_000_000_000
TOKEN_TARGET_NS = 100_000_000
TOKENS = 8


class Traffic:
    """One scheduler under random operations. `run` raises AssertionError where a request is lost or counted twice."""

    def __init__(self, seed: int, scheduler: Scheduler | None = None) -> None:
        self.scheduler = scheduler or Scheduler(TOKEN_TARGET_NS)
        self.operations: collections.Counter[str] = collections.Counter()
        """That had something to do: nothing can finish while nothing runs."""
        self.ended: collections.Counter[str] = collections.Counter()
        self.arrived = 0
        self._draw = random.Random(seed)
        self._random = self._draw.random
        self._now_ns = 0
        self._queued: dict[int, Ticket] = {}
        self._running: dict[int, str] = {}
        self._started: set[int] = set()
        self._serving: dict[str, None] = {}

    def run(self, operations: int, *, check_every: int = 1_000) -> None:
        names = ("arrive", "place", "token", "finish", "cancel", "fail", "expire", "step", "join", "lose")
        weights = (24, 18, 24, 14, 4, 3, 5, 6, 1, 1)
        steps = {name: getattr(self, f"_{name}") for name in names}
        for number, name in enumerate(self._draw.choices(names, weights, k=operations)):
            self.operations[name] += steps[name]()
            if number % check_every == 0:
                self.check()
        self.check()

    def end(self) -> None:
        """Let everything end; afterwards nothing may be held."""
        for request in [*self._queued, *self._running]:
            self._withdraw(request, "cancelled")
        self.check()
        scheduler = self.scheduler
        assert len(scheduler.ledger) == scheduler.queued == scheduler.queued_bytes == 0
        assert not scheduler.depths()
        assert all(scheduler.queued_in(band) == 0 for band in range(4))
        for worker in scheduler.workers:
            assert worker.forecast.unstarted_tokens == 0
            assert scheduler.ledger.held_by(worker.name).requests == 0

    def check(self) -> None:
        scheduler = self.scheduler
        assert self.arrived == self.ended.total() + len(self._queued) + len(self._running), "a request is lost"
        assert scheduler.queued == len(self._queued)
        assert scheduler.queued_bytes == sum(ticket.size_bytes for ticket in self._queued.values())
        assert sum(scheduler.queued_in(band) for band in range(4)) == len(self._queued)
        assert len(scheduler.ledger) == len(self._running)
        held = collections.Counter(self._running.values())
        assert all(scheduler.ledger.held_by(name).requests == held[name] for name in WORKERS)

    def _below(self, limit: int) -> int:
        return int(self._random() * limit)

    # -- what can happen; False where there was nothing that it could happen to

    def _arrive(self) -> bool:
        below = self._below
        self.arrived += 1
        tenant, model, band = TENANTS[below(len(TENANTS))], MODELS[below(len(MODELS))], below(4)
        tokens = 1 + below(2_000)
        forecast = self.scheduler.forecast(model, band, tenant, tokens, self._now_ns)
        if len(self._queued) >= MOST_QUEUED:
            self.ended["rejected"] += 1
            return True
        ticket = Ticket(
            request=self.arrived,
            model=model,
            tenant=tenant,
            band=band,
            sequences=1 + below(3),
            input_tokens=tokens,
            output_tokens=1 + below(2 * TOKENS),
            size_bytes=4 * tokens,
            arrived_ns=self._now_ns,
            deadline_ns=self._now_ns + 1 + below(PATIENCE_NS),
            is_sheddable=band > 0,
            forecast=forecast,
        )
        self._queued[ticket.request] = ticket
        self.scheduler.enqueue(ticket)
        return True

    def _place(self) -> bool:
        decided = self.scheduler.place(self._now_ns)
        for placement in decided.placed:
            request = placement.ticket.request
            assert self._queued.pop(request) is placement.ticket
            assert request not in self._running, "placed twice"
            assert placement.worker in self._serving
            self._running[request] = placement.worker
        for request in decided.shed:
            del self._queued[request]
            self.ended["timed out"] += 1
        return True

    def _token(self) -> bool:
        request = self._any_running()
        if request is None:
            return False
        if request not in self._started:
            self._started.add(request)
            self.scheduler.started(request, self._now_ns)
        self.scheduler.overran(request, self.scheduler.charged_tokens(request) + 1)
        return True

    def _finish(self) -> bool:
        request = self._any_running()
        if request is not None:
            self._release(request, "finished")
        return request is not None

    def _fail(self) -> bool:
        request = self._any_running()
        if request is not None:
            self._release(request, "failed")
        return request is not None

    def _cancel(self) -> bool:
        among = self._queued if self._random() < 0.5 else self._running
        if among:
            self._withdraw(next(iter(among)), "cancelled")
            return True
        return False

    def _expire(self) -> bool:
        self._now_ns += self._below(50_000_000)
        for request in self.scheduler.expire(self._now_ns):
            assert self._queued.pop(request).deadline_ns <= self._now_ns
            self.ended["timed out"] += 1
        return True

    def _step(self) -> bool:
        if not self._serving:
            return False
        name = next(iter(self._serving))
        self._now_ns += self._below(20_000_000)
        running = self.scheduler.ledger.sequences_on(name)
        self.scheduler.worker_reported(name, Load(running=running), is_draining=False)
        self.scheduler.stepped(name, self._now_ns)
        return True

    def _join(self) -> bool:
        name = WORKERS[self._below(len(WORKERS))]
        if name in self._serving:
            return False
        self._serving[name] = None
        names = MODELS if self._random() < 0.7 else (MODELS[self._below(len(MODELS))],)
        self.scheduler.worker_joined(
            name, model_info(names=names, max_sequences=4 + self._below(60), kv_blocks=4_096), now_ns=self._now_ns
        )
        return True

    def _lose(self) -> bool:
        name = WORKERS[self._below(len(WORKERS))]
        if name not in self._serving or self._random() < 0.8:
            return False
        del self._serving[name]
        self.scheduler.worker_left(name)
        for request in self.scheduler.unserved():
            assert self.scheduler.leave(request)
            del self._queued[request]
            self.ended["failed"] += 1
        for request in [request for request, worker in self._running.items() if worker == name]:
            self._release(request, "failed")
        return True

    def _any_running(self) -> int | None:
        """The oldest or the youngest."""
        if not self._running:
            return None
        return next(iter(self._running) if self._random() < 0.5 else reversed(self._running))

    def _release(self, request: int, outcome: str) -> None:
        self.scheduler.release(request, self._below(TOKENS))
        self._ended(request, outcome)

    def _withdraw(self, request: int, outcome: str) -> None:
        self.scheduler.withdraw(request)
        self._ended(request, outcome)

    def _ended(self, request: int, outcome: str) -> None:
        self._queued.pop(request, None)
        self._running.pop(request, None)
        self._started.discard(request)
        self.ended[outcome] += 1
