"""How far a worker's monotonic clock is from ours, from pings (Cristian's algorithm, as NTP filters it)."""

from __future__ import annotations

import collections


class ClockOffset:
    """Keeps the estimate of the quickest of the last pings: the less time a ping took, the less it can be wrong."""

    def __init__(self, window: int = 16) -> None:
        self._samples: collections.deque[tuple[int, int]] = collections.deque(maxlen=window)

    def add(self, sent_ns: int, worker_ns: int, now_ns: int) -> None:
        """One ping: sent and answered in our clock, read by the worker in its own."""
        self._samples.append((now_ns - sent_ns, worker_ns - (sent_ns + now_ns) // 2))

    @property
    def is_known(self) -> bool:
        return bool(self._samples)

    @property
    def offset_ns(self) -> int:
        """The worker's clock minus ours; wrong by at most half of `round_trip_ns`."""
        return min(self._samples)[1] if self._samples else 0

    @property
    def round_trip_ns(self) -> int:
        return min(self._samples)[0] if self._samples else 0
