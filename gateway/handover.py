"""How long before a step ends a prompt has to leave for its worker to be in the next one. A pure decider, per worker.

It has to cross the wire and the worker's own queue, and the frame that tells of the step's end has to cross it back: a
prompt that is sent when a step is about to end waits for all of the next one. What that takes is learned from the steps
that prompts were in: sent long enough before by what was known, and too late; or not long enough, and in time.
"""

from __future__ import annotations

FIRST_NS = 500_000.0
LEAST_NS = 50_000.0
GROWTH = 1.2
"""By how much the estimate changes with a prompt that it was wrong about: some are late for other reasons."""


class Handover:
    def __init__(self) -> None:
        self.needed_ns = FIRST_NS
        self._sent: dict[int, int] = {}
        """Requests that were sent during the running step, and when."""
        self._early: dict[int, tuple[int, int]] = {}
        """How long before the end of which step the others were."""

    def sent(self, request: int, now_ns: int) -> None:
        """An urgent prompt, while a step runs: it is computed in the next one, if it comes in time."""
        self._sent[request] = now_ns

    def stepped(self, now_ns: int, step: int) -> None:
        """A step has ended, the one of that number."""
        if self._sent:
            for request, sent_ns in self._sent.items():
                self._early[request] = (now_ns - sent_ns, step)
            self._sent.clear()

    def started(self, request: int, step: int) -> None:
        """Its first token has come, in the frame of the step after the one of that number."""
        early = self._early.pop(request, None)
        if early is None:
            return
        early_ns, sent_in = early
        was_in_time, was_expected = sent_in == step, early_ns >= self.needed_ns
        if was_expected and not was_in_time:
            self.needed_ns *= GROWTH
        elif was_in_time and not was_expected:
            self.needed_ns = max(LEAST_NS, self.needed_ns / GROWTH)

    def dropped(self, request: int) -> None:
        self._sent.pop(request, None)
        self._early.pop(request, None)
