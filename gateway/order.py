"""The order of waiting requests of one model: priority band, then the tenant that is owed most, then earliest deadline.

A request that has waited long is lifted one band per `AGE_NS`, but never into the top band.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import msgspec

from gateway.fairness import LeastServed, ServiceCounters
from gateway.forecast import AnswerLength, Forecast
from gateway.prefixes import Blocks

AGE_NS = 30_000_000_000


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the deciders see it."""

    request: int
    model: str
    tenant: str = "anonymous"
    weight: float = 1.0
    band: int = 1
    """0 is the top band."""
    sequences: int = 1
    input_tokens: int = 0
    """Of the prompt, estimated."""
    output_tokens: int = 0
    """Predicted."""
    has_fixed_output: bool = False
    """It makes exactly as many."""
    size_bytes: int = 0
    arrived_ns: int = 0
    deadline_ns: int
    """The first token is worthless later: the request leaves the queue by then."""
    is_sheddable: bool = False
    """May be refused because a forecast says that the deadline cannot be met."""
    forecast: Forecast | None = None
    """What was forecast when it arrived; the forecast learns from it."""
    avoid: tuple[str, ...] = ()
    """The workers of failed attempts."""
    blocks: Blocks = ()
    """Of the prompt: what workers may have cached of it."""
    prompt_bytes: int = 0
    """Length of what the blocks were cut from."""
    session: str | None = None

    @property
    def answer_length(self) -> AnswerLength:
        return AnswerLength(self.output_tokens / self.sequences, self.sequences, self.has_fixed_output)

    @property
    def is_paid(self) -> bool:
        """Its tenant was charged for the prompt when an attempt before began."""
        return bool(self.avoid)


class Work(msgspec.Struct):
    """Waiting requests, added up."""

    requests: float = 0
    tokens: float = 0
    """Of their prompts."""
    charge: float = 0
    """What placing them adds to the tenant's counter."""


class _Waiting(msgspec.Struct):
    ticket: Ticket
    band: int


class FairQueue:
    """One model's waiting requests. Owned by the scheduler."""

    def __init__(self, counters: ServiceCounters) -> None:
        self._counters = counters
        self._bands: dict[int, _Band] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._ages: list[tuple[int, int]] = []
        self._work: dict[int, dict[str, Work]] = {}
        """What waits, by band and tenant; nothing empty."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: int) -> bool:
        return request in self._waiting

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._waiting))

    def push(self, ticket: Ticket) -> None:
        self._waiting[ticket.request] = _Waiting(ticket, ticket.band)
        self._counters.arrive(ticket.tenant, ticket.weight)
        self._join(ticket.band, ticket)
        if ticket.band > 1:
            heapq.heappush(self._ages, (ticket.arrived_ns + AGE_NS, ticket.request))

    def remove(self, request: int) -> Ticket:
        """Take a request out, wherever it stands."""
        waiting = self._waiting.pop(request)
        self._part(waiting.band, waiting.ticket)
        self._counters.leave(waiting.ticket.tenant)
        return waiting.ticket

    def head(self) -> Ticket | None:
        """The request that is next."""
        for band in sorted(self._bands):
            ticket = self._bands[band].head()
            if ticket is not None:
                return ticket
        return None

    def age(self, now_ns: int) -> None:
        """Lift what has waited long."""
        while self._ages and self._ages[0][0] <= now_ns:
            at_ns, request = heapq.heappop(self._ages)
            waiting = self._waiting.get(request)
            if waiting is None:
                continue
            self._part(waiting.band, waiting.ticket)
            waiting.band -= 1
            self._join(waiting.band, waiting.ticket)
            if waiting.band > 1:
                heapq.heappush(self._ages, (at_ns + AGE_NS, request))

    def ahead(self, band: int, tenant: str) -> Work:
        """About what would be placed before a new request: higher bands, and of its own what fairness lets pass.

        A tenant's requests pass until its counter has come to where this tenant's will be when its own are placed.
        """
        total = Work()
        for its_band, tenants in self._work.items():
            if its_band < band:
                for work in tenants.values():
                    _add(total, work, 1.0)
        tenants = self._work.get(band, {})
        mine = tenants.get(tenant, Work())
        counters = self._counters
        turn = counters.level(tenant) + mine.charge
        for name, work in tenants.items():
            passing = 1.0 if name == tenant else (turn - counters.counter(name)) / max(work.charge, 1e-9)
            _add(total, work, min(1.0, max(0.0, passing)))
        return total

    def depths(self) -> dict[tuple[int, str], tuple[int, int]]:
        """(band, tenant) to (requests, arrival of the oldest)."""
        depths: dict[tuple[int, str], tuple[int, int]] = {}
        for waiting in self._waiting.values():
            key = (waiting.band, waiting.ticket.tenant)
            count, oldest_ns = depths.get(key, (0, waiting.ticket.arrived_ns))
            depths[key] = (count + 1, min(oldest_ns, waiting.ticket.arrived_ns))
        return depths

    def _join(self, band: int, ticket: Ticket) -> None:
        self._band(band).push(ticket)
        work = self._work.setdefault(band, {}).setdefault(ticket.tenant, Work())
        work.requests += 1
        work.tokens += ticket.input_tokens
        work.charge += self._charge(ticket)

    def _part(self, band: int, ticket: Ticket) -> None:
        self._band(band).remove(ticket)
        work = self._work[band][ticket.tenant]
        work.requests -= 1
        work.tokens -= ticket.input_tokens
        work.charge -= self._charge(ticket)
        if not work.requests:
            del self._work[band][ticket.tenant]

    def _charge(self, ticket: Ticket) -> float:
        return self._counters.price(ticket.input_tokens, ticket.output_tokens) / ticket.weight

    def _band(self, band: int) -> _Band:
        if band not in self._bands:
            self._bands[band] = _Band(self._counters.ring())
        return self._bands[band]


def _add(total: Work, work: Work, share: float) -> None:
    total.requests += share * work.requests
    total.tokens += share * work.tokens


class _Band:
    """Requests of one band: per tenant a heap by deadline. Removed ones stay in their heap until they surface."""

    def __init__(self, tenants: LeastServed) -> None:
        self._tenants = tenants
        self._heaps: dict[str, list[tuple[int, int]]] = {}
        self._tickets: dict[int, Ticket] = {}
        self._counts: dict[str, int] = {}

    def push(self, ticket: Ticket) -> None:
        self._tickets[ticket.request] = ticket
        heapq.heappush(self._heaps.setdefault(ticket.tenant, []), (ticket.deadline_ns, ticket.request))
        self._counts[ticket.tenant] = self._counts.get(ticket.tenant, 0) + 1
        self._tenants.add(ticket.tenant)

    def remove(self, ticket: Ticket) -> None:
        del self._tickets[ticket.request]
        self._counts[ticket.tenant] -= 1
        if not self._counts[ticket.tenant]:
            del self._counts[ticket.tenant]
            del self._heaps[ticket.tenant]
            self._tenants.discard(ticket.tenant)

    def head(self) -> Ticket | None:
        tenant = self._tenants.least()
        if tenant is None:
            return None
        heap = self._heaps[tenant]
        while (ticket := self._tickets.get(heap[0][1])) is None:
            heapq.heappop(heap)
        return ticket
