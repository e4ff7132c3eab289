"""One part's life, decided without a clock and without a process: start, ready, died, wait, start again.

waiting ──start──> starting ──probe──> ready <──probe──> silent
   ^                  │                  │                 │
   └────── delay ─────┴────── exit ──────┴─────────────────┘
                      └─> gave up: misconfigured, or died too often before it was ever ready
"""

from __future__ import annotations

import enum

import msgspec

SECOND_NS = 1_000_000_000
EXIT_MISCONFIGURED = 2
"""What a Tidegate process ends with when starting it again would change nothing."""
EXIT_INTERRUPTED = 130
"""And with at Ctrl-C, where there is nothing to drain."""


class State(enum.StrEnum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    SILENT = "silent"
    GAVE_UP = "gave up"


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    first_delay_ns: int = SECOND_NS // 2
    cap_ns: int = 30 * SECOND_NS
    ran_well_ns: int = 60 * SECOND_NS
    """A part that lived this long starts from the first delay again."""
    first_tries: int = 3
    """Give up when it was never ready and has died this often."""


def restart_delay_ns(failures: int, policy: RestartPolicy) -> int:
    """Wait after the n-th failure in a row: the first delay, doubled each time, up to the cap."""
    return min(policy.cap_ns, policy.first_delay_ns << min(failures - 1, 30))


class Start(msgspec.Struct, frozen=True):
    """Start the process now."""


class BecameReady(msgspec.Struct, frozen=True):
    took_ns: int


class Died(msgspec.Struct, frozen=True):
    exit_code: int
    ran_ns: int
    delay_ns: int


class GaveUp(msgspec.Struct, frozen=True):
    exit_code: int
    tries: int


Decision = Start | BecameReady | Died | GaveUp


class Lifecycle:
    """State of one part. Call `observe` regularly; do what it returns."""

    def __init__(self, policy: RestartPolicy | None = None) -> None:
        self.state = State.WAITING
        self._policy = policy or RestartPolicy()
        self._starts = 0
        self._failures = 0
        self._started_ns = 0
        self._start_at_ns = 0
        self._was_ever_ready = False

    @property
    def restarts(self) -> int:
        return max(0, self._starts - 1)

    def observe(self, now_ns: int, *, exit_code: int | None, answers: bool) -> Decision | None:
        """`exit_code` is None while the process runs; `answers` is what its health probe said."""
        match self.state:
            case State.GAVE_UP:
                return None
            case State.WAITING:
                return self._start(now_ns) if now_ns >= self._start_at_ns else None
            case _ if exit_code is not None:
                return self._exited(now_ns, exit_code)
            case State.STARTING:
                return self._became_ready(now_ns) if answers else None
            case _:
                self.state = State.READY if answers else State.SILENT
                return None

    def _start(self, now_ns: int) -> Start:
        self._starts += 1
        self.state, self._started_ns = State.STARTING, now_ns
        return Start()

    def _became_ready(self, now_ns: int) -> BecameReady:
        self.state, self._was_ever_ready = State.READY, True
        return BecameReady(now_ns - self._started_ns)

    def _exited(self, now_ns: int, exit_code: int) -> Died | GaveUp:
        ran_ns = now_ns - self._started_ns
        self._failures = 1 if ran_ns >= self._policy.ran_well_ns else self._failures + 1
        if self._is_hopeless(exit_code):
            self.state = State.GAVE_UP
            return GaveUp(exit_code, self._failures)
        delay_ns = restart_delay_ns(self._failures, self._policy)
        self.state, self._start_at_ns = State.WAITING, now_ns + delay_ns
        return Died(exit_code, ran_ns, delay_ns)

    def _is_hopeless(self, exit_code: int) -> bool:
        """What was ready once is always brought back: whatever broke it may pass."""
        if self._was_ever_ready:
            return False
        return exit_code == EXIT_MISCONFIGURED or self._failures >= self._policy.first_tries
