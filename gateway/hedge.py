"""A request on two workers at once: the first token of either decides, and the other is cancelled.

Until then each run tells its events to a Racer. Once it is decided, the run that goes on tells them to the exchange
itself, as if it had been alone: a token passes nothing of this module. The racer of the other run waits for its worker
to let go, which may be long after the client has its answer, and gives back the lease.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway import retries
from gateway.exchange import Beaten, Event, Exchange, Lost
from gateway.run import Run
from protos.core.contract import Failed, Finished, Started, TokenLogprob


class Race:
    """The request's first run, which is late, against its hedge.

    `begin` makes a run the request's own, `end` notes how a run ended, and `release` gives back its lease.
    """

    def __init__(
        self,
        exchange: Exchange,
        hedge: Run,
        *,
        begin: Callable[[Exchange, Run], None],
        end: Callable[[Exchange, Run, Event], None],
        release: Callable[[Run], None],
    ) -> None:
        assert exchange.run is not None
        self.exchange = exchange
        self._begin, self._end, self._release = begin, end, release
        self._racers: tuple[Racer, ...] = (Racer(self, exchange.run), Racer(self, hedge))
        """Empty once it is decided."""

    def abandon(self, event: Event) -> None:
        """The request is over, whoever would have won: nothing is left of the race but the first run."""
        if self._racers:
            self._drop(self._decide(self._racers[0]), event)

    def is_won_by(self, racer: Racer) -> bool:
        """Something of an answer has come: is it the request's?"""
        if not self._racers:
            return False
        self._drop(self._decide(racer), Beaten())
        return True

    def ended(self, racer: Racer, event: Finished | Failed | Lost) -> bool:
        """A worker has let go of its run: is that the end of the attempt?

        A worker's fault is not while the other run goes on; what would fail anywhere is.
        """
        if not retries.is_workers_fault(event) and self.is_won_by(racer):
            return True
        if self._racers:
            first, hedge = self._racers
            self._decide(hedge if racer is first else first)
            self._end(self.exchange, racer.run, event)
        self._release(racer.run)
        return False

    def _decide(self, winner: Racer) -> Run:
        """The request goes on with the winner; returns the other run."""
        first, hedge = self._racers
        self._racers = ()
        if winner is hedge:
            self._begin(self.exchange, hedge.run)
        winner.step_aside()
        return first.run if winner is hedge else hedge.run

    def _drop(self, run: Run, event: Event) -> None:
        self._end(self.exchange, run, event)
        run.cancel()


class Racer:
    """The Sink of one run, and its stream, until the race is decided; of the run that lost until its end."""

    __slots__ = ("_accepted", "_race", "run")

    def __init__(self, race: Race, run: Run) -> None:
        self.run = run
        self._race = race
        self._accepted: tuple[int, int] | None = None
        run.upstream.redirect(run.slot, self)

    def step_aside(self) -> None:
        """The exchange hears the run itself from here on."""
        exchange = self._race.exchange
        self.run.upstream.redirect(self.run.slot, exchange, exchange.token_ids)
        if self._accepted is not None:
            exchange.accepted(*self._accepted)

    # -- Sink and Tokens

    @property
    def stream(self) -> Racer:
        return self

    def accepted(self, received_ns: int, offset_ns: int) -> None:
        self._accepted = (received_ns, offset_ns)

    def started(self, event: Started, offset_ns: int) -> None:
        if self._race.is_won_by(self):
            self._race.exchange.started(event, offset_ns)

    @property
    def descriptor(self) -> int:
        return self._race.exchange.stream.descriptor

    @property
    def queue(self) -> Callable[[bytes], None]:
        return self._race.exchange.stream.queue

    def token(self, text: str, count: int, now_ns: int) -> bytes | None:
        return self._race.exchange.stream.token(text, count, now_ns) if self._race.is_won_by(self) else None

    def delta(
        self, text: str, token_count: int, choice: int, logprobs: Sequence[TokenLogprob] | None, now_ns: int
    ) -> None:
        if self._race.is_won_by(self):
            self._race.exchange.delta(text, token_count, choice, logprobs, now_ns)

    def finished(self, event: Finished, offset_ns: int) -> None:
        if self._race.ended(self, event):
            self._race.exchange.finished(event, offset_ns)

    def failed(self, event: Failed, offset_ns: int) -> None:
        if self._race.ended(self, event):
            self._race.exchange.failed(event, offset_ns)

    def lost(self, reason: str) -> None:
        self._race.ended(self, Lost(reason))
