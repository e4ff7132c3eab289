"""How many sequences a worker is given at once: as many as its KV cache carries to their ends.

An engine takes in what fits now, and preempts when the answers have grown: it throws away what it computed, and
computes it again. A limit below that costs nothing, since those that wait here instead can still be ordered, refused
and cancelled. Additive increase, multiplicative decrease (Chiu and Jain, 1989), in rounds of engine steps, so that a
slow engine is given the time that it takes. (How long steps may take is `gateway.pace`'s: it holds prompts back.)
"""

from __future__ import annotations

from protos.core.contract import Load

ROUND_STEPS = 16
CUT = 0.9
HIGH_WATER = 0.9
"""Share of the KV blocks from which on the limit does not grow, and a queue in the engine says that they are full."""
RAISE_SHARE = 32
"""A round without a sign of crowding lets in one more sequence, or one in so many."""


class SequenceLimit:
    """One worker's limit, between `least` and `most`; fed with the load after each step."""

    def __init__(self, most: int, least: int = 1) -> None:
        self._most = most
        self._least = min(least, most)
        self.value = most
        self._preemptions: int | None = None
        self._steps = 0
        self._highest_use = 0.0
        self._most_given = 0
        self._most_running = 0
        self._is_queueing = True

    def stepped(self, load: Load) -> None:
        """A step has ended, and this is the load after it."""
        is_preempting = self._count_preemptions(load) > 0
        self._steps += 1
        self._highest_use = max(self._highest_use, load.kv_blocks_used / max(1, load.kv_blocks_total))
        self._most_given = max(self._most_given, load.running + load.waiting)
        self._most_running = max(self._most_running, load.running)
        self._is_queueing = self._is_queueing and load.waiting > 0
        if is_preempting and load.running + load.waiting <= self.value:
            # Beyond the limit it says nothing new: the last cut has not had its effect yet.
            self._set(int(CUT * load.running))
        elif self._steps == ROUND_STEPS:
            self._end_round()

    def _end_round(self) -> None:
        is_full = self._highest_use >= HIGH_WATER
        if is_full and self._is_queueing:
            self._set(min(self.value, self._most_running))
        elif not is_full and self._most_given >= self.value:
            self._set(self.value + max(1, self.value // RAISE_SHARE))
        else:
            self._begin_round()

    def _set(self, value: int) -> None:
        self.value = max(self._least, min(self._most, value))
        self._begin_round()

    def _begin_round(self) -> None:
        self._steps = 0
        self._highest_use = 0.0
        self._most_given = 0
        self._most_running = 0
        self._is_queueing = True

    def _count_preemptions(self, load: Load) -> int:
        before, self._preemptions = self._preemptions, load.preemptions
        return 0 if before is None else load.preemptions - before
