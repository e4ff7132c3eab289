"""When to leave a worker alone: the classic circuit breaker, one per worker. A pure decider.

closed ──too many failures──> open ──time passes──> half-open ──probe succeeds──> closed
                               ^                        │
                               └────── probe fails ─────┘   (open for twice as long)

It hears how attempts ended, and it outlives sessions: a worker that crashes on every request is one that fails, however
often it comes back. What says nothing about the worker is not a failure: a request that was wrong, a limit that was
hit (429), a client that left, a deadline, a refusal while draining. A lost session is one failure, however many
requests it took along: they are one event.

It says only "not this worker for now". How many workers may be left alone at once is for whoever routes.
"""

from __future__ import annotations

import collections
import enum
from typing import Literal

SECOND_NS = 1_000_000_000
FAILURES_IN_A_ROW = 5
WINDOW = 20
"""Attempts whose failure rate is looked at, once there are so many."""
FAILURE_RATE = 0.5
FIRST_OPEN_NS = SECOND_NS
LONGEST_OPEN_NS = 60 * SECOND_NS
CALM_NS = 60 * SECOND_NS
"""Closed for this long, a breaker opens for the shortest time again."""

State = Literal["closed", "open", "half-open"]


class Verdict(enum.Enum):
    """What an attempt's end says about its worker."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEITHER = "neither"


class Breaker:
    """`allows` asks and changes nothing; `began` and `record` tell it what happened."""

    def __init__(self) -> None:
        self._ends: collections.deque[bool] = collections.deque(maxlen=WINDOW)
        """Which of the last attempts failed."""
        self._in_a_row = 0
        self._open_ns = FIRST_OPEN_NS
        self._until_ns = 0
        """End of being open; of no meaning while closed."""
        self._closed_ns = 0
        self._is_closed = True
        self._is_probing = False

    def state(self, now_ns: int) -> State:
        if self._is_closed:
            return "closed"
        return "open" if now_ns < self._until_ns else "half-open"

    def allows(self, now_ns: int) -> bool:
        """May an attempt begin? While half-open, one at a time."""
        return self._is_closed or (now_ns >= self._until_ns and not self._is_probing)

    def began(self, now_ns: int) -> None:
        """An attempt begins, whether it was allowed or there was no other worker."""
        self._is_probing = self.state(now_ns) == "half-open"

    def record(self, now_ns: int, verdict: Verdict) -> None:
        """An attempt has ended, or the worker's session was lost."""
        match verdict:
            case Verdict.SUCCESS:
                self._succeeded(now_ns)
            case Verdict.FAILURE:
                self._failed(now_ns)
            case Verdict.NEITHER:
                self._is_probing = False

    def _succeeded(self, now_ns: int) -> None:
        self._in_a_row = 0
        if self._is_closed:
            self._ends.append(False)
        elif now_ns >= self._until_ns:
            self._is_closed, self._is_probing, self._closed_ns = True, False, now_ns
            self._ends.clear()

    def _failed(self, now_ns: int) -> None:
        if self._is_closed:
            self._ends.append(True)
            self._in_a_row += 1
            if self._is_too_much:
                if now_ns - self._closed_ns > CALM_NS:
                    self._open_ns = FIRST_OPEN_NS
                self._open(now_ns)
        elif self._is_probing:
            self._open(now_ns)

    @property
    def _is_too_much(self) -> bool:
        is_often = len(self._ends) == WINDOW and sum(self._ends) >= FAILURE_RATE * WINDOW
        return self._in_a_row >= FAILURES_IN_A_ROW or is_often

    def _open(self, now_ns: int) -> None:
        self._is_closed = self._is_probing = False
        self._until_ns = now_ns + self._open_ns
        self._open_ns = min(2 * self._open_ns, LONGEST_OPEN_NS)
        self._in_a_row = 0
