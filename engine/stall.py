"""Does the engine hang, or does it only take its time? A pure decider over what the worker sees of its processes.

A step may take many seconds: a long prompt on a CPU, kernels that are compiled on first use. Time since the last step
therefore says nothing. But an engine that computes uses its processor (one that waits for a GPU spins), and one that
has requests and uses none makes no progress any more: it is suspended, or in a deadlock. A kernel that never returns
spins as well; that one is left to vLLM's own time limits.

Only time in which the worker itself ran counts, as in `gateway.heartbeat`.
"""

from __future__ import annotations

import msgspec

SECOND_NS = 1_000_000_000
SUSPENDED_NS = 3 * SECOND_NS
IDLE_NS = 20 * SECOND_NS
"""Long, because a page that is read from a slow disk is no deadlock."""
IDLE_SHARE = 0.01
"""Of one core: what is less is not computing."""
LONGEST_GAP_NS = 2 * SECOND_NS


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker sees at one moment."""

    now_ns: int
    stepped_ns: int
    """End of the last step."""
    has_requests: bool
    is_suspended: bool
    """A process of the engine is stopped by a signal."""
    cpu_s: float
    """CPU time of the engine's processes so far."""


class Stall:
    """Show it a look about twice a second."""

    def __init__(self) -> None:
        self._last: Look | None = None
        self._suspended_ns = 0
        self._idle_ns = 0

    def observe(self, look: Look) -> str | None:
        """What is wrong with the engine; None as long as it works, or has nothing to do."""
        last, self._last = self._last, look
        if last is None or not look.has_requests or look.stepped_ns != last.stepped_ns:
            self._suspended_ns = self._idle_ns = 0
            return None
        passed_ns = min(look.now_ns - last.now_ns, LONGEST_GAP_NS)
        is_idle = look.cpu_s - last.cpu_s < IDLE_SHARE * passed_ns / SECOND_NS
        self._suspended_ns = self._suspended_ns + passed_ns if look.is_suspended else 0
        self._idle_ns = self._idle_ns + passed_ns if is_idle else 0
        if self._suspended_ns >= SUSPENDED_NS:
            return "is suspended"
        return "has requests and computes nothing" if self._idle_ns >= IDLE_NS else None
