"""One request in flight: what it is, what its worker says, and what its client gets.

The pipeline drives it through `next_event`; a worker's session drives it through the Sink methods, which write tokens
to the client at once and leave everything else to the pipeline.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.answers import Answer, Choice, Usage
from gateway.calls import Call
from gateway.forecast import Forecast
from gateway.identity import Identity
from gateway.outlet import Headers, Outlet
from gateway.run import Run
from gateway.scheduler import Placement
from gateway.stream import TokenStream
from gateway.timeline import Timeline
from protos.core.contract import Failed, Finished, Started, TokenLogprob
from protos.core.errors import RequestError
from protos.core.record import Attempt, Outcome, RequestRecord

if TYPE_CHECKING:
    from gateway.hedge import Race


class Lost(msgspec.Struct, frozen=True):
    """The worker's session broke."""

    reason: str


class Beaten(msgspec.Struct, frozen=True):
    """Another run of the request had its first token sooner."""


class Gone(msgspec.Struct, frozen=True):
    """The client went away."""


class Overdue(msgspec.Struct, frozen=True):
    """A deadline passed: in the queue, before the first token, or in all."""

    has_output: bool = False
    """Tokens had come by then; more may have come since."""


class Unplaceable(msgspec.Struct, frozen=True):
    """The last worker that could have run it is gone."""


class Cut(msgspec.Struct, frozen=True):
    """The gateway stops, and has waited long enough."""


Row = tuple[int, str, Sequence[TokenLogprob] | None]
"""(choice, text, logprobs)"""
Event = Placement | Finished | Failed | Lost | Beaten | Gone | Overdue | Unplaceable | Cut
STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Exchange:
    """Owned by the pipeline's task of the request. A Sink for its attempts."""

    __slots__ = (
        "_events",
        "_first_token_ns",
        "_keeps_output",
        "_preface",
        "_waiter",
        "_withheld",
        "answer",
        "attempts",
        "body",
        "cached_tokens",
        "call",
        "carried_tokens",
        "choices",
        "ended_ns",
        "endpoint",
        "error",
        "expected_cached_tokens",
        "finish",
        "forecast",
        "identity",
        "is_deaf",
        "lease",
        "model",
        "number",
        "on_overrun",
        "on_started",
        "outcome",
        "outlet",
        "patience",
        "priority",
        "prompt_tokens",
        "race",
        "run",
        "status",
        "stream",
        "tenant",
        "timeline",
        "token_ids",
        "tried",
        "watcher",
    )

    def __init__(
        self, number: int, endpoint: str, identity: Identity, timeline: Timeline, outlet: Outlet, *, keeps_output: bool
    ) -> None:
        self.number = number
        self.lease = number
        """Its number in the scheduler's books: another one after a hedge, whose run has its own."""
        self.endpoint = endpoint
        self.identity = identity
        self.timeline = timeline
        self.outlet = outlet
        self.body = b""
        self.call: Call | None = None
        self.model = ""
        self.tenant = "anonymous"
        self.priority = ""
        self.run: Run | None = None
        """The last attempt's."""
        self.race: Race | None = None
        """Between its run and a hedge; over or not."""
        self.tried: tuple[str, ...] = ()
        """The workers that it was sent to."""
        self.answer: Answer | None = None
        self.choices: list[Choice] = []
        self.attempts: list[Attempt] = []
        self.error: RequestError | None = None
        self.finish: Finished | None = None
        self.forecast: Forecast | None = None
        """Of its first token, when it was admitted."""
        self.outcome = Outcome.CANCELLED
        self.status = 499
        self.ended_ns = 0
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.expected_cached_tokens: int | None = None
        """When it was routed."""
        self.stream = TokenStream(self)
        """Where the worker's tokens go."""
        self.carried_tokens = 0
        """Output tokens from before the present attempt."""
        self.token_ids: list[int] | None = None
        """Of the output, where the request may be resumed on another worker."""
        self.on_overrun: Callable[[], None] = _nothing
        """Called when more tokens have come than `stream.charged_tokens`."""
        self.on_started: Callable[[], None] = _nothing
        """Called when the first token has come."""
        self.is_deaf = False
        """Nothing more goes to the client."""
        self.watcher: asyncio.Task[None] | None = None
        """Signals Gone when the client leaves."""
        self.patience: asyncio.Timeout | None = None
        """Of a wait for the client that is no event's to end."""
        self._keeps_output = keeps_output
        self._first_token_ns = 0
        self._withheld: list[Row] = []
        self._preface = b""
        """Start of a stream's body that the socket has not taken yet."""
        self._events: collections.deque[Event] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None
        outlet.on_drained = self._release_withheld
        outlet.on_closed = self.stream.close

    # -- events for the pipeline

    async def next_event(self) -> Event:
        """The next thing that the pipeline must act on. One waiter at a time."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def signal(self, event: Event) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cut(self) -> None:
        """The gateway stops: whatever the request waits for, it waits no longer."""
        self.signal(Cut())
        if self.patience is not None:
            self.patience.reschedule(asyncio.get_running_loop().time())

    @property
    def has_left(self) -> bool:
        """The client went away, and the pipeline has not acted on it."""
        return any(isinstance(event, Gone) for event in self._events)

    # -- the request

    def close(self) -> None:
        """Its task ends: nothing of it outlives it."""
        if self.watcher is not None:
            self.watcher.cancel()
        self.race = None
        self.outlet.close()
        self.stream.abandon()

    def prepare(self, call: Call, model: str, answer: Answer) -> None:
        self.call = call
        self.model = model
        self.answer = answer
        self.choices = [Choice(texts=[], logprobs=[]) for _ in range(call.sampling.n)]

    def begin_attempt(self, run: Run) -> None:
        """One that resumes adds to the phases that there are: to the client it is one answer, with a pause in it."""
        if not self.has_output:
            self.timeline.forget_engine()
            self.timeline.dispatched_ns = run.began_ns
        self.run = run
        self.expected_cached_tokens = run.cached_tokens
        self.carried_tokens = self.output_tokens
        self.is_deaf = False
        if self.outlet.is_started:
            self._open_stream()

    def note_attempt(self, run: Run, now_ns: int, error: str | None) -> None:
        """A run has ended, or lost its race: that is before any token has come."""
        arrived_ns = self.timeline.arrived_ns
        output_tokens = self.output_tokens - self.carried_tokens
        self.attempts.append(
            Attempt(run.worker, run.began_ns - arrived_ns, now_ns - arrived_ns, error, output_tokens, run.is_hedge)
        )
        if run is self.run:
            self.on_started = self.on_overrun = _nothing

    def stop_listening(self) -> None:
        """Nothing more goes to the client; the worker's last words still count for the record."""
        self.is_deaf = True
        self.stream.close()
        self._withheld.clear()

    @property
    def worker(self) -> str | None:
        """Of the last attempt."""
        return self.run.worker if self.run is not None else None

    @property
    def is_silent(self) -> bool:
        """It runs, and nothing has come of it: no token, and no end that the pipeline is yet to act on."""
        return not (self.has_output or self.is_deaf or self._events)

    @property
    def output_tokens(self) -> int:
        """That have come, over all attempts and choices."""
        return self.stream.tokens

    @property
    def has_output(self) -> bool:
        """A token has come: from here on the request can only be resumed elsewhere, not started again."""
        return self.output_tokens > 0

    @property
    def is_resumable(self) -> bool:
        """Each token that has come is known by its id; otherwise nobody could say what is missing."""
        return self.token_ids is not None and len(self.token_ids) == self.output_tokens

    @property
    def tokens(self) -> int:
        """What the request took: prompt and output tokens, as far as it came."""
        return (self.prompt_tokens or 0) + self.output_tokens

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens or 0, self.output_tokens, self.cached_tokens or 0)

    # -- Sink

    def accepted(self, received_ns: int, offset_ns: int) -> None:
        if not self.carried_tokens:
            self.timeline.engine_received_ns = received_ns - offset_ns

    def started(self, event: Started, offset_ns: int) -> None:
        if not self.carried_tokens:
            self.prompt_tokens = event.prompt_tokens
            self.cached_tokens = event.cached_tokens
            self.timeline.take_stamps(event.stamps, offset_ns)
            self.timeline.last_token_ns = 0  # it is the first token's, until the worker says `finished`
        self.on_started()

    def delta(
        self, text: str, token_count: int, choice: int, logprobs: Sequence[TokenLogprob] | None, now_ns: int
    ) -> None:
        """The rows that `stream` does not write by itself: it is not open yet, or not now, or there is more to them."""
        if self.is_deaf:
            return
        self.stream.count(token_count, now_ns)
        if not text and not logprobs:
            return
        if not self._first_token_ns:
            self._first_token_ns = now_ns
        assert self.call is not None
        if not self.call.is_stream:
            self._keep(choice, text, logprobs)
        elif self.outlet.is_blocked:
            self._withheld.append((choice, text, logprobs))
        else:
            self._send(choice, text, logprobs)

    def finished(self, event: Finished, offset_ns: int) -> None:
        self.finish = event
        if self.carried_tokens:
            self.timeline.take_end(event.stamps, offset_ns)
        else:
            self.prompt_tokens = event.prompt_tokens
            self.cached_tokens = event.cached_tokens
            self.timeline.take_stamps(event.stamps, offset_ns)
        self.signal(event)

    def failed(self, event: Failed, offset_ns: int) -> None:
        if event.stamps.received_ns and not self.carried_tokens:
            self.timeline.take_stamps(event.stamps, offset_ns)
        self.signal(event)

    def lost(self, reason: str) -> None:
        self.signal(Lost(reason))

    # -- to the client

    def response_headers(self) -> Headers:
        headers = [
            (b"x-request-id", self.identity.request_id.encode()),
            (b"traceparent", self.identity.traceparent.encode()),
        ]
        if self.worker is not None:
            headers.append((b"x-tidegate-worker", self.worker.encode()))
        return headers

    def start_stream(self) -> None:
        """Send the response's head. What the body begins with leaves with the first chunk."""
        assert self.answer is not None
        self.status = 200
        self._preface = self.answer.head(len(self.choices))
        self.outlet.start(200, STREAM_HEADERS + self.response_headers())

    def _send(self, choice: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> None:
        assert self.answer is not None
        if not self.outlet.is_started:
            self.start_stream()
            self._withheld.append((choice, text, logprobs))
            if not self.outlet.is_blocked:
                self._release_withheld()
            return
        if self._keeps_output:
            self.choices[choice].texts.append(text)
        self.outlet.push(self.answer.chunk(choice, text, logprobs))

    def _keep(self, choice: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> None:
        self.choices[choice].texts.append(text)
        if logprobs:
            self.choices[choice].logprobs.extend(logprobs)

    def _release_withheld(self) -> None:
        """The socket takes data again: all text that waited leaves as one event per choice."""
        if data := self.take_withheld():
            self.outlet.push(data)
        self._open_stream()

    def _open_stream(self) -> None:
        """From here on plain text goes to the socket without coming by, until `outlet` says otherwise."""
        assert self.answer is not None
        socket = self.outlet.socket
        if socket is not None and not (self._keeps_output or self.is_deaf):
            self.stream.open(socket, *self.answer.text_frame(0))

    def take_withheld(self) -> bytes:
        """What waits for the socket, rendered; the plain text of a choice is joined into one event."""
        rows, self._withheld = _join(self._withheld), []
        events, self._preface = [self._preface], b""
        for choice, text, logprobs in rows:
            if self._keeps_output:
                self.choices[choice].texts.append(text)
            assert self.answer is not None
            events.append(self.answer.chunk(choice, text, logprobs))
        return b"".join(events)

    # -- the record

    def timing(self, now_ns: int) -> dict[str, Any] | None:
        """Value of "tidegate" in the answer, when the client asked for it."""
        if not self.identity.wants_timing:
            return None
        phases, unattributed_ns = self.timeline.freeze(now_ns)
        return {
            "request_id": self.identity.request_id,
            "trace_id": self.identity.trace_id,
            "worker": self.worker,
            "is_simulated": self._is_simulated,
            "phases_ns": dict(phases.present()),
            "total_ns": now_ns - self.timeline.arrived_ns,
            "unattributed_ns": unattributed_ns,
            "first_token_at_ns": self._after_arrival(self._first_token_ns),
            "forecast_ns": _forecast_ns(self.forecast),
            "preemptions": self.finish.preemptions if self.finish else 0,
            "cached_tokens": self.cached_tokens or 0,
            "expected_cached_tokens": self.expected_cached_tokens or 0,
        }

    def record(self) -> RequestRecord:
        """The settled request. Call it once, after `ended_ns` is set."""
        identity, timeline, error = self.identity, self.timeline, self.error
        phases, unattributed_ns = timeline.freeze(self.ended_ns)
        is_cancelled = self.outcome is Outcome.CANCELLED
        return RequestRecord(
            request_id=identity.request_id,
            trace_id=identity.trace_id,
            span_id=identity.span_id,
            parent_span_id=identity.parent_span_id,
            replay_of=identity.replay_of,
            is_sampled=identity.is_sampled,
            endpoint=self.endpoint,
            model=self.model,
            tenant=self.tenant,
            priority=self.priority,
            session=identity.session,
            is_stream=self.call.is_stream if self.call else False,
            arrived_unix_ns=timeline.arrived_unix_ns,
            outcome=self.outcome,
            status=self.status,
            reject_reason=error.reason if error else None,
            error=error.message if error else None,
            error_code=error.code if error else None,
            finish_reasons=self.finish.reasons if self.finish and not is_cancelled else (),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            expected_cached_tokens=self.expected_cached_tokens,
            output_tokens=self.output_tokens,
            max_tokens=self.call.sampling.max_tokens if self.call else None,
            body_bytes=len(self.body),
            worker=self.worker,
            is_simulated=self._is_simulated,
            attempts=tuple(self.attempts),
            phases=phases,
            total_ns=self.ended_ns - timeline.arrived_ns,
            unattributed_ns=unattributed_ns,
            first_token_at_ns=self._after_arrival(self._first_token_ns),
            last_token_at_ns=self._after_arrival(self.stream.last_ns),
            cancelled_at_ns=self._after_arrival(self.ended_ns) if is_cancelled else None,
            max_gap_ns=self.stream.max_gap_ns,
            backpressure_ns=self.outlet.blocked_ns,
            preemptions=self.finish.preemptions if self.finish else 0,
        )

    @property
    def _is_simulated(self) -> bool:
        return self.run is not None and self.run.model.simulated

    def _after_arrival(self, stamp_ns: int) -> int | None:
        return stamp_ns - self.timeline.arrived_ns if stamp_ns else None


def _forecast_ns(forecast: Forecast | None) -> dict[str, int] | None:
    """Of the first token, from arrival; None where there was nothing to tell it from."""
    return {"expected": forecast.expected_ns, "safe": forecast.safe_ns} if forecast is not None else None


def _join(rows: list[Row]) -> list[Row]:
    """Rows of one choice that carry text alone become one; a choice's own order is kept."""
    joined: list[Row] = []
    open_rows: dict[int, int] = {}
    for choice, text, logprobs in rows:
        at = open_rows.get(choice)
        if logprobs is None and at is not None:
            joined[at] = (choice, joined[at][1] + text, None)
            continue
        if logprobs is None:
            open_rows[choice] = len(joined)
        else:
            open_rows.pop(choice, None)
        joined.append((choice, text, logprobs))
    return joined


def _nothing() -> None:
    pass
