"""The record of a request: written once by the gateway, read by metrics, traces, captures, replays and reports.

The phases partition the time from arrival to settle: they follow each other without gap or overlap, so their sum and
`unattributed_ns` is `total_ns` by construction. A phase that never happened is None, never zero.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

import msgspec

PHASES = (
    "receive",  # arrival until the body is read and parsed
    "admit",  # validation and admission
    "queue",  # waiting in the gateway for a worker
    "route",  # choosing the worker
    "retry",  # attempts that failed before their first token, or lost to a hedge, and the waits between them
    "dispatch",  # gateway to worker
    "engine_input",  # template, tokenizing, hand-over to the engine
    "engine_queue",  # waiting inside the engine
    "prefill",  # scheduled until the first token
    "decode",  # first token until the last
    "deliver",  # what follows the last token: detokenize, wire, the client's socket
)


class Phases(msgspec.Struct, frozen=True, omit_defaults=True):
    """Nanoseconds per phase, in the order in which they happen."""

    receive: int | None = None
    admit: int | None = None
    queue: int | None = None
    route: int | None = None
    retry: int | None = None
    dispatch: int | None = None
    engine_input: int | None = None
    engine_queue: int | None = None
    prefill: int | None = None
    decode: int | None = None
    deliver: int | None = None

    def present(self) -> Iterator[tuple[str, int]]:
        """(name, nanoseconds) of the phases that happened, in order."""
        for name in PHASES:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def sum_ns(self) -> int:
        return sum(value for _, value in self.present())


class Outcome(enum.StrEnum):
    FINISHED = "finished"
    FAILED = "failed"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One try on one worker. Offsets are ns after arrival."""

    worker: str
    started_ns: int
    ended_ns: int
    error: str | None = None
    output_tokens: int = 0
    """Tokens that came from it; where an attempt after the first has some, it went on from those before."""
    is_hedge: bool = False
    """It ran beside another attempt until the first token of either; the one that lost has the error "hedged"."""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, settled. `*_ns` are nanoseconds; `*_at_ns` are nanoseconds after arrival."""

    request_id: str
    trace_id: str
    """32 hex digits, the client's where it sent a traceparent."""
    span_id: str
    parent_span_id: str | None = None
    replay_of: str | None = None
    """traceparent of the request that this one replays."""
    is_sampled: bool = True
    """What the client's traceparent asked for; True where it sent none."""
    endpoint: str
    model: str = ""
    tenant: str = "anonymous"
    priority: str = "standard"
    session: str | None = None
    is_stream: bool = False
    arrived_unix_ns: int
    outcome: Outcome
    status: int
    """HTTP status that the client saw, 499 when it left before one was sent."""
    reject_reason: str | None = None
    error: str | None = None
    error_code: str | None = None
    finish_reasons: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    expected_cached_tokens: int | None = None
    """What the router counted on when it chose the worker."""
    output_tokens: int = 0
    max_tokens: int | None = None
    body_bytes: int = 0
    worker: str | None = None
    is_simulated: bool = False
    """The tokens came from a simulated engine."""
    attempts: tuple[Attempt, ...] = ()
    phases: Phases
    total_ns: int
    unattributed_ns: int = 0
    first_token_at_ns: int | None = None
    """The first non-empty content was handed to the client's socket."""
    last_token_at_ns: int | None = None
    cancelled_at_ns: int | None = None
    max_gap_ns: int = 0
    """Longest time between two deltas of the request, as the gateway saw them."""
    backpressure_ns: int = 0
    """Time in which the client's socket took nothing. Overlaps phases, so it is not one."""
    preemptions: int = 0


def is_partition(record: RequestRecord) -> bool:
    """The invariant of this module."""
    return record.phases.sum_ns() + record.unattributed_ns == record.total_ns
