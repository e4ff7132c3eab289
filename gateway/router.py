"""Which worker runs a request: the one where it adds the least delay, of those that serve its model and have room.

Cost of a placement = uncached * (batch + delay) + decode * batch + weight * (ahead + uncached), in tokens. The prompt
tokens that the worker does not have cached hold up every sequence of the batch, and the more those that wait for their
first token in the same step; each token of the answer is made in steps that are the longer the larger the batch is; and
the first token waits for what the worker does before, and for its own prompt, which weighs the more where it is urgent.
What is ahead keeps a worker that has what everybody's prompt begins with from getting everybody.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence

import msgspec

from gateway.breaker import Breaker
from gateway.forecast import EngineForecast
from gateway.ledger import Held
from gateway.lengths import BYTES_PER_TOKEN
from gateway.limiter import SequenceLimit
from gateway.order import Ticket
from gateway.prefixes import PrefixIndex
from protos.core.contract import Load, ModelInfo

EJECTED_SHARE = 3
"""At most one in so many workers of a model is left alone, but one where there are two."""
WARM_UP_NS = 30_000_000_000
COLD_WEIGHT = 0.1
"""A worker that joins a warm fleet counts for so much of itself at first."""
FIRST_TOKEN_WEIGHT = 16
"""A delay of one first token counts as the same delay of so many answers: what nobody notices in an answer of seconds
is much of the time to a first token. With more of it workers get more unlike each other, for little: three with twelve
answers have 5.5 and 2.5 in the mean with 64, 4.8 and 3.2 with 16, at the same time to first token."""
URGENT_WEIGHT = 64
"""The same where the request is urgent: those are few, so that they leave the workers alike, and they are the ones that
are not to notice what the others do."""


class Worker(msgspec.Struct, kw_only=True):
    """A worker as the deciders see it. Owned by the scheduler; the fleet reports changes to it."""

    name: str
    model: ModelInfo
    limit: SequenceLimit
    load: Load = Load()
    is_draining: bool = False
    """It says so itself."""
    is_leaving: bool = False
    """The gateway is to stop using it."""
    joined_ns: int = 0
    is_new: bool = False
    """It joined workers that were warm already."""
    forecast: EngineForecast = msgspec.field(default_factory=EngineForecast)
    breaker: Breaker = msgspec.field(default_factory=Breaker)
    prefixes: PrefixIndex = msgspec.field(default_factory=lambda: PrefixIndex(0))
    held: Held = msgspec.field(default_factory=Held)
    """Its account in the ledger."""

    @property
    def is_open(self) -> bool:
        """May it be given requests at all?"""
        return not (self.is_draining or self.is_leaving)

    def keeps_pace(self, tokens: int, priority: int) -> bool:
        """Would its answers keep their pace with one more prompt, of somebody who is not urgent?"""
        forecast = self.forecast
        if not forecast.pace.has_target:
            return True
        joint_ns = 0.0
        if not (priority and forecast.makes_way):
            ahead = forecast.ahead_tokens(priority)
            joint_ns = forecast.prompt_ns(ahead + tokens) if ahead else 0.0
        return forecast.pace.allows(forecast.pending_ns(), joint_ns)

    @property
    def room(self) -> int:
        """Sequences that may still be sent: late binding keeps the engine's own queue near empty."""
        if self.is_draining or self.is_leaving:
            return 0
        left = self.limit.value - self.held.sequences
        return left if left > 0 else 0

    def fits(self, sequences: int) -> bool:
        """Is there room for a request of so many? One larger than the whole worker fits where nothing runs."""
        room = self.room
        return room >= sequences or (room > 0 and not self.held.sequences)

    def is_in_doubt(self, now_ns: int) -> bool:
        """Its breaker is open, or it has requests and does not go on with them: it may hang, or cannot be reached."""
        if not self.breaker.allows(now_ns):
            return True
        return self.held.requests > 0 and self.forecast.is_overdue(now_ns)

    def weight(self, now_ns: int) -> float:
        """Rises to 1 while a new worker's caches fill."""
        if not self.is_new:
            return 1.0
        return min(1.0, COLD_WEIGHT + (1 - COLD_WEIGHT) * (now_ns - self.joined_ns) / WARM_UP_NS)


class Route(msgspec.Struct, frozen=True, gc=False):
    """Where a request goes, and what was expected of it."""

    worker: Worker
    matched_share: float
    """Of the prompt, by the index."""
    cached_tokens: int
    """Of the prompt, expected."""


Choose = Callable[[Iterable[Worker], Ticket, bool, int, int], Route | None]


def choose(workers: Iterable[Worker], ticket: Ticket, is_urgent: bool, priority: int, now_ns: int) -> Route | None:
    """The worker with the smallest cost; None when none has room. `priority` is what the engine would be told.

    A request larger than a whole worker is sent to one that is empty. A worker of a failed attempt is taken only when
    there is no other. Among equals the session's own worker is taken, so that its turns stay together.
    """
    able = [worker for worker in workers if worker.fits(ticket.sequences)]
    if len(able) < 2:
        return _route(able[0], ticket) if able else None
    weight = URGENT_WEIGHT if is_urgent else FIRST_TOKEN_WEIGHT
    best: tuple[bool, float, int] | None = None
    chosen: Route | None = None
    for worker in able:
        route = _route(worker, ticket)
        batch = worker.held.sequences
        uncached = ticket.input_tokens - route.cached_tokens + 1
        first = worker.forecast.before_tokens(priority, now_ns) + uncached
        delay = FIRST_TOKEN_WEIGHT * worker.forecast.delayed(priority)
        cost = uncached * (batch + delay) + ticket.output_tokens * batch + weight * first
        # A worker with more slots is a faster one, as far as anybody here knows.
        speed = worker.model.max_sequences * worker.weight(now_ns)
        distance = 0 if ticket.session is None else _distance(ticket, worker)
        rank = (worker.name in ticket.avoid, cost / speed, distance)
        if best is None or rank < best:
            best, chosen = rank, route
    return chosen


def _route(worker: Worker, ticket: Ticket) -> Route:
    if not ticket.blocks:
        return Route(worker, 0.0, 0)
    matched_share = worker.prefixes.matched_bytes(ticket.blocks) / ticket.prompt_bytes
    return Route(worker, matched_share, int(ticket.input_tokens * matched_share * worker.prefixes.trust))


def left_out(workers: Sequence[Worker], now_ns: int) -> set[str]:
    """Those that are in doubt, as far as there may be so many at once; never the last one.

    `workers` are all that serve a model: a full one counts, so that nobody is sent to a broken one instead.
    """
    ejected = [worker.name for worker in workers if worker.is_in_doubt(now_ns)]
    if not ejected:
        return set()
    return set(ejected[: min(max(1, len(workers) // EJECTED_SHARE), len(workers) - 1)])


def _distance(ticket: Ticket, worker: Worker) -> int:
    """Rendezvous hashing: the same order of workers for a session, whoever joins or leaves; nothing to remember."""
    return zlib.crc32(f"{ticket.tenant} {ticket.session} {worker.name}".encode())


def capacity_bytes(model: ModelInfo) -> int:
    """About as much prompt text as the model's KV cache holds."""
    return model.kv_blocks * model.kv_block_tokens * BYTES_PER_TOKEN
