"""Time as a value: deciders take nanoseconds, shells ask a Clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def mono_ns(self) -> int:
        """Nanoseconds of a clock that never goes back; only differences mean something."""

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch."""


class SystemClock:
    """The process's own clocks. On Linux `time.monotonic` is CLOCK_MONOTONIC, one clock for all processes of a host."""

    mono_ns = staticmethod(time.monotonic_ns)
    wall_ns = staticmethod(time.time_ns)


SYSTEM_CLOCK = SystemClock()
