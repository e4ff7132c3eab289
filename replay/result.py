"""What became of one replayed request: an entry of the run's journal."""

from __future__ import annotations

import enum
from array import array
from typing import TYPE_CHECKING

import msgspec

from replay.answer import Timing
from replay.client import Exchange
from replay.pacer import Due
from replay.workload import Recorded, WorkloadRequest

if TYPE_CHECKING:
    Gaps = array[int]
else:
    Gaps = array  # cannot be subscripted before Python 3.12

REFUSALS = (429, 503)


class Fate(enum.StrEnum):
    FINISHED = "finished"
    REJECTED = "rejected"
    """Status 429 or 503."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    """Left as the recorded client did."""
    INTERRUPTED = "interrupted"
    """The run was stopped while it ran."""


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. `*_ns` are nanoseconds after the start of the run; None means it never happened."""

    index: int
    """Of the request in the workload."""
    session: str
    fate: Fate
    is_stream: bool = True
    trace_id: str = ""
    request_id: str = ""
    worker: str = ""
    intended_ns: int
    started_ns: int
    """The generator turned to it: what it is late by is its own."""
    sent_ns: int | None = None
    """Handed to the socket, after connecting where that was needed."""
    first_byte_ns: int | None = None
    first_content_ns: int | None = None
    last_content_ns: int | None = None
    done_ns: int
    status: int = 0
    error_kind: str | None = None
    error: str | None = None
    reject_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    """From usage."""
    content_events: int = 0
    gaps_us: Gaps = msgspec.field(default_factory=lambda: array("q"))
    """Microseconds between content events; packed, because a run has one per token."""
    timing: Timing | None = None
    recorded: Recorded | None = None

    @property
    def lag_ns(self) -> int:
        return self.started_ns - self.intended_ns

    @property
    def ttft_ns(self) -> int | None:
        """From intended send."""
        return _since(self.first_content_ns, self.intended_ns)

    @property
    def ttft_sent_ns(self) -> int | None:
        return _since(self.first_content_ns, self.sent_ns)

    @property
    def e2e_ns(self) -> int:
        """From intended send."""
        return self.done_ns - self.intended_ns

    @property
    def e2e_sent_ns(self) -> int | None:
        return _since(self.done_ns, self.sent_ns)

    @property
    def tpot_ns(self) -> float | None:
        if not self.is_stream or self.first_content_ns is None or self.last_content_ns is None:
            return None
        if self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.last_content_ns - self.first_content_ns) / (self.output_tokens - 1)


def _since(later_ns: int | None, earlier_ns: int | None) -> int | None:
    return None if later_ns is None or earlier_ns is None else later_ns - earlier_ns


def result_of(
    due: Due, request: WorkloadRequest, exchange: Exchange, *, start_ns: int, started_ns: int, trace_id: str
) -> Result:
    """`start_ns` is the monotonic time at which the run started, `started_ns` is after it."""

    def after_start(stamp_ns: int) -> int | None:
        return stamp_ns - start_ns if stamp_ns else None

    usage, timing = exchange.usage, exchange.timing
    return Result(
        index=due.index,
        session=request.session,
        fate=_fate(exchange),
        is_stream=request.is_stream,
        trace_id=trace_id,
        request_id=exchange.request_id,
        worker=exchange.worker,
        intended_ns=due.intended_ns,
        started_ns=started_ns,
        sent_ns=after_start(exchange.sent_ns),
        first_byte_ns=after_start(exchange.first_byte_ns),
        first_content_ns=after_start(exchange.first_content_ns),
        last_content_ns=after_start(exchange.last_content_ns),
        done_ns=exchange.done_ns - start_ns,
        status=exchange.status,
        error_kind=exchange.error_kind,
        error=exchange.error,
        reject_reason=exchange.reject_reason,
        prompt_tokens=usage.prompt_tokens if usage else None,
        cached_tokens=timing.cached_tokens if timing else usage.cached_tokens if usage else None,
        output_tokens=usage.completion_tokens if usage else None,
        content_events=exchange.content_events,
        gaps_us=array("q", (gap // 1000 for gap in exchange.gaps_ns)),
        timing=timing,
        recorded=request.recorded,
    )


def _fate(exchange: Exchange) -> Fate:
    match exchange.error_kind:
        case None:
            return Fate.FINISHED
        case "cancelled":
            return Fate.CANCELLED
        case "interrupted":
            return Fate.INTERRUPTED
        case _:
            return Fate.REJECTED if exchange.status in REFUSALS else Fate.FAILED
