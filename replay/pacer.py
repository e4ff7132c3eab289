"""When to send what: pure deciders over absolute deadlines.

Both pacers are told `now_ns` (nanoseconds after the start) and answer with what is due. They never sleep, and a late
call makes requests late, never fewer: the intended time comes from the schedule, not from when it was asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import msgspec

from replay.workload import WorkloadRequest


class Due(msgspec.Struct, frozen=True):
    index: int
    intended_ns: int


class Decision(msgspec.Struct, frozen=True):
    due: tuple[Due, ...] = ()
    wait_until_ns: int | None = None
    """The next deadline; None when only the end of a running request can bring one, or when all is sent."""
    is_over: bool = False
    """Everything was sent."""


class Pacer(Protocol):
    def decide(self, now_ns: int) -> Decision: ...

    def ended(self, index: int, now_ns: int) -> None:
        """Request `index` is over, well or badly."""


class _Schedule:
    """Requests with a deadline, and how many are still without one."""

    def __init__(self, requests: Sequence[WorkloadRequest]) -> None:
        self.requests = requests
        self.followers: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            if request.after is not None:
                self.followers.setdefault(request.after, []).append(index)
        self._deadlines: list[tuple[int, int]] = []
        self._unsent = len(requests)

    def put(self, index: int, at_ns: int) -> None:
        heapq.heappush(self._deadlines, (at_ns, index))

    def decide(self, now_ns: int) -> Decision:
        due = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            at_ns, index = heapq.heappop(self._deadlines)
            due.append(Due(index, at_ns))
        self._unsent -= len(due)
        return Decision(tuple(due), self._deadlines[0][0] if self._deadlines else None, self._unsent == 0)


class OpenPacer:
    """Open loop: each chain starts at its own time, whatever the server does."""

    def __init__(self, requests: Sequence[WorkloadRequest]) -> None:
        self._schedule = _Schedule(requests)
        for index, request in enumerate(requests):
            if request.after is None:
                self._schedule.put(index, request.at_ns)

    def decide(self, now_ns: int) -> Decision:
        return self._schedule.decide(now_ns)

    def ended(self, index: int, now_ns: int) -> None:
        schedule = self._schedule
        for follower in schedule.followers.get(index, ()):
            schedule.put(follower, now_ns + schedule.requests[follower].think_ns)


class UserPacer:
    """Closed loop: `users` clients, one more every `1 / spawn_rate` seconds, each taking the next chain when done.

    `think_ns` is the pause of a user between two requests; None keeps the recorded pauses within a chain.
    """

    def __init__(
        self, requests: Sequence[WorkloadRequest], *, users: int, spawn_rate: float, think_ns: int | None
    ) -> None:
        self._schedule = _Schedule(requests)
        self._think_ns = think_ns
        self._chains = iter([index for index, request in enumerate(requests) if request.after is None])
        for user in range(users):
            self._take_chain(int(user / spawn_rate * 1e9))

    def decide(self, now_ns: int) -> Decision:
        return self._schedule.decide(now_ns)

    def ended(self, index: int, now_ns: int) -> None:
        schedule = self._schedule
        followers = schedule.followers.get(index, ())
        for follower in followers:
            recorded_ns = schedule.requests[follower].think_ns
            schedule.put(follower, now_ns + (recorded_ns if self._think_ns is None else self._think_ns))
        if not followers:
            self._take_chain(now_ns + (self._think_ns or 0))

    def _take_chain(self, at_ns: int) -> None:
        index = next(self._chains, None)
        if index is not None:
            self._schedule.put(index, at_ns)
