"""Stamps of one request while it runs, and their freezing into the phases of a record.

All stamps are nanoseconds of the gateway's monotonic clock; 0 means "not yet".
"""

from __future__ import annotations

from protos.core.contract import Stamps
from protos.core.record import Phases


class Timeline:
    """Written by the pipeline, in order. The worker's stamps are already in the gateway's clock."""

    __slots__ = (
        "admitted_ns",
        "arrived_ns",
        "arrived_unix_ns",
        "dequeued_ns",
        "dispatched_ns",
        "engine_queued_ns",
        "engine_received_ns",
        "engine_scheduled_ns",
        "first_token_ns",
        "last_token_ns",
        "received_ns",
        "routed_ns",
    )

    def __init__(self, arrived_ns: int, arrived_unix_ns: int) -> None:
        self.arrived_ns = arrived_ns
        self.arrived_unix_ns = arrived_unix_ns
        self.received_ns = 0
        self.admitted_ns = 0
        self.dequeued_ns = 0
        self.routed_ns = 0
        self.dispatched_ns = 0
        """Start of the last attempt; differs from routed_ns only after a retry."""
        self.forget_engine()

    def forget_engine(self) -> None:
        """A new attempt: what the last worker said no longer counts."""
        self.engine_received_ns = 0
        self.engine_queued_ns = 0
        self.engine_scheduled_ns = 0
        self.first_token_ns = 0
        self.last_token_ns = 0

    def take_stamps(self, stamps: Stamps, offset_ns: int) -> None:
        """Take a worker's stamps; `offset_ns` is its clock minus ours."""
        self.engine_received_ns = _shift(stamps.received_ns, offset_ns)
        self.engine_queued_ns = _shift(stamps.queued_ns, offset_ns)
        self.engine_scheduled_ns = _shift(stamps.scheduled_ns, offset_ns)
        self.first_token_ns = _shift(stamps.first_token_ns, offset_ns)
        self.last_token_ns = _shift(stamps.last_token_ns, offset_ns)

    def take_end(self, stamps: Stamps, offset_ns: int) -> None:
        """Of a worker that resumed what another one began, only the last token's stamp is the request's."""
        self.last_token_ns = _shift(stamps.last_token_ns, offset_ns)

    def freeze(self, ended_ns: int) -> tuple[Phases, int]:
        """(phases, unattributed nanoseconds): a partition of arrival to `ended_ns`.

        Each stamp ends its phase and starts the next; a stamp out of order (clock error) is clamped between its
        neighbours, so the sum holds whatever a worker reports. The time after the last stamp belongs to the phase that
        was running, except when a worker owed stamps that never came: that time is unattributed.
        """
        ends = (
            ("receive", self.received_ns),
            ("admit", self.admitted_ns),
            ("queue", self.dequeued_ns),
            ("route", self.routed_ns),
            ("retry", self.dispatched_ns if self.dispatched_ns != self.routed_ns else 0),
            ("dispatch", self.engine_received_ns),
            ("engine_input", self.engine_queued_ns),
            ("engine_queue", self.engine_scheduled_ns),
            ("prefill", self.first_token_ns),
            ("decode", self.last_token_ns),
        )
        phases: dict[str, int] = {}
        at = self.arrived_ns
        running = "receive"
        for name, end_ns in ends:
            if not end_ns:
                continue
            end_ns = min(max(end_ns, at), ended_ns)
            phases[name] = end_ns - at
            at = end_ns
            running = _NEXT[name]
            if at >= ended_ns:
                break
        rest_ns = ended_ns - at
        if running in _OWED_BY_WORKER:
            return Phases(**phases), rest_ns
        if rest_ns:
            phases[running] = rest_ns
        return Phases(**phases), 0


_NEXT = {
    "receive": "admit",
    "admit": "queue",
    "queue": "route",
    "route": "dispatch",
    "retry": "dispatch",
    "dispatch": "engine_input",
    "engine_input": "engine_queue",
    "engine_queue": "prefill",
    "prefill": "decode",
    "decode": "deliver",
}
# In these, only the worker's next stamp tells where the time went.
_OWED_BY_WORKER = frozenset({"dispatch", "engine_input"})


def _shift(stamp_ns: int, offset_ns: int) -> int:
    return stamp_ns - offset_ns if stamp_ns else 0
