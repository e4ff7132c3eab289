"""The order of waiting requests of one model: priority band, then the tenant that is owed most, then earliest deadline.

A request that has waited long is lifted one band per `AGE_NS`, but never into the top band.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import msgspec

from gateway.fairness import LeastServed, ServiceCounters
from gateway.forecast import Forecast
from gateway.lengths import AnswerLength
from gateway.prefixes import Blocks

AGE_NS = 30_000_000_000


class Ticket(msgspec.Struct, frozen=True, kw_only=True, gc=False):
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
    is_hurried: bool = False
    """The deadline is its own: the client asked for a first token sooner than the gateway does."""
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
    output_tokens: float = 0
    """Predicted."""
    charge: float = 0
    """What placing them adds to the tenant's counter."""

    @property
    def mean_answer(self) -> float:
        """Tokens; 0 where nobody waits."""
        return self.output_tokens / self.requests if self.requests else 0.0


class _Waiting(msgspec.Struct, gc=False):
    ticket: Ticket
    band: int
    charge: float
    """What placing it adds to its tenant's counter."""


class FairQueue:
    """One model's waiting requests. Owned by the scheduler."""

    def __init__(self, counters: ServiceCounters) -> None:
        self._counters = counters
        self._bands: dict[int, _Band] = {}
        self._ranked: list[_Band] = []
        """The same, the top one first."""
        self._waiting: dict[int, _Waiting] = {}
        self._ages: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: int) -> bool:
        return request in self._waiting

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._waiting))

    def push(self, ticket: Ticket) -> None:
        band = ticket.band
        charge = self._counters.price(ticket.input_tokens, ticket.output_tokens) / ticket.weight
        waiting = self._waiting[ticket.request] = _Waiting(ticket, band, charge)
        self._counters.arrive(ticket.tenant, ticket.weight)
        self._band(band).push(waiting)
        if band > 1:
            heapq.heappush(self._ages, (ticket.arrived_ns + AGE_NS, ticket.request))

    def remove(self, request: int) -> Ticket:
        """Take a request out, wherever it stands."""
        waiting = self._waiting.pop(request)
        self._bands[waiting.band].remove(waiting)
        self._counters.leave(waiting.ticket.tenant)
        return waiting.ticket

    def head(self, now_ns: int) -> Ticket | None:
        """The request that is next."""
        if self._ages and self._ages[0][0] <= now_ns:
            self._age(now_ns)
        for band in self._ranked:
            if band.lines:
                return band.head()
        return None

    def _age(self, now_ns: int) -> None:
        """Lift what has waited long."""
        while self._ages and self._ages[0][0] <= now_ns:
            at_ns, request = heapq.heappop(self._ages)
            waiting = self._waiting.get(request)
            if waiting is None:
                continue
            self._bands[waiting.band].remove(waiting)
            waiting.band -= 1
            self._band(waiting.band).push(waiting)
            if waiting.band > 1:
                heapq.heappush(self._ages, (at_ns + AGE_NS, request))

    def ahead(self, band: int, tenant: str) -> Work:
        """About what would be placed before a new request: higher bands, and of its own what fairness lets pass.

        A tenant's requests pass until its counter has come to where this tenant's will be when its own are placed.
        """
        requests = tokens = output_tokens = 0.0
        for number, one in self._bands.items():
            if number > band or not one.lines:
                continue
            is_passed = number < band
            turn = 0.0 if is_passed else self._turn(one.lines, tenant)
            for name, line in one.lines.items():
                passing = line.charge if is_passed or name == tenant else turn - self._counters.counter(name)
                if passing >= line.charge:
                    requests += line.requests
                    tokens += line.tokens
                    output_tokens += line.output_tokens
                elif passing > 0:
                    share = passing / line.charge
                    requests += share * line.requests
                    tokens += share * line.tokens
                    output_tokens += share * line.output_tokens
        return Work(requests, tokens, output_tokens)

    def _turn(self, lines: dict[str, _Line], tenant: str) -> float:
        """Where the tenant's counter will be when its own requests are placed."""
        mine = lines.get(tenant)
        return self._counters.level(tenant) + (mine.charge if mine is not None else 0.0)

    def depths(self) -> dict[tuple[int, str], tuple[int, int]]:
        """(band, tenant) to (requests, arrival of the oldest)."""
        depths: dict[tuple[int, str], tuple[int, int]] = {}
        for waiting in self._waiting.values():
            key = (waiting.band, waiting.ticket.tenant)
            count, oldest_ns = depths.get(key, (0, waiting.ticket.arrived_ns))
            depths[key] = (count + 1, min(oldest_ns, waiting.ticket.arrived_ns))
        return depths

    def _band(self, number: int) -> _Band:
        band = self._bands.get(number)
        if band is None:
            band = self._bands[number] = _Band(number, self._counters.ring(), self._waiting)
            self._ranked = [self._bands[number] for number in sorted(self._bands)]
        return band


class _Line(Work):
    """What waits of one tenant in one band."""

    heap: list[tuple[int, int]] = []
    """(deadline, request); those that have left the band stay until they surface."""


class _Band:
    """Requests of one band: per tenant a line by deadline."""

    def __init__(self, number: int, tenants: LeastServed, waiting: dict[int, _Waiting]) -> None:
        """`waiting` are the requests of all bands."""
        self.lines: dict[str, _Line] = {}
        """None is empty."""
        self._number = number
        self._tenants = tenants
        self._waiting = waiting

    def push(self, waiting: _Waiting) -> None:
        ticket = waiting.ticket
        tenant = ticket.tenant
        line = self.lines.get(tenant)
        if line is None:
            line = self.lines[tenant] = _Line()
            self._tenants.enter(tenant)
        heapq.heappush(line.heap, (ticket.deadline_ns, ticket.request))
        line.requests += 1
        line.tokens += ticket.input_tokens
        line.output_tokens += ticket.output_tokens
        line.charge += waiting.charge

    def remove(self, waiting: _Waiting) -> None:
        ticket = waiting.ticket
        line = self.lines[ticket.tenant]
        line.requests -= 1
        line.tokens -= ticket.input_tokens
        line.output_tokens -= ticket.output_tokens
        line.charge -= waiting.charge
        if not line.requests:
            del self.lines[ticket.tenant]
            self._tenants.discard(ticket.tenant)

    def head(self) -> Ticket | None:
        tenant = self._tenants.least()
        if tenant is None:
            return None
        heap = self.lines[tenant].heap
        while True:
            waiting = self._waiting.get(heap[0][1])
            if waiting is not None and waiting.band == self._number:
                return waiting.ticket
            heapq.heappop(heap)
