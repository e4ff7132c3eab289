"""What may follow an attempt that failed: another one elsewhere, and from where. Pure decisions.

Only faults of a worker are worth another attempt: never a refusal, a deadline or a client that left. Before the first
token the request begins anew; after it, where its tenant wants that and it can be exact, it goes on from the tokens
that have come.

Attempts are bounded by their number, by the request's deadlines and by room: a retry waits in the queue, so that what
is left of the workers gets no more at once than ever. Against workers that live and fail, the budget also keeps the
retries under way to a share of all requests. A worker that is gone costs no budget: the loss of one among three takes a
third of the requests along, and they would be refused exactly when there is room for them. A hedge (`gateway.hedge`)
takes its share like a retry.
"""

from __future__ import annotations

from gateway.breaker import Verdict
from gateway.exchange import Event, Lost
from protos.core.contract import Failed, FailureKind, Finished, Sampling

SHARE = 0.2
MINIMUM = 3
"""So many retries may always be under way."""


def is_workers_fault(end: Event) -> bool:
    """May another worker do better?"""
    match end:
        case Lost():
            return True
        case Failed(kind=FailureKind.UNAVAILABLE | FailureKind.INTERNAL):
            return True
        case _:
            return False


def verdict(end: Event) -> Verdict:
    """What the end of an attempt tells a breaker.

    UNAVAILABLE is a worker that drains, or whose engine has died; the loss of its session is told once, by the fleet.
    """
    match end:
        case Finished():
            return Verdict.SUCCESS
        case Failed(kind=FailureKind.INTERNAL):
            return Verdict.FAILURE
        case _:
            return Verdict.NEITHER


def is_resumable(sampling: Sampling) -> bool:
    """Is the rest of an answer, made from prompt and tokens, the rest that its first worker would have made?

    Not with penalties that count output and prompt apart, nor with a seed, whose random numbers would begin anew.
    Several choices and logprobs are left out because they are rare, not because they could not be.
    """
    is_seeded = sampling.seed is not None and sampling.temperature != 0
    is_penalized = bool(sampling.presence_penalty or sampling.frequency_penalty)
    return sampling.n == 1 and sampling.logprobs is None and not is_seeded and not is_penalized


class RetryBudget:
    """Hedges, and retries after failures of workers that live; each request holds one share at most."""

    def __init__(self) -> None:
        self._requests: set[int] = set()

    def take(self, request: int, end: Event, active: int) -> bool:
        """May the request be tried again? `active` is how many requests there are in all."""
        if not isinstance(end, Failed) or end.kind is not FailureKind.INTERNAL:
            return True
        if not self.has_share(request, active):
            return False
        self.hold(request)
        return True

    def has_share(self, request: int, active: int) -> bool:
        """Has the request a share, or is one left for it?"""
        return request in self._requests or len(self._requests) < max(MINIMUM, SHARE * active)

    def hold(self, request: int) -> None:
        self._requests.add(request)

    def give_back(self, request: int) -> None:
        """The request is over."""
        self._requests.discard(request)
