"""How long a worker has been silent, by our own attention. A pure decider.

A worker's event loop sends a frame every second whatever its engine does: the engine computes in a process of its own,
so even a step of many seconds (a long prompt on a CPU) leaves the beat alone. Silence therefore means that the worker's
process is stopped, hangs, or cannot be reached. An engine that hangs behind a live worker is the worker's to notice:
it sees whether the engine's processes still use the CPU (`engine/stall.py`), fails their requests and ends.

Only time in which we listened counts: a gateway that was itself suspended for a minute has not heard anybody, and would
drop all its workers on waking.
"""

from __future__ import annotations


class Silence:
    """Call `tick` every `tick_ns`, more or less."""

    def __init__(self, tick_ns: int, now_ns: int) -> None:
        self._tick_ns = tick_ns
        self._ticked_ns = now_ns
        self._silent_ns = 0

    def tick(self, now_ns: int, heard_ns: int) -> int:
        """Nanoseconds of silence, up to now. `heard_ns` is when something was heard last.

        A tick that is late counts as one: what came meanwhile has not been read yet.
        """
        listened_ns = min(now_ns - self._ticked_ns, 2 * self._tick_ns)
        if heard_ns > self._ticked_ns:
            self._silent_ns = min(now_ns - heard_ns, listened_ns)
        else:
            self._silent_ns += listened_ns
        self._ticked_ns = now_ns
        return self._silent_ns
