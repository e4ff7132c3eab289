"""Who runs when and where: a pure decider over the queue, the ledger and the router.

It holds no sockets and no clock. Every method changes state at once and returns what the caller must do; requests are
known by number. First come, first served per model; a request that cannot be placed does not hold up other models, and
models that share workers take turns.
"""

from __future__ import annotations

import collections
import heapq

import msgspec

from gateway import router
from gateway.ledger import Lease, Ledger
from gateway.router import Worker
from protos.core.contract import Load, ModelInfo


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the deciders see it. `deadline_ns`: leave the queue by then."""

    request: int
    model: str
    sequences: int
    tokens: int
    size_bytes: int
    deadline_ns: int
    avoid: tuple[str, ...] = ()
    """The workers of failed attempts."""


class Placement(msgspec.Struct, frozen=True):
    ticket: Ticket
    worker: str


class Scheduler:
    """One per gateway; all calls come from its event loop."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._workers: dict[str, Worker] = {}
        # A model's queue keeps its order in a dict: removal from the middle costs nothing.
        self._queues: dict[str, dict[int, Ticket]] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._queued: dict[int, Ticket] = {}
        self._queued_bytes = 0
        self._models: collections.Counter[str] = collections.Counter()

    # -- queue

    @property
    def queued(self) -> int:
        return len(self._queued)

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def enqueue(self, ticket: Ticket, *, at_front: bool = False) -> None:
        """`at_front`: a retry goes back to where it came from."""
        assert ticket.request not in self._queued, f"request {ticket.request} is already queued"
        queue = self._queues.setdefault(ticket.model, {})
        if at_front and queue:
            self._queues[ticket.model] = {ticket.request: ticket, **queue}
        else:
            queue[ticket.request] = ticket
        self._queued[ticket.request] = ticket
        self._queued_bytes += ticket.size_bytes
        heapq.heappush(self._deadlines, (ticket.deadline_ns, ticket.request))

    def leave(self, request: int) -> bool:
        """Take a request out of the queue; False when it is not in it."""
        ticket = self._queued.pop(request, None)
        if ticket is None:
            return False
        self._queued_bytes -= ticket.size_bytes
        queue = self._queues[ticket.model]
        del queue[request]
        if not queue:
            del self._queues[ticket.model]
        return True

    def expire(self, now_ns: int) -> list[int]:
        """Requests whose deadline has passed; they have left the queue."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            deadline_ns, request = heapq.heappop(self._deadlines)
            ticket = self._queued.get(request)
            if ticket is not None and ticket.deadline_ns == deadline_ns:
                self.leave(request)
                expired.append(request)
        return expired

    @property
    def next_deadline_ns(self) -> int | None:
        """When `expire` has something to do; entries of requests that left are dropped on the way."""
        while self._deadlines and self._deadlines[0][1] not in self._queued:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    # -- placement

    def place(self) -> list[Placement]:
        """Bind waiting requests to workers with room, a model's oldest first; each placement holds a lease."""
        placements = []
        turns = collections.deque(self._queues)
        while turns:
            model = turns.popleft()
            ticket = next(iter(self._queues[model].values()))
            serving = (worker for worker in self._workers.values() if model in worker.model.names)
            worker = router.choose(serving, self.ledger, ticket.sequences, ticket.avoid)
            if worker is None:
                continue
            self.leave(ticket.request)
            self.ledger.acquire(
                Lease(
                    request=ticket.request,
                    worker=worker.name,
                    sequences=ticket.sequences,
                    tokens=ticket.tokens,
                )
            )
            placements.append(Placement(ticket, worker.name))
            if model in self._queues:
                self._queues[model] = self._queues.pop(model)  # behind the other models of its workers
                turns.append(model)
        return placements

    def release(self, request: int) -> None:
        """The request no longer runs on its worker."""
        self.ledger.release(request)

    def withdraw(self, request: int) -> None:
        """The request is not wanted any more: it leaves the queue, or gives back a lease that came too late."""
        if not self.leave(request) and request in self.ledger:
            self.ledger.release(request)

    # -- workers

    def worker_joined(self, name: str, model: ModelInfo) -> None:
        assert name not in self._workers, f"worker {name} joined twice"
        self._workers[name] = Worker(name=name, model=model)
        self._models.update(model.names)

    def worker_left(self, name: str) -> None:
        """Its leases stay until each of its requests is released."""
        worker = self._workers.pop(name)
        self._models.subtract(worker.model.names)

    def worker_reported(self, name: str, load: Load, is_draining: bool) -> None:
        worker = self._workers[name]
        worker.load = load
        worker.is_draining = is_draining

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def is_served(self, model: str) -> bool:
        return self._models[model] > 0

    def unserved(self) -> list[int]:
        """Queued requests whose model no worker serves any more."""
        return [request for model, queue in self._queues.items() if not self.is_served(model) for request in queue]

    def was_served(self, model: str) -> bool:
        """A worker that is gone now had it: the model is not unknown, only unavailable."""
        return model in self._models

    def context_tokens(self, model: str) -> int | None:
        """The longest context of the workers that serve the model."""
        return max((w.model.context_tokens for w in self._workers.values() if model in w.model.names), default=None)

    @property
    def default_model(self) -> str | None:
        """The one model that is served, for requests that name none."""
        names = {worker.model.names[0] for worker in self._workers.values()}
        return names.pop() if len(names) == 1 else None
